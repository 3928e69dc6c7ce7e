"""A finished demo is found where it lies, made where it is not, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest

from common import UserError
from demo import ready, run, run_audio


def test_a_finished_demo_is_found_by_argument_variable_and_usual_place(mini_demo, workdir, monkeypatch, capsys):
    found = ready.ready_demo(mini_demo)
    assert found.checkpoint == max(mini_demo.glob("checkpoints/demo-*.pt"))
    assert found.heldout == sorted((mini_demo / "heldout").iterdir()) and Path(found.encoder).is_file() and Path(found.gpt2_type).is_dir()
    monkeypatch.setenv("PREFIXCAP_DEMO", str(mini_demo))
    assert ready.ready_demo() == found
    monkeypatch.delenv("PREFIXCAP_DEMO")
    (workdir / "data").mkdir()
    (workdir / "data" / "demo").symlink_to(mini_demo)
    assert ready.ready_demo().heldout[0] == Path("data/demo/heldout") / found.heldout[0].name
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("sounds", "script"), [(False, run), (True, run_audio)])
def test_where_no_finished_demo_is_the_quick_one_is_made_and_its_time_is_said(mini_demo, workdir, monkeypatch, capsys, sounds, script):
    asked = []

    def main(argv):
        asked.append(argv)
        shutil.copytree(mini_demo, argv[-1])
        (Path(argv[-1]) / "heldout").rename(Path(argv[-1]) / "evaluation")
        (Path(argv[-1]) / "evaluation" / "one.wav").write_bytes(b"")
        shutil.copytree(Path(argv[-1]) / "evaluation", Path(argv[-1]) / "heldout")
        return 0

    monkeypatch.setattr(script, "main", main)
    monkeypatch.delenv("PREFIXCAP_DEMO", raising=False)
    monkeypatch.delenv("PREFIXCAP_DEMO_AUDIO", raising=False)
    found = ready.ready_demo(sounds=sounds)
    folder = "data/demo_audio" if sounds else "data/demo"
    assert asked == [["--quick", "--folder", folder]] and found.heldout[0].suffix == (".wav" if sounds else ".jpg")
    assert "minute on two cores" in capsys.readouterr().out
    assert ready.ready_demo(sounds=sounds) == found and len(asked) == 1


def fail(argv):
    raise SystemExit(2)


@pytest.mark.parametrize("main", [fail, lambda argv: 1, lambda argv: 0])
def test_a_demo_that_fails_is_a_users_error(workdir, monkeypatch, main):
    monkeypatch.setattr(run, "main", main)
    with pytest.raises(UserError, match="did not come to its end"):
        ready.ready_demo("new")


def test_a_folder_or_file_of_something_else_is_left_alone(workdir):
    (workdir / "train").mkdir()
    (workdir / "train" / "mine.jpg").write_bytes(b"")
    for place in (".", "train/mine.jpg"):
        with pytest.raises(UserError, match="no demo of pictures, and holds something else"):
            ready.ready_demo(place)
    assert (workdir / "train" / "mine.jpg").exists()
