"""Runs of one name: resumed, made longer, refused where another run or another model has the name."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from interrupted import dies_at_save
from models.checkpoints import load_checkpoint
from running import assert_equal_states, run, save_data, state_of
from training.optimizer import learning_rate
from training.run_log import RunLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(workdir):
    return save_data(workdir)


@pytest.fixture
def finished(data, tiny_gpt2):
    run(tiny_gpt2, "--epochs", 1)
    return data


@pytest.mark.parametrize("sampling", ["images", "captions"])
def test_a_resumed_run_ends_in_the_same_weights(data, tiny_gpt2, sampling):
    """Dropout on, stopped in the middle of the second epoch, at a resume point and beyond it."""
    run(tiny_gpt2, "--epochs", 3, "--prefix", "whole", "--sampling", sampling)

    with dies_at_save(4) as steps, pytest.raises(SystemExit):
        run(tiny_gpt2, "--epochs", 3, "--prefix", "halves", "--sampling", sampling, "--save_steps", 2)
    assert steps == [2, 4, 5, 6]
    run(tiny_gpt2, "--epochs", 3, "--prefix", "halves", "--sampling", sampling, "--save_steps", 2, "--resume")
    assert_equal_states(state_of("out/whole-002.pt"), state_of("out/halves-002.pt"))
    steps = [json.loads(line)["step"] for line in open("out/halves_metrics.jsonl")]
    assert steps == list(range(1, 16))


def test_a_second_run_of_one_name_is_refused_while_the_first_lasts(data, tiny_gpt2, capsys, monkeypatch):
    """The second one is asked for in the middle of the first, between two of its steps."""
    count, answers = RunLog.count, []

    def run_another(self, *arguments):
        count(self, *arguments)
        if not answers:
            script = [sys.executable, Path(train.__file__), "--data", "train.pkl", "--out_dir", "./out", "--device", "cpu"]
            answers.append(subprocess.run(script, capture_output=True, text=True))

    monkeypatch.setattr(RunLog, "count", run_another)
    run(tiny_gpt2, "--max_steps", 2)
    (second,) = answers
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in second.stderr
    run(tiny_gpt2, "--max_steps", 2)


def test_only_checkpoints_of_this_run_are_removed(data, tiny_gpt2):
    run(tiny_gpt2, "--epochs", 2)
    for label in ("-007", "-0099", "-notes", "-2-000"):
        Path(f"out/coco_prefix{label}.pt").touch()
    run(tiny_gpt2, "--epochs", 3, "--keep_last", 1)
    kept = sorted(path.name.removeprefix("coco_prefix") for path in Path("out").glob("*-*.pt"))
    assert kept == ["-002.pt", "-007.pt", "-0099.pt", "-2-000.pt", "-notes.pt"]


@pytest.mark.parametrize("longer", [["--epochs", 3], ["--epochs", 9, "--max_steps", 15]])
def test_a_finished_run_is_continued_with_more_steps(finished, tiny_gpt2, capsys, longer):
    """One epoch is 5 steps, all of them warm-up."""
    run(tiny_gpt2, "--resume", *longer)
    said = capsys.readouterr().out
    assert "the run has 15 steps instead of 5: after step 5 the learning rate is 0.001 instead of 0, and it reaches 0 at step 15" in said
    lines = [json.loads(line) for line in open("out/coco_prefix_metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert [line["lr"] for line in lines[5:]] == [learning_rate(step, 1e-3, 5, 15) for step in range(5, 15)]
    assert Path("out/coco_prefix-002.pt").exists()
    run(tiny_gpt2, "--resume", *longer)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("warm_up", "epochs", "rate"), [(["--warmup_ratio", "0.2"], 2, "0.000625"), ([], 4, "0.000789")])
def test_the_warm_up_follows_the_length_where_it_is_a_share(data, tiny_gpt2, capsys, warm_up, epochs, rate):
    """One epoch is 5 steps. By default a twentieth of the run is warm-up: no step of 5, one of 20."""
    words = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), "--device", "cpu", "--bs", "5"]
    words += [*warm_up, "--lr", "1e-3", "--tracker", "none"]
    assert train.main([*words, "--epochs", "1"]) == 0
    assert train.main([*words, "--epochs", str(epochs), "--resume"]) == 0
    assert f"after step 5 the learning rate is {rate} instead of 0" in capsys.readouterr().out


def test_a_language_model_whose_config_holds_objects_is_resumed(data, tiny_gpt2, tmp_path, capsys):
    """As of weights that were read from GGUF: transformers turns the method's name into one of its own classes."""
    folder = tmp_path / "dequantized"
    shutil.copytree(tiny_gpt2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gguf", "dequantize": False}}))
    run(folder, "--epochs", 1)
    run(folder, "--epochs", 2, "--resume")
    assert "the run has 10 steps instead of 5" in capsys.readouterr().out
    assert load_checkpoint("out/coco_prefix-001.pt").config.gpt_config["quantization_config"]["quant_method"] == "gguf"


def test_a_run_is_not_resumed_behind_its_end(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 2)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    run(tiny_gpt2, "--epochs", 1, "--resume", code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "is after step 10, and this run would end at step 5" in lines[0]
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


OTHER_MODELS = (["--normalize_prefix"], ["--stop_token", "."], ["--mapping_type", "linear"], ["--prompt", "a picture:"], ["--only_prefix"])


@pytest.mark.parametrize("more", OTHER_MODELS)
def test_weights_keep_their_config_when_another_model_takes_their_name(data, tiny_gpt2, more):
    """As the published READMEs do it: one folder and one name for several variants."""
    run(tiny_gpt2, "--epochs", 2)
    before = vars(load_checkpoint("out/coco_prefix-001.pt").config)
    run(tiny_gpt2, "--epochs", 1, *more)
    assert vars(load_checkpoint("out/coco_prefix-000.pt").config) != before
    assert vars(load_checkpoint("out/coco_prefix-001.pt").config) == before


@pytest.mark.parametrize("more", OTHER_MODELS)
def test_a_name_of_weights_of_older_versions_is_refused_for_another_model(finished, tiny_gpt2, capsys, more):
    """They carry no config, and would load with the new run's."""
    torch.save(dict(state_of("out/coco_prefix-000.pt")), "out/coco_prefix-000.pt")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    run(tiny_gpt2, "--epochs", 1, *more, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert more[0].replace("only_prefix", "tune").removeprefix("--") in lines[0]
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    run(tiny_gpt2, "--epochs", 1, "--prefix", "other", *more)
    run(tiny_gpt2, "--epochs", 1, "--seed", 4)


def test_weights_without_a_config_get_none(data, tiny_gpt2, capsys):
    """Published files carry such names; a config beside them would change what they are."""
    Path("out").mkdir()
    torch.save({}, "out/coco_prefix-009.pt")
    run(tiny_gpt2, "--epochs", 1, code=2)
    assert "out/coco_prefix-009.pt" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["coco_prefix-009.pt"]


def test_lines_after_a_resume_average_the_whole_interval(data, tiny_gpt2):
    """Lines every four steps, stopped after six; resume points of older versions lack the interval's sums."""
    lines = {}
    for prefix in ("whole", "halves", "old"):
        words = ["--epochs", 3, "--prefix", prefix, "--save_steps", 2, "--log_every", 4]
        if prefix != "whole":
            with dies_at_save(4), pytest.raises(SystemExit):
                run(tiny_gpt2, *words)
        if prefix == "old":
            state = state_of("out/old_state.pt")
            del state["interval"], state["numbered"]
            torch.save(state, "out/old_state.pt")
        run(tiny_gpt2, *words, *(["--resume"] if prefix != "whole" else []))
        lines[prefix] = [json.loads(line) for line in open(f"out/{prefix}_metrics.jsonl")]
        for line in lines[prefix]:
            assert line.pop("captions_per_s") > 0
    assert lines["halves"] == lines["whole"]
    assert [line["step"] for line in lines["old"]] == [line["step"] for line in lines["whole"]]


def test_resuming_a_finished_run_changes_nothing(finished, tiny_gpt2, capsys):
    before = {path: path.read_bytes() for path in finished.parent.joinpath("out").rglob("*") if path.is_file()}
    run(tiny_gpt2, "--epochs", 1, "--resume")
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in finished.parent.joinpath("out").rglob("*") if path.is_file()}


def test_resuming_nothing_starts_from_scratch_and_says_so(data, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 1, "--resume")
    assert "starting from scratch" in capsys.readouterr().out


def test_resuming_with_other_options_names_them(finished, tiny_gpt2, capsys):
    run(tiny_gpt2, "--epochs", 1, "--resume", "--seed", 5, code=2)
    message = capsys.readouterr().err
    assert "seed 0 (now 5)" in message
