"""A prompt between prefix and caption: filled with the base captioner's words, of any length, saved and loaded with its base."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import tiny
from benchmarks import published
from common import UserError
from features.tokens import tokenize_prompted
from models.base_captioner import BaseCaptioner
from models.captioner import ClipCaptionModel
from models.checkpoints import config_path, load_checkpoint, save_checkpoint, save_config
from models.config import CaptionConfig
from models.decoding import generate
from models.prompts import encode_prompts

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, WIDTH, CLIP_WIDTH = 23, 16, 6
TOKENIZER = tiny.word_tokenizer(VOCABULARY)


def random_captioner(seed, **fields):
    """A captioner of random float64 weights over a word tokenizer; its caption ends at t13, made likely."""
    gpt = tiny.random_gpt2(VOCABULARY, WIDTH, layers=1, heads=2, positions=128, scale=0.5, seed=seed)
    row = gpt.transformer.wte.weight[13]
    gpt.transformer.ln_f.bias.data += 2 * (row / row.norm()).detach()
    config = CaptionConfig(encoder=None, clip_width=CLIP_WIDTH, prefix_length=2, stop_token="t13", **fields)
    model = ClipCaptionModel(config, gpt, TOKENIZER).double().eval()
    with torch.no_grad():
        for parameter in model.clip_project.parameters():
            parameter.normal_(0, 0.6, generator=torch.Generator().manual_seed(seed))
    return model


def embeddings(count, seed=0):
    return torch.randn(count, CLIP_WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def test_prompts_of_different_lengths_in_a_batch_decode_as_each_alone():
    lengths, differing = set(), 0
    for seed in range(8):
        model = random_captioner(seed, prompt="t1 t2 {base} t3")
        model.base_captioner = BaseCaptioner(random_captioner(seed + 100))
        pictures = embeddings(4, seed)
        found = generate(model, pictures, beam_size=3, entry_length=5)
        bare = copy.copy(model)
        bare.config = dataclasses.replace(model.config, prompt=None)
        differing += generate(bare, pictures, beam_size=3, entry_length=5) != found
        for row, one in enumerate(pictures):
            with torch.no_grad():
                prefix, base_prefix = (m.clip_project(one[None]).view(1, 2, WIDTH) for m in (model, model.base_captioner.model))
                tokens, _ = published.greedy_search(model.base_captioner.model.gpt, base_prefix, 67, 1.0, 13)
                words = tokens[:-1] if tokens[-1] == VOCABULARY - 1 else tokens
                prompt = torch.tensor([1, 2, *words, 3])
                start = torch.cat([prefix, model.gpt.transformer.wte(prompt)[None]], dim=1)
                (tokens, score), *_ = published.beam_search(model.gpt, start, 3, 5, 1.0, 13)
            lengths.add(len(prompt))
            text = TOKENIZER.decode(tokens[:-1] if tokens[-1] == VOCABULARY - 1 else tokens)
            assert found[row] == [(text, pytest.approx(score, abs=1e-9))]
    assert len(lengths) > 5
    assert differing >= 6


def test_sampling_with_prompts_does_not_depend_on_the_other_images():
    model = random_captioner(3, prompt="t1 {base}")
    model.base_captioner = BaseCaptioner(random_captioner(103))
    pictures = embeddings(5)
    together = generate(model, pictures, "sample", temperature=2.0, seed=4, entry_length=6)
    alone = [generate(model, pictures[row : row + 1], "sample", temperature=2.0, seed=4 + row, entry_length=6)[0] for row in range(5)]
    assert [text for [(text, _)] in together] == [text for [(text, _)] in alone]


def test_a_prompt_without_a_base_is_the_same_for_every_image():
    model = random_captioner(1, prompt="t4 t5 t6")
    assert encode_prompts(model, embeddings(2)) == [[4, 5, 6], [4, 5, 6]]
    model.config.prompt = "t4 {base}"
    with pytest.raises(UserError, match="holds none"):
        generate(model, embeddings(1))


def test_a_prompt_that_leaves_no_room_is_one_line():
    model = random_captioner(1, prompt="t1 " * 140)
    with pytest.raises(UserError, match="142 tokens, do not fit the language model's 128 positions"):
        generate(model, embeddings(1))


def test_the_base_is_neither_trained_nor_counted_but_is_saved(tmp_path):
    from models.weights import load_language_model, load_tokenizer

    language = str(tiny.save_gpt2(tmp_path / "gpt2", width=32, layers=1, positions=512))

    def build(seed, **fields):
        torch.manual_seed(seed)
        gpt = load_language_model(language)
        config = CaptionConfig("ViT-B/32", 8, prefix_length=2, gpt2_type=language, gpt_config=gpt.config.to_diff_dict(), **fields)
        return ClipCaptionModel(config, gpt, load_tokenizer(language)).eval()

    base = build(1)
    model = build(2, prompt=" is a picture of {base} and", base=dataclasses.asdict(base.config), tune="mapper")
    names = set(model.state_dict())
    model.base_captioner = BaseCaptioner(base)
    model.train()
    assert not base.training
    assert not {id(p) for p in base.parameters()} & {id(p) for p in model.parameters()}
    model.eval()
    assert set(model.state_dict()) == names
    save_checkpoint(model, tmp_path / "run-000.pt")
    save_config(model.config, {}, config_path(tmp_path / "run-000.pt"))
    loaded = load_checkpoint(tmp_path / "run-000.pt")
    pictures = torch.randn(3, 8)
    assert generate(loaded, pictures, entry_length=6) == generate(model, pictures, entry_length=6)
    alone = [one[0][0].strip() for one in generate(base, pictures, "greedy")]
    assert loaded.base_captioner.caption(pictures, batch_size=2) == alone


def test_the_base_moves_to_the_embeddings_it_captions():
    base = random_captioner(1)
    moves = []
    base.to = moves.append
    BaseCaptioner(base).caption(embeddings(2))
    assert moves == [torch.device("cpu")]


@pytest.mark.parametrize("prompt", ["I say ", "I say\n", "I say", "I say: ", " a b  "])
@pytest.mark.parametrize("joins", [True, False])
def test_the_prompt_is_tokenized_for_captioning_as_for_training(prompt, joins):
    """Also where the tokenizer joins no space with the caption's first letter, and where the prompt ends in a line break."""
    tokenizer = tiny.train_tokenizer(["I say A dog. A"] * 9 if joins else ["A dog."], 300)
    assert len(tokenizer.encode(" A")) == (1 if joins else 2)
    model = SimpleNamespace(config=SimpleNamespace(prompt=prompt), base_captioner=None, datastore=None, tokenizer=tokenizer)
    _, prompts = tokenize_prompted(["A dog."], [prompt], [0], tokenizer)
    assert encode_prompts(model, embeddings(1)) == [prompts[0].tolist()]
