"""Result and reference files of strangers: whatever is in them, evaluate.py ends with scores or with one line."""

import csv
import io
import json
import os
import random
import subprocess
import sys

import pytest

import evaluate
from evaluating import mutate, read, refuse, write, write_coco

WORDS = ("--metrics", "bleu", "rouge", "--bootstrap", "0", "--out", "scores.json")


@pytest.fixture(autouse=True)
def plain(workdir, monkeypatch):
    """Four images with references, and the plain tokenizer, which takes no time to start."""
    monkeypatch.setattr("evaluation.tokens.java_is_here", lambda: False)
    return write_coco()


def outcome(capsys, *words):
    """Run evaluate.py. Returns its one line on stderr where it ends with exit code 2, None where it ends with 0."""
    capsys.readouterr()
    try:
        assert evaluate.main([*words, *WORDS]) == 0
    except SystemExit as end:
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("evaluate.py: error: ")]
        assert end.code == 2, lines
        assert errors == lines[-1:], lines
        assert len(errors[0]) < 1500, errors[0][:2000]
        return errors[0]
    return None


def test_what_was_found_wrong_in_strangers_files_gives_one_line(capsys, workdir):
    row = {"image_id": 1, "caption": "A cat."}
    for changes, expected in (
        ({"rank": "\xb2"}, "[0].rank = '\xb2'"), ({"rank": 0}, "[0].rank = 0"), ({"image_id": [1]}, "[0].image_id = [1]"),
        ({"image_id": 1.5}, "[0].image_id = 1.5"), ({"image_id": True}, "[0].image_id = True"), ({"image_id": ""}, "[0].image_id = ''"),
        ({"image_id": 2**70}, "[0].image_id = "), ({"checkpoint": [1]}, "[0].checkpoint = [1]"), ({"file": 3}, "[0].file = 3"),
        ({"caption": ["A cat."]}, "[0].caption = ['A cat.']"),
    ):  # fmt: skip
        write("bad.json", [row | changes])
        assert expected in refuse(capsys, "--predictions", "bad.json", "--references", "captions_val2017.json", *WORDS)
    deep = "[" * 100_000 + "]" * 100_000
    for name, content, expected in (
        ("deep.json", deep, "is not JSON"), ("deep.jsonl", '{"image_id": 1, "caption": %s}' % deep, "line 1 that is not JSON"),
        ("huge.json", f'[{{"image_id": {"9" * 5000}}}]', "is not JSON"), ("nul.csv", "image_id,caption\n1,a\0b\n", "holds NUL characters"),
        ("long.csv", "image_id,caption\n1,A cat\n2,a,b,c\n", "4 fields in the row that ends in line 3"),
        ("quotes.csv", 'image_id,caption\n1,"A cat\n', "is not a proper CSV"), ("short.csv", "image_id,caption\n1\n", "has no [0].caption"),
        ("list.jsonl", "[1]\n", "a list in line 1"),
    ):  # fmt: skip
        write(name, content)
        assert expected in refuse(capsys, "--predictions", name, "--references", "captions_val2017.json", *WORDS)


def test_long_fields_foreign_encodings_and_half_emoji_are_read(capsys, workdir):
    write("long.csv", f"image_id,caption\n1,{'a cat ' * 40_000}\n")
    (workdir / "latin.csv").write_bytes("image_id;caption\n1;Un caf\xe9\n".encode("latin-1"))
    (workdir / "half.json").write_text(r'[{"image_id": 1, "caption": "A cat \ud83d."}]')
    for name in ("long.csv", "latin.csv", "half.json"):
        assert outcome(capsys, "--predictions", name, "--references", "captions_val2017.json") is None
    assert "1 captions hold half of a surrogate pair" in capsys.readouterr().err
    assert read(workdir / "scores.predictions.json")[0]["caption"] == "A cat \ufffd."


def test_degenerate_scores_are_zero_null_or_refused_and_said_so(capsys, workdir, monkeypatch):
    write("one.json", [{"image_id": 3, "caption": "A cat on a computer."}])
    words = ["--metrics", "cider", "rouge", "--bootstrap", "20", "--out", "scores.json"]
    evaluate.main(["--predictions", "one.json", "--references", "captions_val2017.json", *words])
    found, printed = read(workdir / "scores.json"), capsys.readouterr().out
    assert found["scores"] == {"ROUGE-L": 1, "CIDEr": 0}
    assert "CIDEr of a single image is 0 by definition" in found["notes"][0]
    assert found["notes"][0] in printed
    write("empty.json", [{"image_id": key, "caption": text} for key, text in zip((1, 2, 3, 4), ("", " ", "...", "!"))])
    evaluate.main(["--predictions", "empty.json", "--references", "captions_val2017.json", *words])
    assert read(workdir / "scores.json")["notes"] == ["no caption of empty.json holds a word"]
    write("wordless.json", {"annotations": [{"image_id": key, "caption": text} for key, text in ((3, ""), (3, "..."))]})
    said = refuse(capsys, "--predictions", "one.json", "--references", "wordless.json", *words)
    assert "none of the references of 1 images holds a word" in said

    from evaluation import metrics, statistics

    def broken(captions, _):
        return {"Broken": statistics.mean_metric([float("nan")] * len(captions.words))}

    monkeypatch.setitem(metrics.METRICS, "broken", metrics.MetricEntry("not a number", ("Broken",), broken))
    words = ["--metrics", "broken", "rouge", "--bootstrap", "20", "--out", "scores.json"]
    evaluate.main(["--predictions", "empty.json", "predictions.json", "--references", "captions_val2017.json", *words])
    text = (workdir / "scores.json").read_text() + (workdir / "scores.predictions.json").read_text()
    found = read(workdir / "scores.json")
    assert "NaN" not in text
    assert found["scores"]["Broken"] is None
    assert list(found["comparison"]) == ["ROUGE-L"]
    assert "Broken of empty.json is not a number, and null in the file" in found["notes"]


def test_cider_of_references_without_a_word_is_zero():
    from evaluation.metrics import score_cider

    assert score_cider(["a b", ""], [["", ""], [""]]).per_image.tolist() == [0, 0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding_gets_the_same_files(workdir, root, encoding):
    names = ["caf\xe9.jpg", "\u96e8\U0001f600.jpg"]
    write("r.json", [{"image": name, "caption": f"{name} \u2192 \u2026"} for name in names])
    write("p\xe9.json", [{"image_id": name, "caption": f"\u2192 \u2026 {name}"} for name in names])
    words = ["--predictions", "p\xe9.json", "--references", "r.json", "--metrics", "rouge", "--bootstrap", "0", "--out"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, root / "evaluate.py", *words, f"{encoding}.json"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"evaluate.py" not in done.stderr
    assert f"wrote {encoding}.json".encode() in done.stdout
    rows = read(workdir / f"{encoding}.predictions.json")
    assert [row["image_id"] for row in rows] == names
    assert rows[0]["caption"] == f"\u2192 \u2026 {names[0]}"


def test_files_are_written_before_anything_is_printed(workdir, monkeypatch):
    def full(_):
        raise OSError("no space left on the terminal")

    monkeypatch.setattr(sys.stdout, "write", full)
    with pytest.raises(SystemExit):
        evaluate.main(["--predictions", "predictions.json", "--references", "captions_val2017.json", *WORDS])
    assert read(workdir / "scores.json")["images"] == 4


def as_bytes(content, suffix, draw):
    """Write rows in one of the formats of result files; of every third, some bytes change."""
    if suffix == ".csv" and isinstance(content, list) and all(isinstance(row, dict) for row in content):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in content for key in row)))
        writer.writeheader()
        writer.writerows(content)
        text = out.getvalue()
    elif suffix == ".jsonl" and isinstance(content, list):
        text = "\n".join(map(json.dumps, content))
    else:
        text = json.dumps(content)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if draw.randrange(3) == 0:
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(data) + 1)
            data[place : place + draw.randrange(3)] = draw.choice((b"", b"\0", b"\xff", b'"', b"[", b"}", b",", b"\xed\xa0\x80", b"\n"))
    return bytes(data)


def test_drawn_changes_of_result_and_reference_files_end_with_scores_or_one_line(capsys, workdir, plain):
    draw = random.Random(7)
    rows = [{"image_id": key, "file": f"{key}.jpg", "rank": 1, "caption": texts[1], "score": -0.5} for key, texts in plain.items()]
    references = read(workdir / "captions_val2017.json")
    references["images"] = [{"id": key, "file_name": f"{key}.jpg", "domain": "in-domain"} for key in plain]
    named = [{"image": f"{key}.jpg", "caption": texts, "image_id": key} for key, texts in plain.items()]
    karpathy = [{"filename": f"{key}.jpg", "split": "test", "sentences": [{"raw": one} for one in texts]} for key, texts in plain.items()]
    ended = {True: 0, False: 0}
    for number in range(200):
        suffix = draw.choice((".json", ".jsonl", ".csv"))
        content = mutate(rows, draw) if draw.randrange(2) else mutate(mutate(rows, draw), draw)
        (workdir / f"result{suffix}").write_bytes(as_bytes(content, suffix, draw))
        truth = mutate(draw.choice((references, named, {"images": karpathy})), draw)
        (workdir / "mutated.json").write_bytes(as_bytes(truth, ".json", draw))
        result, truth = draw.choice(((f"result{suffix}", "captions_val2017.json"), ("predictions.json", "mutated.json")))
        ended[outcome(capsys, "--predictions", result, "--references", truth) is None] += 1
    assert min(ended.values()) > 40, ended
