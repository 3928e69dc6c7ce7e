"""Prompted training: what is read, what is predicted, what is decoded once and kept, what is saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.activations import NewGELUActivation

import helpers
import tiny
import train
from features.store import load_features
from features.tokens import tokenize_prompted
from interrupted import dies_at_save
from models.captioner import ClipCaptionModel, fill_prompt
from models.checkpoints import load_checkpoint
from models.config import CaptionConfig
from prediction.loading import load_captioner

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = " is a picture of {base} and a post would say "
P, CLIP_WIDTH = 4, 32
TOKENIZER = tiny.train_tokenizer()
END = TOKENIZER.eos_token_id
GPT = tiny.random_gpt2(len(TOKENIZER), positions=128, scale=0.2)


def build():
    torch.manual_seed(1)
    return ClipCaptionModel(CaptionConfig("ViT-B/32", CLIP_WIDTH, prefix_length=P, prompt=PROMPT), GPT, TOKENIZER).eval()


def caption_data(texts, rows, prompts, **more):
    from features.store import Features
    from training.data import CaptionData

    tokens, prompt_tokens = tokenize_prompted(texts, prompts, rows, TOKENIZER, END)
    embeddings = torch.randn(len(prompts), CLIP_WIDTH, generator=torch.Generator().manual_seed(2))
    captions = [{"image_id": row, "caption": text, "id": row, "clip_embedding": row} for row, text in zip(rows, texts)]
    return CaptionData(Features(embeddings, captions, {}), tokens, np.array(rows), P, prompts=prompt_tokens, **more)


def plain_loss(model, data, texts, rows, prompts):
    """Each caption on its own: prompt and caption as one string, the loss over the tokens that reach into the caption."""
    total, count = 0.0, 0
    for text, row in zip(texts, rows):
        encoded = TOKENIZER(prompts[row] + text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([*encoded["input_ids"], END])
        head = sum(end <= len(prompts[row]) for _, end in encoded["offset_mapping"])
        prefix = model.encode_prefix(data.features.clip_embedding[row : row + 1])
        embeds = torch.cat([prefix, model.gpt.get_input_embeddings()(ids[None])], dim=1)
        logits = model.gpt(inputs_embeds=embeds).logits[0, P - 1 : -1]
        total = total + F.cross_entropy(logits[head:], ids[head:], reduction="sum")
        count += len(ids) - head
    return total, count


texts_of_all_kinds = st.sampled_from([*tiny.CAPTIONS, "a cat", " a  cat", "9 lives", "é", "."])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), texts_of_all_kinds), min_size=1, max_size=8),
    prompt=st.sampled_from([PROMPT, "Caption:", "say:\n", " a b  ", "{base}"]),
    packed=st.booleans(),
)
@example(pairs=[(0, "a cat"), (1, "9 lives"), (0, " a  cat")], prompt=PROMPT, packed=True)
def test_the_loss_counts_the_captions_tokens_and_nothing_else(pairs, prompt, packed):
    rows, texts = [row for row, _ in pairs], [text for _, text in pairs]
    prompts = [fill_prompt(prompt, tiny.CAPTIONS[-row]) for row in range(4)]
    model = build()
    data = caption_data(texts, rows, prompts, packed=packed)
    batch = data.pack(np.arange(len(texts)))
    expected, count = plain_loss(model, data, texts, rows, prompts)
    assert len(batch.labels) == count
    assert (model(batch) / count).item() == pytest.approx((expected / count).item(), abs=1e-5)
    if packed:
        assert len(batch.prefix_slots) == P * len(set(rows)), "an image's captions share its prefix"


def test_a_space_at_the_prompts_end_belongs_to_the_captions_first_word():
    tokens, prompts = tokenize_prompted(["a cat."], ["I say "], [0], TOKENIZER)
    assert TOKENIZER.decode(prompts[0]) == "I say"
    assert tokens[0].tolist() == TOKENIZER.encode(" a cat.")
    assert tokens.skip is None


def test_what_differs_of_the_prompt_is_read_with_its_caption_and_not_predicted():
    texts = ["a cat.", " two"]  # before " two" the prompt's last space is a token of its own
    tokens, prompts = tokenize_prompted(texts, ["I say "], [0, 0], TOKENIZER)
    assert TOKENIZER.decode(prompts[0]) == "I say"
    assert tokens.skip.tolist() == [0, 1]
    assert TOKENIZER.decode(tokens[1]) == "  two"


def test_long_captions_lose_their_end_and_a_prompt_without_room_is_named():
    from common import UserError

    tokens, prompts = tokenize_prompted(["A cat on a mat.", "A"], ["I say "], [0, 0], TOKENIZER, END, most_tokens=8)
    assert len(prompts[0]) + len(tokens[0]) == 8
    assert tokens[0][-1] == END
    assert tokens.cut == 1
    with pytest.raises(UserError, match="leaves no room"):
        tokenize_prompted(["A"], ["I say " * 9], [0], TOKENIZER, END, most_tokens=8)


def test_the_probe_sees_packed_prompts_as_plain_ones():
    from training.batches import takes_packed_rows

    rows = [row for row in range(4) for _ in range(3)]
    texts = [(" two", "a cat.", "dogs")[n % 3] for n in range(12)]
    assert takes_packed_rows(build(), caption_data(texts, rows, [fill_prompt(PROMPT, text) for text in tiny.CAPTIONS[:4]]), 12, print)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """As everywhere, but with room for what a hardly trained base model has to say."""
    return tiny.save_gpt2(tmp_path_factory.mktemp("roomy") / "gpt2", positions=512)


@pytest.fixture
def data(workdir, tiny_gpt2):
    """Features of 5 images, and a base model trained on them a little."""
    captions = [[tiny.CAPTIONS[(row + number) % 8] for number in range(2)] for row in range(5)]
    tiny.save_published_features(workdir / "train.pkl", captions, width=CLIP_WIDTH)
    run(tiny_gpt2, "--prefix", "base", "--epochs", 4)
    return workdir


def run(tiny_gpt2, *more, code=0):
    words = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", tiny_gpt2, "--device", "cpu", "--prefix_length", P]
    words += ["--bs", 5, "--warmup_steps", 0, "--lr", "3e-3", "--log_every", 1, "--mixed_precision", "no", *more]
    helpers.call(train.main, words, code)


PROMPTED = ["--prompt", PROMPT, "--base_checkpoint", "out/base-003.pt"]


def test_base_captions_are_decoded_once_and_made_again_for_another_base(data, tiny_gpt2, monkeypatch):
    from models import base_captioner

    run(tiny_gpt2, *PROMPTED, "--max_steps", 2)
    kept = list(data.glob("train.base-*.jsonl"))
    lines = [json.loads(line) for line in kept[0].read_text().splitlines()]
    base = load_checkpoint("out/base-003.pt")
    expected = [found[0][0].strip() for found in base_captioner.generate(base, load_features("train.pkl").clip_embedding, "greedy")]
    assert len(kept) == 1
    assert [line["caption"] for line in lines] == expected

    calls, generate = [], base_captioner.generate
    monkeypatch.setattr(base_captioner, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    run(tiny_gpt2, *PROMPTED, "--max_steps", 2)
    assert not calls
    run(tiny_gpt2, "--prompt", PROMPT, "--base_checkpoint", "out/base-000.pt", "--max_steps", 1)
    assert calls
    assert len(list(data.glob("train.base-*.jsonl"))) == 2
    kept[0].write_text("not json")
    run(tiny_gpt2, *PROMPTED, "--max_steps", 1, code=2)


@pytest.mark.parametrize("base_tune", ["full", "mapper"])
def test_a_prompted_checkpoint_holds_its_base_and_follows_what_it_says(data, tiny_gpt2, base_tune):
    shutil.rmtree("out", ignore_errors=True)
    run(tiny_gpt2, "--prefix", "base", "--epochs", 4, "--tune", base_tune)
    run(tiny_gpt2, *PROMPTED, "--epochs", 2, "--val_data", "train.pkl")
    losses = [json.loads(line).get("loss") for line in open("out/coco_prefix_metrics.jsonl")]
    assert [loss for loss in losses if loss][-1] < losses[0]
    state = torch.load("out/coco_prefix-001.pt", weights_only=True)
    assert any(name.startswith("original_model.gpt.") for name in state) == (base_tune == "full")
    base = load_checkpoint("out/base-003.pt")
    for path in [*data.glob("out/base*.pt"), *data.glob("out/base*.json")]:
        path.unlink()
    model = load_checkpoint("out/coco_prefix-001.pt")
    assert model.config.prompt == PROMPT
    assert model.config.base["prefix_length"] == P
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, model.base_captioner.model.state_dict()[name]), name
    assert not any("base_captioner" in name for name in model.state_dict())
    fast = load_captioner("out/coco_prefix-001.pt", None, torch.device("cpu"), "no")
    for one in (fast, fast.base_captioner.model):
        assert not any(isinstance(module, NewGELUActivation) for module in one.modules()), "the usual operators"

    def likeliest(base_caption):
        ids = torch.tensor([TOKENIZER.encode(fill_prompt(PROMPT, base_caption).rstrip())])
        embeds = torch.cat([model.encode_prefix(torch.ones(1, CLIP_WIDTH)), model.gpt.get_input_embeddings()(ids)], dim=1)
        return model.gpt(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)

    assert (likeliest("A dog.") - likeliest("Kites at the beach.")).abs().max() > 1e-2


def test_a_prompt_without_base_needs_no_base_model(data, tiny_gpt2):
    run(tiny_gpt2, "--prompt", "Say: ", "--epochs", 1, "--tune", "lora")
    model = load_checkpoint("out/coco_prefix-000.pt")
    assert model.base_captioner is None
    assert model.config.prompt == "Say: "
    assert not list(data.glob("*.jsonl"))


def test_a_prompted_run_resumes_bit_by_bit(data, tiny_gpt2):
    words = [*PROMPTED, "--epochs", 2, "--save_steps", 1]
    run(tiny_gpt2, *words, "--prefix", "whole")
    with dies_at_save(2), pytest.raises(SystemExit):
        run(tiny_gpt2, *words, "--prefix", "halves")
    run(tiny_gpt2, *words, "--prefix", "halves", "--resume")
    one, two = (torch.load(f"out/{name}-001.pt", weights_only=True) for name in ("whole", "halves"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("words, message", [
    (["--prompt", PROMPT], "{base} in --prompt, but no --base_checkpoint"),
    (["--base_checkpoint", "out/base-003.pt"], "no {base} in --prompt"),
    (["--prompt", "  "], "--prompt is empty"),
    (["--prompt", PROMPT, "--base_checkpoint", "no.pt"], "no checkpoint no.pt"),
])  # fmt: skip
def test_a_mistake_is_one_line(data, tiny_gpt2, capsys, words, message):
    capsys.readouterr()
    run(tiny_gpt2, *words, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
