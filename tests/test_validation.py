"""Validation while training: what is scored, which epoch is the best, what a collapse looks like, and that training never notices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import train
from training.state import BestSoFar
from training.validate import find_collapse, other_images

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = [[f"a picture of {thing} number {i}" for i in range(2)] for thing in ["dogs", "cats", "cars", "boats"] * 2]
FIGURES = {"val_loss", "val_perplexity", "val_gap", "val_cider", "val_captions", "val_distinct", "val_distinct_references", "val_ended"}


@pytest.fixture
def data(workdir):
    """train.pkl, 8 images and 16 captions (four steps an epoch), and val.pkl, 4 images of them."""
    tiny.save_published_features(workdir / "train.pkl", CAPTIONS, width=32)
    tiny.save_published_features(workdir / "val.pkl", CAPTIONS[:4], width=32)
    return workdir


def words(tiny_gpt2, *more):
    options = "--device cpu --prefix_length 4 --bs 4 --warmup_steps 2 --lr 1e-3 --log_every 1 --mixed_precision no --tracker none"
    return ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), *options.split(), *map(str, more)]


def log(prefix="coco_prefix", kind="metrics"):
    return [json.loads(line) for line in open(f"out/{prefix}_{kind}.jsonl")]


def validated(prefix="coco_prefix"):
    return [line for line in log(prefix) if "val_loss" in line]


def events(prefix="coco_prefix"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"out/{prefix}_tensorboard")
    found.Reload()
    return found


def test_every_figure_is_written_and_samples_are_shown(data, tiny_gpt2, capsys):
    assert train.main(words(tiny_gpt2, "--epochs", 2, "--val_data", "val.pkl", "--val_every", 3)) == 0
    said = capsys.readouterr().out
    lines, samples = validated(), log(kind="samples")
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [line["epoch"] for line in lines] == [0, 1, 1]
    assert all(set(line) - {"step", "epoch", "val_collapse"} == FIGURES for line in lines)
    assert {line["step"] for line in samples} == {3, 6, 8}
    assert len(samples) == 12
    assert {"image_id", "reference", "caption", "cider"} < set(samples[0])
    assert samples[0]["reference"] == CAPTIONS[0][0]
    assert "plain tokenizer" in said
    assert "step 3: validation loss" in said
    assert "grounding gap" in said
    assert CAPTIONS[1][0] in said


def test_training_never_notices_validation(data, tiny_gpt2):
    """Dropout on: with and without validation the same bits; stopped twice and resumed, the same again, log and samples included."""
    from training.run_log import RunLog

    more = ("--epochs", 3)
    validating = (*more, "--val_data", "val.pkl", "--val_every", 3, "--best_by", "cider", "--val_captions", 3)
    assert train.main(words(tiny_gpt2, *more, "--prefix", "without")) == 0
    assert train.main(words(tiny_gpt2, *validating, "--prefix", "whole")) == 0
    again = words(tiny_gpt2, *validating, "--prefix", "halves", "--tracker", "tensorboard", "--resume")
    write = RunLog.write
    for last in (7, 10):  # two steps and a validation after the resume points of steps 4 and 8

        def write_then_die(self, step, epoch, lr, last=last):
            line = write(self, step, epoch, lr)
            if step == last:
                raise KeyboardInterrupt
            return line

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(RunLog, "write", write_then_die)
            train.main(again)
    assert [line["step"] for line in validated("halves")] == [3, 6, 9]
    assert train.main(again) == 0
    files = [Path(f"out/{name}-002.pt").read_bytes() for name in ("without", "whole", "halves")]
    assert files[0] == files[1] == files[2]
    assert validated("whole") == validated("halves")
    assert log("whole", "samples") == log("halves", "samples")
    assert Path("out/whole_best.pt").read_bytes() == Path("out/halves_best.pt").read_bytes()
    assert [event.step for event in events("halves").Scalars("training/loss")] == list(range(1, 13))
    assert [event.step for event in events("halves").Scalars("validation/cider")] == [3, 6, 9, 12]


def test_the_draws_of_a_base_captioner_are_not_noticed_either(data, tiny_gpt2):
    """Captioning behind a prompt decodes the base captioner too, which reseeds the generators."""
    assert train.main(words(tiny_gpt2, "--epochs", 2, "--prefix", "base")) == 0
    prompted = ("--max_steps", 5, "--prompt", "Say {base} and", "--base_checkpoint", "out/base-001.pt")
    assert train.main(words(tiny_gpt2, *prompted, "--prefix", "without")) == 0
    assert train.main(words(tiny_gpt2, *prompted, "--prefix", "with", "--val_data", "val.pkl", "--val_every", 2)) == 0
    assert Path("out/with-001.pt").read_bytes() == Path("out/without-001.pt").read_bytes()


@pytest.mark.slow
def test_two_processes_validate_as_one(data, tiny_gpt2):
    import os
    import subprocess
    import sys

    more = ["--gpt2_dropout", "0", "--max_steps", "6", "--val_data", "val.pkl", "--val_every", "4", "--best_by", "cider", "--prefix"]
    assert train.main(words(tiny_gpt2, *more, "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541", train.__file__]
    without_device = " ".join(words(tiny_gpt2, *more, "two")).replace("--device cpu ", "").split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *without_device], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = validated("one"), validated("two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [4, 6]
    for name in ("val_loss", "val_gap", "val_cider", "val_ended"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-5), name


def test_a_validation_due_where_a_run_was_stopped_is_made_up_for(data, tiny_gpt2):
    import os
    import signal

    import training.run_log

    more = ("--epochs", 2, "--val_data", "val.pkl", "--val_every", 3)
    write = training.run_log.RunLog.write

    def stop_after_two(self, step, epoch, lr):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, step, epoch, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run_log.RunLog, "write", stop_after_two)
        assert train.main(words(tiny_gpt2, *more)) == 143
    assert [line["step"] for line in log()] == [1, 2, 3]  # stopped at the step that was to be validated
    assert train.main(words(tiny_gpt2, *more, "--resume")) == 0
    assert [line["step"] for line in validated()] == [3, 6, 8]


def test_the_best_by_cider_is_the_validation_of_highest_cider(data, tiny_gpt2, monkeypatch):
    """The loss falls from epoch to epoch; CIDEr is made to be highest after the second."""
    import evaluation.metrics

    ciders = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(evaluation.metrics, "score_cider", lambda *_: evaluation.metrics.mean_metric(np.full(4, next(ciders))))
    assert train.main(words(tiny_gpt2, "--epochs", 3, "--val_data", "val.pkl", "--best_by", "cider")) == 0
    assert [line["val_cider"] for line in validated()] == [0.1, 0.3, 0.2]
    assert validated()[2]["val_loss"] < validated()[1]["val_loss"]
    assert Path("out/coco_prefix_best.pt").read_bytes() == Path("out/coco_prefix-001.pt").read_bytes()
    keeps = BestSoFar(patience=2, by="cider")
    assert [keeps.update({"val_loss": 1.0, "val_cider": value}, step) for step, value in enumerate((0.1, 0.3, 0.2, 0.3))] == [
        True, True, False, False,
    ]  # fmt: skip
    assert keeps.is_out_of_patience
    assert BestSoFar(2, **keeps.as_dict()).as_dict() == keeps.as_dict()


def test_a_model_that_passes_over_its_prefix_is_reported_as_collapsed(data, tiny_gpt2, capsys):
    """A frozen mapper of zeros gives every image the same prefix."""
    assert train.main(words(tiny_gpt2, "--max_steps", 0)) == 0
    state = torch.load("out/coco_prefix-000.pt", weights_only=True)
    zeros = {name: tensor.zero_() if name.startswith("clip_project.") else tensor for name, tensor in state.items()}
    torch.save(zeros, "zeros.pt")
    Path("zeros.json").write_text(Path("out/coco_prefix.json").read_text())
    more = ("--init_from", "zeros.pt", "--freeze_mapper", "--epochs", 1, "--val_data", "val.pkl", "--prefix", "blind")
    capsys.readouterr()
    assert train.main(words(tiny_gpt2, *more)) == 0
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "hardly depend on their images" in warning
    assert "0.0000 nats" in warning
    assert "4 images get 1 different caption:" not in warning
    assert "4 images get 1 different caption" in warning
    assert "check.py" in warning
    [line] = validated("blind")
    assert abs(line["val_gap"]) < 1e-6
    assert line["val_distinct"] == 1
    assert "nats" in line["val_collapse"]


def test_the_demos_model_is_healthy(mini_demo, workdir, capsys):
    data, model = mini_demo / "train.pkl", mini_demo / "checkpoints/demo-003.pt"
    more = ["--data", data, "--val_data", data, "--init_from", model, "--gpt2_type", mini_demo / "weights/demo_gpt2"]
    options = "--max_steps 0 --prefix_length 4 --bs 40 --out_dir out --device cpu --val_captions 40 --tracker none --mixed_precision no"
    assert train.main([*map(str, more), *options.split()]) == 0
    assert "warning" not in capsys.readouterr().out
    [line] = validated()
    assert line["val_gap"] > 0.05
    assert line["val_distinct"] > 1
    assert line["val_ended"] > 0.9
    assert line["val_cider"] > 0


def test_a_collapse_needs_a_sign():
    healthy = {"val_gap": 0.5, "val_captions": 200, "val_distinct": 90, "val_distinct_references": 190}
    assert find_collapse(healthy) is None
    assert "0.0010 nats" in find_collapse({**healthy, "val_gap": 0.001})
    assert find_collapse({**healthy, "val_gap": 0.001}, quotes_others=True) is None
    assert find_collapse({**healthy, "val_distinct": 7}) == "200 images get 7 different captions"
    assert find_collapse({"val_distinct": 1, "val_distinct_references": 1, "val_captions": 1}) is None


def test_no_image_is_its_own_other():
    rows = np.array([9, 2, 2, 5, 5, 7, 9])
    other = other_images(rows)
    assert set(other[[2, 5, 7, 9]]) == {2, 5, 7, 9}
    assert all(other[row] != row for row in (2, 5, 7, 9))
    assert other_images(np.array([3, 3])) is None


def test_the_trackers_hold_the_figures(data, tiny_gpt2, capsys, monkeypatch):
    more = ("--max_steps", 2, "--val_data", "val.pkl", "--tracker", "tensorboard")
    assert train.main(words(tiny_gpt2, *more)) == 0
    assert {"training/loss", "training/lr", "validation/loss", "validation/cider", "validation/gap"} <= set(events().Tags()["scalars"])
    [loss] = events().Scalars("validation/loss")
    assert loss.step == 2
    assert loss.value == pytest.approx(validated()[0]["val_loss"], rel=1e-5)
    refused = [("--tracker wandb", "pip install wandb"), ("--val_every 2", "--val_every needs --val_data")]
    refused.append(("--val_data val.pkl --best_by cider --val_captions 0", "--best_by cider needs captions"))
    for more, message in refused:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("importlib.util.find_spec", lambda name: None)
            train.main(words(tiny_gpt2, *more.split()))
        assert message in capsys.readouterr().err
