"""Published weight files, of random numbers, load and caption as plain references written from the published page say."""

import json
import re

import pytest
import torch

import tiny
import weight_files
from benchmarks import published
from common import UserError
from models import checkpoints
from models.checkpoints import load_checkpoint
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")
STOP = 13  # "."
COUNT = 50


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Folders with a tokenizer and the config of a tiny GPT-2, by width: all that a weight file does not hold."""
    folders, tokenizer = {}, tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    for width, heads in ((32, 4), (64, 2)):
        folder = tmp_path_factory.mktemp(f"gpt2_{width}")
        tiny.random_gpt2(len(tokenizer), width=width, heads=heads, layers=1).config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[width] = folder
    return folders, tokenizer


@pytest.fixture(autouse=True)
def one_tokenizer(languages, monkeypatch):
    """Reading the same tokenizer three hundred times is not what is tested here."""
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda name: languages[1])


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens)


def references(kind, state, facts, embeddings, tokenizer):
    """For each embedding: the language model and the prefix that decoding starts from, worked out from the file's own tensors."""
    root = "base_model.model." if any(name.startswith("base_model.") for name in state) else ""
    gpt_prefix = next(p for p in (f"{root}gpt.base_model.model.", f"{root}gpt.") if any(name.startswith(p) for name in state))
    mapper = {"prompted": "mlp", "lora": "mlp"}.get(kind, kind)

    def start(prefix, gpt_prefix, one):
        gpt = weight_files.PlainGPT2(weight_files.part(state, gpt_prefix), facts.heads)
        return gpt, weight_files.map_prefix(mapper, weight_files.part(state, f"{prefix}clip_project."), one, facts)

    for one in embeddings:
        if kind == "transformer" and facts.clip_width == 640:
            one = one / one.norm()
        gpt, prefix = start(root, gpt_prefix, one)
        if kind == "prompted":
            base_gpt, base_prefix = start("original_model.", "original_model.gpt.", one)
            tokens, _ = published.greedy_search(base_gpt, base_prefix, 67, 1.0, STOP)
            prompt = weight_files.PROMPT.format(base=text_of(tokenizer, tokens).strip())
            ids = torch.tensor(tokenizer.encode(prompt + "A")[:-1])  # the last token is the caption's first, with the space if it has one
            prefix = torch.cat([prefix, gpt.transformer.wte(ids)[None]], dim=1)
        yield gpt, prefix


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer", "prompted", "lora"])
def test_50_random_files_of_each_kind_caption_as_the_page_says(tmp_path, languages, kind, part):
    folders, tokenizer = languages
    stopped = lengths = 0

    def text(tokens):  # behind a prompt the first word carries the space between the two
        return text_of(tokenizer, tokens).strip() if kind == "prompted" else text_of(tokenizer, tokens)

    for seed in range(part * COUNT // 2, (part + 1) * COUNT // 2):
        state, facts = weight_files.random_file(kind, seed, len(tokenizer), STOP)
        torch.save(state, tmp_path / "published.pt")
        model = load_checkpoint(tmp_path / "published.pt", gpt2_type=str(folders[facts.width])).double()
        embeddings = torch.randn(2, facts.clip_width, generator=torch.Generator().manual_seed(seed)).double()
        greedy = generate(model, embeddings, "greedy", entry_length=6)
        beam = generate(model, embeddings, beam_size=3, entry_length=4, num_captions=3)
        for row, (gpt, prefix) in enumerate(references(kind, state, facts, embeddings, tokenizer)):
            tokens, score = published.greedy_search(gpt, prefix, 6, 1.0, STOP)
            assert greedy[row] == [(text(tokens), pytest.approx(score, abs=1e-5))], seed
            expected = published.beam_search(gpt, prefix, 3, 4, 1.0, STOP)
            assert [caption for caption, _ in beam[row]] == [text(tokens) for tokens, _ in expected], seed
            assert [score for _, score in beam[row]] == pytest.approx([score for _, score in expected], abs=1e-5)
            stopped += tokens[-1] == STOP
            lengths += prefix.shape[1]
    assert 0 < stopped < COUNT  # both ends of a caption were seen


def test_sizes_and_forms_are_told_from_the_shapes(tmp_path, languages):
    folders, tokenizer = languages
    state, facts = weight_files.random_file("transformer", 3, len(tokenizer), STOP)
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "a.pt")
    config = load_checkpoint(tmp_path / "a.pt", gpt2_type=str(folders[facts.width])).config
    assert (config.mapping_type, config.prefix_length, config.clip_length, config.num_layers, config.clip_width) == (
        "transformer", facts.length, facts.clip_length, facts.layers, facts.clip_width)  # fmt: skip
    assert config.normalize_prefix == (facts.clip_width == 640)
    assert config.gpt_config["n_layer"] == facts.gpt_layers
    assert config.gpt_config["n_embd"] == facts.width
    assert config.stop_token == "."


def wrap(state, prefix, inner="", container=None):
    """Save a state dict as a training program does: texts in names, and a dict with other entries around it."""
    names = {name: name.replace("gpt.", f"gpt.{inner}", 1) if name.startswith("gpt.") else name for name in state}
    wrapped = {prefix + names[name]: tensor for name, tensor in state.items()}
    return {"epoch": 3, container: wrapped, "optimizer": {"state": {}, "lr": [0.1]}} if container else wrapped


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer", "clipxgpt", "prompted", "lora"])
def test_wrappers_of_training_programs_are_taken_off(tmp_path, languages, kind):
    folders, tokenizer = languages
    state, facts = weight_files.random_file(kind, 4, len(tokenizer), STOP)
    torch.save(state, tmp_path / "plain.pt")
    gpt2_type = str(folders[facts.width])
    expected = load_checkpoint(tmp_path / "plain.pt", gpt2_type=gpt2_type).state_dict()
    for words in (
        {"prefix": "module."},
        {"prefix": "_orig_mod."},
        {"prefix": "model.", "container": "state_dict"},
        {"prefix": "module._orig_mod.", "container": "model"},
        {"prefix": "model._orig_mod.module.", "container": "state_dict"},
        {"prefix": "", "container": "state_dict"},
        {"prefix": "", "inner": "_orig_mod."},
    ):
        torch.save(wrap(state, **words), tmp_path / "wrapped.pt")
        found = load_checkpoint(tmp_path / "wrapped.pt", gpt2_type=gpt2_type).state_dict()
        assert found.keys() == expected.keys(), words
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), words


def test_a_fault_in_a_wrapped_file_is_named_as_the_file_names_it(tmp_path, languages):
    folders, tokenizer = languages
    state, facts = weight_files.random_file("mlp", 4, len(tokenizer), STOP)
    del state["clip_project.model.0.bias"]
    torch.save(wrap(state, "module."), tmp_path / "wrapped.pt")
    with pytest.raises(UserError, match=r"missing module\.clip_project\.model\.0\.bias"):
        load_checkpoint(tmp_path / "wrapped.pt", gpt2_type=str(folders[facts.width]))
    torch.save({**state, "module.clip_project.model.2.bias": torch.ones(2)}, tmp_path / "twice.pt")
    with pytest.raises(UserError, match="which are the same parameter"):
        load_checkpoint(tmp_path / "twice.pt", gpt2_type=str(folders[facts.width]))


@pytest.mark.parametrize("form", ["sparse", "complex", "quantized", "meta"])
def test_a_tensor_that_is_no_dense_numbers_is_refused_and_named(tmp_path, languages, form):
    folders, tokenizer = languages
    state, facts = weight_files.random_file("mlp", 4, len(tokenizer), STOP)
    name = "clip_project.model.0.bias"
    change = {
        "sparse": lambda tensor: tensor.to_sparse(),
        "complex": lambda tensor: tensor.to(torch.complex64),
        "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "meta": lambda tensor: tensor.to("meta"),
    }[form]
    torch.save({**state, name: change(state[name])}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=f"{name} as a {form} tensor"):
        load_checkpoint(tmp_path / "odd.pt", gpt2_type=str(folders[facts.width]))


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer", "clipxgpt", "prompted", "lora"])
def test_a_key_removed_added_or_reshaped_is_refused_and_named(tmp_path, languages, kind):
    folders, tokenizer = languages
    state, facts = weight_files.random_file(kind, 5, len(tokenizer), STOP)
    kept = [name for name in state if not name.endswith(("attn.bias", "attn.masked_bias", "position_ids"))]
    kept = [name for name in kept if not re.search(r"\.(h|layers)\.[1-9]", name)]  # one layer is as the next
    refused = 0

    def refuses(changed, key):
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / "changed.pt", gpt2_type=str(folders[facts.width]))
        assert key in str(caught.value), key
        assert "\n" not in str(caught.value), key

    optional = {name for name in kept if name.endswith("lm_head.weight")}  # GPT-2's is the token table again
    for key in kept:
        if key not in optional:
            refuses({name: tensor for name, tensor in state.items() if name != key}, key)
        refuses({**state, key: torch.randn(3, 5, 2)}, key)
        refused += 1
    module = next(name for name in kept if ".h.0.mlp.c_fc" in name).rpartition(".")[0]
    for added in (f"{module}.extra", "clip_project.more.weight", "optimizer", next(iter(kept)).partition(".")[0] + ".x"):
        refuses({**state, added: torch.ones(2)}, added)
    assert refused > 15


def test_a_width_whose_heads_are_unknown_is_asked_for(tmp_path, languages):
    folders, tokenizer = languages
    state, facts = weight_files.random_file("mlp", 1, len(tokenizer), STOP)
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(UserError, match="--gpt2_type.*n_head"):
        load_checkpoint(tmp_path / "mine.pt")
    told = {"n_head": facts.heads, "gpt2_type": str(folders[facts.width]), "stop_token": None, "encoder": "ViT-B/32"}
    (tmp_path / "mine.json").write_text(json.dumps({"model": told}))
    model = load_checkpoint(tmp_path / "mine.pt")
    assert model.gpt.config.n_head == facts.heads
    assert model.config.stop_token is None
    assert model.config.encoder == "ViT-B/32"
    told["warp"] = 9
    (tmp_path / "mine.json").write_text(json.dumps({"model": told}))
    with pytest.raises(UserError, match="warp"):
        load_checkpoint(tmp_path / "mine.pt")


def test_published_gpt2_widths_need_no_telling(tmp_path, languages):
    for width, heads, layers, name in ((768, 12, 12, "gpt2"), (768, 12, 6, "distilgpt2"), (1024, 16, 24, "gpt2-medium"),
                                       (1280, 20, 36, "gpt2-large"), (1600, 25, 48, "gpt2-xl")):  # fmt: skip
        shapes = weight_files.under("gpt.", weight_files.gpt2_shapes(width, layers, 5, 4))
        shapes |= weight_files.under("clip_project.", weight_files.mapper_shapes("mlp", 512, width, 10))
        state = {key: torch.empty(1).expand(shape) for key, shape in shapes.items()}
        from models.published.recognise import recognise

        config = recognise(state, "file.pt").config
        assert (config.gpt2_type, config.gpt_config["n_head"], config.gpt_config["n_layer"]) == (name, heads, layers)
        assert (config.prefix_length, config.encoder) == (10, "ViT-B/32")


def test_two_adapters_or_half_of_one_are_refused(tmp_path, languages):
    folders, tokenizer = languages
    state, facts = weight_files.random_file("lora", 2, len(tokenizer), STOP)
    key = next(name for name in state if "lora_A" in name)
    torch.save({**state, key.replace("default", "other"): state[key]}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="several adapters"):
        load_checkpoint(tmp_path / "two.pt", gpt2_type=str(folders[facts.width]))
