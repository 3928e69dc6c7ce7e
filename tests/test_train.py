"""train.py as its users run it: what it writes, how it resumes, what it says, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
import train
from helpers import error_line
from launched import finish, start
from running import assert_equal_states, run, save_data, state_of
from training.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(workdir):
    return save_data(workdir)


def test_what_a_run_writes(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 3, "--save_every", 2)
    said = capsys.readouterr().out
    names = sorted(path.name for path in data.parent.joinpath("out").iterdir())
    assert names == ["coco_prefix-000.pt", "coco_prefix-002.pt", "coco_prefix.json", "coco_prefix_metrics.jsonl", "coco_prefix_metrics.png",
                     "coco_prefix_state.pt", "coco_prefix_tensorboard"]  # fmt: skip
    lines = [json.loads(line) for line in open("out/coco_prefix_metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert {line["epoch"] for line in lines} == {0, 1, 2}
    assert set(lines[0]) == {"step", "epoch", "loss", "lr", "captions_per_s"}
    assert lines[0]["lr"] == 0
    assert max(line["lr"] for line in lines) == 1e-3
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert Image.open("out/coco_prefix_metrics.png").size[0] > 600
    config = json.loads(open("out/coco_prefix.json").read())
    assert config["model"]["clip_width"] == 32
    assert config["made_by"]["seed"] == 0
    assert config["made_by"]["data"]["digest"]
    assert "trained of" in said
    assert "12 images, 24 captions" in said
    assert "python predict.py --checkpoint out/coco_prefix-002.pt" in said


def test_frozen_checkpoints_hold_the_mapper_only(data, tiny_gpt2):
    run(tiny_gpt2, "--epochs", 1, "--only_prefix", "--mapping_type", "transformer", "--num_layers", 2)
    assert all(name.startswith("clip_project.") for name in state_of("out/coco_prefix-000.pt"))
    run(tiny_gpt2, "--epochs", 1, "--only_prefix", "--save_full", "--prefix", "full")
    assert any(name.startswith("gpt.") for name in state_of("out/full-000.pt"))


def test_two_runs_with_one_seed_are_equal_and_with_two_are_not(data, tiny_gpt2):
    for prefix, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tiny_gpt2, "--epochs", 1, "--prefix", prefix, "--seed", seed)
    a, b, c = (open(f"out/{prefix}-000.pt", "rb").read() for prefix in "abc")
    assert a == b != c


def test_init_from_starts_from_a_checkpoint(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 1)
    run(tiny_gpt2, "--max_steps", 0, "--prefix", "copy", "--init_from", "out/coco_prefix-000.pt", "--seed", 9)
    assert "mapper and language model taken" in capsys.readouterr().out
    assert_equal_states(state_of("out/coco_prefix-000.pt"), state_of("out/copy-000.pt"))
    run(tiny_gpt2, "--max_steps", 0, "--init_from", "out/coco_prefix-000.pt", "--prefix_length", 6, code=2)
    assert "prefix_length 4 where this run has 6: give --prefix_length 4" in capsys.readouterr().err


def test_several_files_are_trained_on_together(data, tiny_gpt2, capsys):
    tiny.save_published_features(data.parent / "more.pkl", [["one more"], ["and another"]], width=32)
    run(tiny_gpt2, "--epochs", 1, data="train.pkl more.pkl")
    assert "14 images, 26 captions" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_named(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 2, "--warmup_steps", 5000)
    said = capsys.readouterr().out
    assert "warm-up of 5,000 steps is longer than the run of 10" in said


def test_long_captions_are_cut_and_empty_ones_dropped_and_both_counted(workdir, tiny_gpt2, capsys):
    tiny.save_published_features(workdir / "train.pkl", [["word " * 300, "  ", "a dog"], ["a cat", ""]], width=32)
    run(tiny_gpt2, "--epochs", 1)
    said = capsys.readouterr().out
    assert "2 empty captions left out" in said
    assert "1 of 3 captions cut to 124 tokens" in said


def test_the_end_of_text_is_learned_by_default_and_not_with_a_full_stop(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--max_steps", 1)
    by_default = capsys.readouterr().out
    run(tiny_gpt2, "--max_steps", 1, "--stop_token", ".", "--prefix", "published")
    as_published = capsys.readouterr().out

    def mean_tokens(said):
        return float(said.split(" captions, ")[1].split(" tokens")[0])

    assert mean_tokens(by_default) == pytest.approx(mean_tokens(as_published) + 1, abs=0.11)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 2, "--mixed_precision", "bf16")
    assert "precision: bf16" in capsys.readouterr().out
    assert {tensor.dtype for tensor in state_of("out/coco_prefix-001.pt").values()} == {torch.float32}
    lines = [json.loads(line) for line in open("out/coco_prefix_metrics.jsonl")]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("words, message", [
    (["--prefix_length", "0"], "--prefix_length is 0; expected at least 1"),
    (["--bs", "0"], "--bs is 0"),
    (["--lr", "-1"], "--lr is -1.0"),
    (["--is_rn"], "--is_rn expects 640-wide embeddings"),
    (["--prefix_length", "500"], "leaves no room"),
    (["--gpt2_type", "no-such-model"], "no language model named no-such-model"),
    (["--init_from", "no.pt"], "no checkpoint no.pt"),
    (["--stop_token", "the end"], "expected one"),
    (["--data", "no.pkl"], "no feature file no.pkl"),
    (["--drop_last", "--bs", "100"], "--drop_last leaves nothing"),
    (["--device", "cuda"], "--device cuda is not available"),
    (["--out_dir", "train.pkl/out"], "cannot write"),
    (["--prefix", "a/b"], "--prefix is 'a/b'"),
    (["--no_such_option"], "unrecognized arguments: --no_such_option"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(data, tiny_gpt2, capsys, words, message):
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = sorted(path.name for path in data.parent.rglob("*"))
    run(tiny_gpt2, *words, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("train.py: error: ")
    assert sorted(path.name for path in data.parent.rglob("*")) == before


def test_a_sharded_model_is_refused_in_one_line(data, tiny_gpt2, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run(tiny_gpt2, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "accelerate is set up for FSDP" in line


def test_processes_that_would_train_apart_are_refused_in_one_line(data, tiny_gpt2, capsys, monkeypatch):
    """As on a machine whose accelerator accelerate cannot share, such as mps."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    words = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2)]
    assert "a launcher started 2 processes, and on cpu each would train for itself" in error_line(train.main, capsys, words)


def test_the_schedule_is_the_published_one():
    """Linear from 0 over the warm-up, then linear to 0, worked out by hand for 4 of 10 steps."""
    rates = [learning_rate(step, 6.0, 4, 10) for step in range(11)]
    assert rates == [0, 1.5, 3, 4.5, 6, 5, 4, 3, 2, 1, 0]
    assert learning_rate(100, 2e-5, 5000, 720) == pytest.approx(100 / 5000 * 2e-5)


VALIDATED = ["--val_data", "train.pkl", "--val_every", "2", "--val_captions", "12"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("more", [VALIDATED, ["--accumulate", "2", "--clip_grad", "0.5", *VALIDATED]])
def test_several_processes_take_the_steps_of_one(data, tiny_gpt2, count, more):
    """Dropout off: several processes and one take the same steps, to rounding: weights, losses and every figure of validation.

    24 captions in batches of 5 leave a last batch of 4, which neither two nor three processes share evenly.
    """
    words = ["--gpt2_dropout", "0", "--max_steps", "6", *more, "--prefix"]
    run(tiny_gpt2, *words, "one")
    command = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", tiny_gpt2, "--device", "cpu", "--prefix_length", 4]
    command += ["--bs", 5, "--warmup_steps", 5, "--lr", "1e-3", "--log_every", 1, "--mixed_precision", "no", *words, "many"]
    codes, _, errors = finish(start(count, "train.py", command))
    assert codes == [0] * count, errors
    one, many = state_of("out/one-001.pt"), state_of("out/many-001.pt")
    for name in one:
        assert torch.allclose(one[name], many[name], atol=1e-5), name
    logs = [[json.loads(line) for line in open(f"out/{name}_metrics.jsonl")] for name in ("one", "many")]
    assert len(logs[0]) == len(logs[1])
    for alone, together in zip(*logs):
        for figures in (alone, together):
            figures.pop("captions_per_s", None)
            figures.pop("val_collapse", None)  # words, with figures that are compared anyway
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    samples = [Path(f"out/{name}_samples.jsonl").read_text() for name in ("one", "many")]
    assert samples[0] == samples[1]
