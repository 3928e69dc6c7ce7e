"""A finished demo is found where it lies, made where it is not, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest

from common import UserError, claim_output
from demo import ready, run, run_audio
from helpers import call


def test_a_finished_demo_is_found_by_argument_variable_and_usual_place(mini_demo, workdir, monkeypatch, capsys):
    found = ready.ready_demo(mini_demo)
    assert found.checkpoint == max(mini_demo.glob("checkpoints/demo-*.pt"))
    assert found.heldout == sorted((mini_demo / "heldout").iterdir())
    assert Path(found.encoder).is_file()
    assert Path(found.gpt2_type).is_dir()
    monkeypatch.setenv("PREFIXCAP_DEMO", str(mini_demo))
    assert ready.ready_demo() == found
    monkeypatch.delenv("PREFIXCAP_DEMO")
    (workdir / "data").mkdir()
    (workdir / "data" / "demo").symlink_to(mini_demo)
    assert ready.ready_demo().heldout[0] == Path("data/demo/heldout") / found.heldout[0].name
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("sounds", "script"), [(False, run), (True, run_audio)])
def test_where_no_finished_demo_is_the_quick_one_is_made_and_its_time_is_said(workdir, monkeypatch, capsys, sounds, script):
    """The world is drawn and the commands are run by stand-ins, which leave what the real ones leave."""
    ran = []

    def build(folder, **settings):
        assert settings == script.QUICK
        for name in ("heldout/1.jpg", "evaluation/one.wav", "weights/demo_clip.pt", "weights/demo_gpt2/config.json", "world.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        (folder / "truth_evaluation.json").write_text("{}")

    def run_script(words, brief=False):
        ran.append(words)
        if words[0] == "train.py":
            folder = Path(words[words.index("--out_dir") + 1])
            assert not (folder / "demo-009.pt").exists(), "a checkpoint of an earlier world"
            folder.mkdir(exist_ok=True)
            (folder / "demo-002.pt").write_bytes(b"")

    monkeypatch.setattr(script, "build", build)
    monkeypatch.setattr(run, "run_script", run_script)
    monkeypatch.delenv("PREFIXCAP_DEMO", raising=False)
    monkeypatch.delenv("PREFIXCAP_DEMO_AUDIO", raising=False)
    folder = Path("data/demo_audio" if sounds else "data/demo")
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("world.json", "checkpoints/demo-009.pt"):
        (folder / name).write_bytes(b"")
    found = ready.ready_demo(sounds=sounds)
    lines = script.command_lines(folder)
    assert ran == [lines["parse development" if sounds else "parse train"], lines["train"]]
    assert found.checkpoint == folder / "checkpoints" / "demo-002.pt"
    assert found.heldout[0].suffix == (".wav" if sounds else ".jpg")
    assert "a minute or two on two cores" in capsys.readouterr().out
    assert ready.ready_demo(sounds=sounds) == found
    assert len(ran) == 2


def test_a_command_that_fails_ends_in_its_own_error(workdir, monkeypatch):
    def fail(words):
        raise UserError("parse_coco.py ended with exit code 2")

    monkeypatch.setattr(run, "build", lambda folder, **settings: None)
    monkeypatch.setattr(run, "run_script", fail)
    with pytest.raises(UserError, match="ended with exit code 2"):
        ready.ready_demo("new")


def test_a_demo_that_lost_its_heldout_pictures_is_named(workdir, mini_demo, monkeypatch):
    shutil.copytree(mini_demo, "copy", ignore=shutil.ignore_patterns("*.jpg"))
    monkeypatch.setattr(run, "build", lambda folder, **settings: None)
    monkeypatch.setattr(run, "run_script", lambda words: None)
    with pytest.raises(UserError, match=r"incomplete demo, with nothing in heldout/\*.jpg. Remove it"):
        ready.ready_demo("copy")


def test_a_folder_or_file_of_something_else_is_left_alone(workdir):
    (workdir / "train").mkdir()
    (workdir / "train" / "mine.jpg").write_bytes(b"")
    for place in (".", "train/mine.jpg"):
        with pytest.raises(UserError, match="holds other files than a demo of pictures"):
            ready.ready_demo(place)
    assert (workdir / "train" / "mine.jpg").exists()


@pytest.mark.parametrize("script", [run, run_audio])
def test_a_demo_is_not_written_by_two_at_once(workdir, capsys, script):
    with claim_output("demo"):
        call(script.main, ["--folder", "demo"], code=2)
    assert "demo is being written by" in capsys.readouterr().err
    assert not Path("demo").exists()
