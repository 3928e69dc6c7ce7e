"""What each way of tuning trains, saves and loads; the optimiser's options; several embeddings an image."""

import json
import re

import pytest
import torch

import tiny
from helpers import captioner
from helpers import train_tiny as run
from interrupted import dies_at_save
from models.captioner import ClipCaptionModel
from models.checkpoints import load_checkpoint
from models.decoding import generate
from models.operators import accelerate_model
from models.weights import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")
TUNINGS = ("full", "mapper", "ends", "head", "lora")
STYLES = ("gpt2", "opt", "llama", "qwen2")
# What of the language model each tuning trains, as patterns of names; GPT-2's output layer is its token table.
ENDS = {
    "gpt2": r"gpt\.transformer\.(wte|wpe|ln_f|h\.0|h\.3)\.",
    "opt": r"gpt\.model\.decoder\.(embed_tokens|embed_positions|project_in|project_out|final_layer_norm|layers\.0|layers\.3)\.",
    "llama": r"gpt\.model\.(embed_tokens|norm|layers\.0|layers\.3)\.",
    "qwen2": r"gpt\.model\.(embed_tokens|norm|layers\.0|layers\.3)\.",
}
TRAINED = {"full": r"gpt\.", "mapper": r"$.", "head": r"gpt\.lm_head\.", "lora": r"gpt\..*\.lora_[AB]\."}


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """A folder with a small random language model of each style."""
    folder = tmp_path_factory.mktemp("styles")
    for style in STYLES:
        tiny.save_language_model(folder / style, style)
    return folder


@pytest.fixture
def data(workdir):
    """A published feature file of 6 images and 16 captions in the working directory."""
    captions = [[tiny.CAPTIONS[(row + number) % 8] for number in range(1 + row % 4)] for row in range(6)]
    tiny.save_published_features(workdir / "train.pkl", captions, width=32)
    return workdir


def weights(path):
    return torch.load(path, weights_only=True)


def losses(prefix):
    return [json.loads(line)["loss"] for line in open(f"out/{prefix}_metrics.jsonl")]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tune", TUNINGS)
def test_exactly_the_named_tensors_change_and_loading_gives_the_same_captions(data, language_models, style, tune, monkeypatch):
    models, before = [], []
    build_one = ClipCaptionModel.train

    def remember(self, mode=True):
        if mode and not models:
            models.append(self)
            before.append({name: parameter.detach().clone() for name, parameter in self.named_parameters()})
        return build_one(self, mode)

    monkeypatch.setattr(ClipCaptionModel, "train", remember)
    run(language_models / style, "--tune", tune, "--max_steps", 2)
    model = models[0]
    pattern = re.compile("clip_project|" + (ENDS[style] if tune == "ends" else TRAINED[tune]))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[0][name])}
    named = {name for name in before[0] if pattern.match(name)}
    # OPT's keys have a bias that a softmax takes no notice of: its gradient is rounding, or nothing.
    certain = {name for name in named if not name.endswith("k_proj.bias")}
    assert certain <= changed <= named
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == named
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in named)

    saved = weights("out/coco_prefix-000.pt")
    if tune != "full":
        assert {name for name in saved} == named, "a checkpoint holds what was trained, and nothing else"
    assert json.loads(open("out/coco_prefix.json").read())["model"]["tune"] == tune
    embeddings = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = generate(model, embeddings, entry_length=6)
    loaded = accelerate_model(load_checkpoint("out/coco_prefix-000.pt"))  # as the trained one is
    assert generate(loaded, embeddings, entry_length=6) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_full_lora_checkpoint_is_merged_and_has_published_names(data, language_models, style):
    run(language_models / style, "--tune", "lora", "--max_steps", 3, "--lr", "1e-2", "--prefix", "apart")
    run(language_models / style, "--tune", "lora", "--max_steps", 3, "--lr", "1e-2", "--prefix", "merged", "--save_full")
    apart, merged = load_checkpoint("out/apart-000.pt"), load_checkpoint("out/merged-000.pt")
    names = {f"gpt.{name}" for name in load_language_model(str(language_models / style)).state_dict()}
    assert {name for name in weights("out/merged-000.pt") if name.startswith("gpt.")} == names
    embeddings = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    for (text, score), (other, its_score) in zip(*(sum(generate(m, embeddings, entry_length=6), []) for m in (apart, merged))):
        assert text == other
        assert score == pytest.approx(its_score, abs=1e-4)
    plain = load_language_model(str(language_models / style)).state_dict()
    moved = [name for name, tensor in plain.items() if not torch.equal(tensor, merged.gpt.state_dict()[name])]
    assert moved
    assert not any("embed" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("tune", ["ends", "head", "lora"])
def test_a_resumed_run_ends_in_the_same_bits(data, language_models, tune):
    words = ["--tune", tune, "--epochs", 2, "--save_steps", 1, "--weight_decay", 0.01, "--mapper_lr", "1e-4", "--clip_grad", 1]
    run(language_models / "gpt2", *words, "--prefix", "whole")
    with dies_at_save(2), pytest.raises(SystemExit):
        run(language_models / "gpt2", *words, "--prefix", "halves")
    run(language_models / "gpt2", *words, "--prefix", "halves", "--resume")
    one, two = weights("out/whole-001.pt"), weights("out/halves-001.pt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_options_that_shape_the_result_are_part_of_what_a_run_is(data, language_models, capsys):
    run(language_models / "gpt2", "--tune", "lora", "--max_steps", 1)
    for words, named in (
        (["--lora_rank", 2], "'rank': 2"),
        (["--weight_decay", 0.1], "weight_decay 0.0 (now 0.1)"),
        (["--accumulate", 2], "accumulate 1 (now 2)"),
    ):
        run(language_models / "gpt2", "--tune", "lora", "--max_steps", 1, "--resume", *words, code=2)
        assert named in capsys.readouterr().err


@pytest.mark.parametrize("tune", TUNINGS)
def test_what_has_no_trained_parameters_has_no_dropout(language_models, tune):
    model = captioner(language_models / "gpt2", tune=tune).train()
    blocks = [block.training for block in model.gpt.transformer.h]
    expected = {"full": [True] * 4, "ends": [True, False, False, True]}.get(tune, [False] * 4)
    assert blocks == expected
    assert model.clip_project.training
    assert model.gpt.transformer.h[1].attn.attn_dropout.training == expected[1]
    adapters = [module.training for name, module in model.gpt.named_modules() if ".lora_dropout" in name]
    assert all(adapters)
    assert bool(adapters) == (tune == "lora")
    assert not any(module.training for module in model.eval().modules())


def test_a_frozen_mapper_is_kept_and_saved(data, language_models):
    run(language_models / "gpt2", "--max_steps", 0, "--prefix", "start", "--tune", "mapper")
    run(language_models / "gpt2", "--max_steps", 2, "--tune", "lora", "--freeze_mapper", "--init_from", "out/start-000.pt")
    start, end = weights("out/start-000.pt"), weights("out/coco_prefix-000.pt")
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())
    assert any(".lora_" in name for name in end)


@pytest.mark.parametrize("tune", ["ends", "head", "lora"])
def test_a_start_from_another_language_model_is_saved_whole(data, language_models, tune, capsys):
    """The checkpoint's language model is not the folder's: without it the trained part would be worth nothing."""
    tiny.save_language_model(data / "other", "gpt2", seed=5)
    run(language_models / "gpt2", "--max_steps", 2, "--prefix", "start")
    run(data / "other", "--max_steps", 2, "--tune", tune, "--init_from", "out/start-000.pt")
    assert "--save_full" in capsys.readouterr().out
    start, end = weights("out/start-000.pt"), load_checkpoint("out/coco_prefix-000.pt").state_dict()
    assert torch.equal(start["gpt.transformer.h.1.ln_1.weight"], end["gpt.transformer.h.1.ln_1.weight"])


@pytest.mark.parametrize("words, message", [
    (["--only_prefix", "--tune", "lora"], "--only_prefix is --tune mapper"),
    (["--tune", "mapper", "--freeze_mapper"], "leaves nothing to train"),
    (["--lora_rank", "4"], "--lora_rank without --tune lora"),
    (["--tune", "lora", "--lora_rank", "0"], "--lora_rank is 0; expected at least 1"),
    (["--tune", "lora", "--lora_targets", "q_proj,c_attn"], "no layer q_proj"),
    (["--tune", "some"], "invalid choice: 'some'"),
    (["--warmup_ratio", "0.1", "--warmup_steps=5"], "give one"),
    (["--warmup_ratio", "2"], "--warmup_ratio is 2.0"),
    (["--clip_grad", "0"], "--clip_grad is 0.0"),
    (["--accumulate", "0"], "--accumulate is 0"),
    (["--mapper_lr", "2"], "--mapper_lr is 2.0"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(data, language_models, capsys, words, message):
    run(language_models / "gpt2", *words, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (data / "out").exists()


def test_the_options_name_the_ways_of_tuning_that_there_are():
    from models import tuning

    assert tuple(tuning.TUNINGS) == TUNINGS


def test_a_checkpoint_without_what_was_trained_is_refused(data, language_models):
    from common import UserError

    run(language_models / "gpt2", "--tune", "head", "--max_steps", 0)
    state = weights("out/coco_prefix-000.pt")
    torch.save({name: tensor for name, tensor in state.items() if "lm_head" not in name}, "out/coco_prefix-000.pt")
    with pytest.raises(UserError, match=r"missing gpt\.lm_head\.weight"):
        load_checkpoint("out/coco_prefix-000.pt")


def test_adapters_are_no_start_for_another_tuning(data, language_models, capsys):
    run(language_models / "gpt2", "--tune", "lora", "--max_steps", 0, "--prefix", "start")
    run(language_models / "gpt2", "--tune", "lora", "--max_steps", 0, "--init_from", "out/start-000.pt", "--seed", 3)
    one, two = weights("out/start-000.pt"), weights("out/coco_prefix-000.pt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    run(language_models / "gpt2", "--max_steps", 0, "--init_from", "out/start-000.pt", code=2)
    assert "holds adapters" in capsys.readouterr().err
