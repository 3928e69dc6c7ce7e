"""evaluate.py and what it cannot use: one line that says what was found and what to do, exit code 2, nothing written."""

import json

import pytest

from evaluating import FAST, read, refuse, run, write, write_coco


@pytest.fixture
def coco(workdir):
    """Four images, their references and predictions, in the working directory."""
    return write_coco()


def test_a_bad_file_gives_one_line_that_names_what_is_wrong(coco, workdir, capsys):
    references = ["--references", "captions_val2017.json", *FAST]
    write("strange.json", [{"image_id": key, "caption": "A cat."} for key in (1, 77, 78, 79)])
    assert "3 of 4 images without references: 77, 78, 79" in refuse(capsys, "--predictions", "strange.json", *references)
    write("twice.json", [{"image_id": key, "caption": "A cat."} for key in (1, 2, 2, "000000000001")])
    assert "2 image ids more than once: 1, 2" in refuse(capsys, "--predictions", "twice.json", *references)
    for content, expected in (
        ("", "holds no prediction"), (" \n", "holds no prediction"), ("[]", "holds no prediction"), ("{", "is not JSON"),
        ({"a": 1}, "has its content = {'a': 1}"), ("3", "has its content = 3"),
        ([{"image_id": 1}], "has no [0].caption"), ([{"image_id": 1, "caption": None}], "has [0].caption = None"),
        (read(workdir / "captions_val2017.json"), "as references are"),
    ):  # fmt: skip
        write("bad.json", content)
        assert expected in refuse(capsys, "--predictions", "bad.json", *references)
    predictions = ["--predictions", "predictions.json", *FAST, "--references"]
    for name, content, expected in (
        ("bad.json", "", "is not JSON"), ("bad.json", "x", "is not JSON"),
        ("bad.json", {"annotations": []}, "holds no caption"), ("bad.json", {"annotations": [{"id": 1}]}, "has no annotations[0].image_id"),
        ("bad.csv", "number,words\n1,A cat\n", "starts with 'number,words'"), ("bad.csv", "", "starts with ''"),
        ("bad.pkl", "no pickle", "cannot be read as a pickle"),
    ):  # fmt: skip
        write(name, content)
        assert expected in refuse(capsys, *predictions, name)
    assert "no captions absent.json (no such file)" in refuse(capsys, "--predictions", "absent.json", *references)
    write("two.jsonl", "\n".join(json.dumps({"image_id": 1, "caption": "A cat.", "checkpoint": name}) for name in "ab"))
    assert "2 checkpoints" in refuse(capsys, "--predictions", "two.jsonl", *references)
    write("one.json", [{"image_id": 1, "caption": "A cat."}])
    assert "differ in 3 images: 2, 3, 4" in refuse(capsys, "--predictions", "predictions.json", "one.json", *references)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--predictions", "a.json"],
        ["--checkpoint", "a.pt"],
        ["--checkpoint", "a.pt", "--data", "b.pkl", "--predictions", "a.json"],
        ["--predictions", "a.json", "b.json", "c.json", "--references", "r.json"],
        ["--predictions", "a.json", "--references", "r.json", "--out", "scores.txt"],
        ["--predictions", "a.json", "--references", "r.json", "--histogram", "bleu4"],
        ["--predictions", "a.json", "b.json", "--references", "r.json", "--upload", "u.json"],
        ["--predictions", "a.json", "--references", "r.json", "--bootstrap", "-1"],
        ["--predictions", "a.json", "--references", "r.json", "--metrics", "wer"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_end_in_one_line(words, capsys):
    refuse(capsys, *words)


def test_without_java_the_scores_that_need_none_are_given_and_the_tokeniser_is_named(coco, workdir, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--predictions", "predictions.json", "--references", "captions_val2017.json"]
    run(*words, "--out", "scores.json")
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert "apt-get install" in captured.err
    found = read(workdir / "scores.json")
    assert "METEOR" not in found["scores"]
    assert found["scores"]["ROUGE-L"] == 1
    assert "plain" in found["tokeniser"]
    assert "plain" in captured.out
    assert found["made_by"]["versions"]["java"] is None
    assert "apt-get install" in refuse(capsys, *words, "--metrics", "meteor")


def test_spice_without_its_models_is_refused_before_anything_is_decoded(mini_demo, capsys, monkeypatch):
    monkeypatch.setattr("pycocoevalcap.spice.get_stanford_models.JAR", "no-such-models")
    monkeypatch.setattr("evaluation.metrics.java_is_here", lambda: True)
    words = ["--data", mini_demo / "heldout.pkl", "--checkpoint", "absent.pt", "--metrics", "bleu", "spice"]
    assert "SPICE lacks no-such-models.jar" in refuse(capsys, *words)


def test_a_java_that_does_not_work_gives_one_line(coco, workdir, capsys, monkeypatch):
    (workdir / "java").write_text("#!/bin/sh\nexit 1\n")
    (workdir / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{workdir}:/bin")
    assert "java -version" in refuse(capsys, "--predictions", "predictions.json", "--references", "captions_val2017.json")
