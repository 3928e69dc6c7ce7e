"""Any causal language model: packed or not, cached or not, the same losses and captions; names, folders and tokenizers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import predict
import tiny
import train
from common import UserError
from helpers import captioner
from models.checkpoints import load_checkpoint
from models.decoding import generate
from models.weights import load_language_model, load_language_model_config, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PACKED = ("gpt2", "opt", "llama", "qwen2", "qwen3")
UNPACKED = ("gpt_neo", "mpt", "bloom")
P, CLIP_WIDTH = 4, 32


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """A folder with a small random language model of each family."""
    folder = tmp_path_factory.mktemp("families")
    for family in (*PACKED, *UNPACKED):
        tiny.save_language_model(folder / family, family)
    return folder


def build(folder, **more):
    return captioner(folder, seed=0, clip_width=CLIP_WIDTH, prefix_length=P, **more).eval()


def caption_data(model, captions_an_image=4, images=6):
    from features.packing import tokenize_captions
    from features.store import Features
    from training.data import CaptionData

    texts = [tiny.CAPTIONS[(row + number) % 8] for row in range(images) for number in range(captions_an_image)]
    rows = torch.arange(images).repeat_interleave(captions_an_image).numpy()
    embeddings = torch.randn(images, CLIP_WIDTH, generator=torch.Generator().manual_seed(2))
    captions = [{"image_id": row, "caption": text, "id": row, "clip_embedding": int(row)} for row, text in zip(rows, texts)]
    tokens = tokenize_captions(texts, model.tokenizer, model.tokenizer.eos_token_id)
    return CaptionData(Features(embeddings, captions, {}), tokens, rows, P)


def plain_loss(model, data, numbers):
    """Sum of cross-entropies, one caption at a time through the whole language model, no mask and no padding."""
    total = 0.0
    for number in numbers:
        ids = torch.from_numpy(data.tokens[number].astype("int64"))
        row = int(data.caption_rows[number])
        prefix = model.encode_prefix(data.features.clip_embedding[row : row + 1])
        embeds = torch.cat([prefix, model.gpt.get_input_embeddings()(ids[None])], dim=1)
        total = total + F.cross_entropy(model.gpt(inputs_embeds=embeds).logits[0, P - 1 : -1], ids, reduction="sum")
    return total


@pytest.mark.parametrize("family", (*PACKED, *UNPACKED))
def test_losses_and_gradients_equal_those_of_one_caption_at_a_time(language_models, family):
    from training.batches import takes_packed_rows

    model = build(language_models / family)
    data = caption_data(model)
    said = []
    data = dataclasses.replace(data, packed=takes_packed_rows(model, data, 40, said.append))
    assert data.packed == (family in PACKED)
    assert bool(said) != data.packed
    numbers = [0, 3, 5, 6, 9, 23]
    found, expected = model(data.pack(numbers)), plain_loss(model, data, numbers)
    tokens = sum(len(data.tokens[number]) for number in numbers)
    assert (found / tokens).item() == pytest.approx((expected / tokens).item(), abs=1e-5)
    gradients = []
    for loss in (found, expected):
        model.zero_grad()
        (loss / tokens).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name in gradients[1]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=2e-5, msg=lambda text: f"{name}: {text}")


def test_the_probe_looks_as_far_as_rows_are_long(language_models):
    """GPT-Neo's local window counts slots, not positions: wrong only in rows longer than the window."""
    from training.batches import takes_packed_rows

    model = build(language_models / "gpt_neo")
    short = caption_data(model, captions_an_image=1, images=1)
    assert takes_packed_rows(model, short, 40, print)
    said = []
    assert not takes_packed_rows(model, caption_data(model), 40, said.append)
    assert "GPTNeoForCausalLM does not take packed rows" in said[0]
    assert "one caption per row" in said[0]


@pytest.mark.parametrize("family", (*PACKED, *UNPACKED))
def test_training_and_prediction_run_from_names_alone(workdir, language_models, family, capsys):
    captions = [[tiny.CAPTIONS[(row + number) % 8] for number in range(4)] for row in range(6)]
    tiny.save_published_features(workdir / "train.pkl", captions, width=CLIP_WIDTH)
    words = "--data train.pkl --out_dir out --device cpu --prefix_length 4 --bs 24 --warmup_steps 1 --lr 3e-3 --epochs 4"
    assert train.main([*words.split(), "--mixed_precision", "no", "--language_model", str(language_models / family)]) == 0
    assert ("does not take packed rows" in capsys.readouterr().out) == (family in UNPACKED)
    assert predict.main(["-C", "out/coco_prefix-003.pt", "--data", "train.pkl", "--entry_length", "6", "--device", "cpu"]) == 0


@pytest.mark.parametrize("family", (*PACKED, *UNPACKED))
def test_cached_greedy_decoding_is_the_argmax_of_whole_forward_passes(language_models, family):
    model = build(language_models / family)
    embeddings = torch.randn(3, CLIP_WIDTH, generator=torch.Generator().manual_seed(4))
    texts = [captions[0][0] for captions in generate(model, embeddings, decoding="greedy", entry_length=9)]
    for row, text in enumerate(texts):
        ids, embeds = [], model.encode_prefix(embeddings[row : row + 1])
        with torch.no_grad():
            for _ in range(9):
                ids.append(int(model.gpt(inputs_embeds=embeds).logits[0, -1].argmax()))
                if ids[-1] == model.stop_token_id:
                    ids.pop()
                    break
                embeds = torch.cat([embeds, model.gpt.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
        assert text == model.tokenizer.decode(ids)


@pytest.mark.parametrize("family", PACKED)
def test_beams_found_with_a_cache_have_the_scores_of_a_whole_forward_pass(language_models, family):
    model = build(language_models / family)
    embedding = torch.randn(1, CLIP_WIDTH, generator=torch.Generator().manual_seed(5))
    for text, score in generate(model, embedding, beam_size=3, num_captions=3, entry_length=5)[0]:
        ids = model.tokenizer.encode(text)
        if len(ids) != 5 or model.tokenizer.decode(ids) != text:
            continue  # ended early, or bytes that are not text: the tokens cannot be read off it
        embeds = torch.cat([model.encode_prefix(embedding), model.gpt.get_input_embeddings()(torch.tensor([ids]))], dim=1)
        log_probs = model.gpt(inputs_embeds=embeds).logits[0, P - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(log_probs[range(5), ids].mean().item(), abs=1e-4)


def test_a_sliding_window_shorter_than_a_caption_is_kept(language_models, tmp_path):
    """A mask of packed rows would set the window aside: such a model is trained unpacked."""
    from training.batches import takes_packed_rows

    tiny.FAMILIES["mistral"] = {"sliding_window": 6}
    model = build(tiny.save_language_model(tmp_path / "mistral", "mistral"))
    data = caption_data(model)
    data = dataclasses.replace(data, packed=takes_packed_rows(model, data, 40, print))
    assert not data.packed
    assert model(data.pack([0, 1])).item() == pytest.approx(plain_loss(model, data, [0, 1]).item(), rel=1e-5)


def test_a_tokenizer_that_adds_a_beginning_adds_none_here_and_its_end_is_learned(workdir, language_models):
    from tokenizers.processors import TemplateProcessing

    model = build(language_models / "llama")
    tokenizer = model.tokenizer
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", pair="! $A $B", special_tokens=[("!", 0)])
    assert tokenizer("a dog")["input_ids"][0] == 0
    data = caption_data(model)
    assert all(ids[0] != 0 and ids[-1] == end for ids in map(data.tokens.__getitem__, range(len(data.tokens))))


def test_a_tokenizer_without_an_end_wants_a_stop_token(workdir, language_models, capsys):
    import shutil

    from transformers import PreTrainedTokenizerFast

    folder = workdir / "endless"
    shutil.copytree(language_models / "llama", folder)
    for path in folder.glob("*token*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tiny.train_tokenizer().backend_tokenizer).save_pretrained(folder)
    tiny.save_published_features(workdir / "train.pkl", [["A cat."], ["A dog."]], width=CLIP_WIDTH)
    words = ["--data", "train.pkl", "--out_dir", "out", "--device", "cpu", "--gpt2_type", str(folder), "--epochs", "1"]
    with pytest.raises(SystemExit):
        train.main(words)
    assert "no end-of-text token" in capsys.readouterr().err
    assert train.main([*words, "--stop_token", "."]) == 0
    model = load_checkpoint("out/coco_prefix-000.pt")
    assert generate(model, torch.randn(1, CLIP_WIDTH), entry_length=5)


def test_a_tokenizer_of_another_language_model_is_named(workdir, language_models, capsys):
    folder = workdir / "small"
    tokenizer, model = tiny.train_tokenizer(), tiny.random_gpt2(50)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.save_published_features(workdir / "train.pkl", [["A cat."], ["A dog."]], width=CLIP_WIDTH)
    with pytest.raises(SystemExit):
        train.main(["--data", "train.pkl", "--out_dir", "out", "--device", "cpu", "--gpt2_type", str(folder)])
    assert "the language model knows 50" in capsys.readouterr().err


@pytest.mark.parametrize("load, kind", [(load_language_model, "AutoModelForCausalLM"), (load_tokenizer, "AutoTokenizer"),
                                        (load_language_model_config, "AutoConfig")])  # fmt: skip
def test_code_in_a_folder_is_never_run_whatever_is_answered(workdir, language_models, monkeypatch, load, kind):
    shutil.copytree(language_models / "gpt2", "coded")
    Path("coded/own.py").write_text("import os\nos.mkdir('was_run')\nclass Own: pass\n")
    automatic = {kind: ["own.Own", "own.Own"] if kind == "AutoTokenizer" else "own.Own", "AutoConfig": "own.Own"}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads(Path("coded", name).read_text())
        content |= {"model_type": "own", "tokenizer_class": "Own", "auto_map": automatic}
        Path("coded", name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(UserError, match="code of its own, which is never run"):
        load("./coded")
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    "name, address", [("distilgpt2", "/distilbert/distilgpt2 "), ("gpt2", "/openai-community/gpt2 "), ("a/b", "/a/b ")]
)
def test_missing_weights_name_their_address(workdir, name, address):
    with pytest.raises(UserError) as missing:
        load_language_model(name)
    assert address in str(missing.value)
    assert f"data/weights/{name}/" in str(missing.value)
