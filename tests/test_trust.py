"""What must survive: killed jobs, full disks, losses that are not finite, files from strangers."""

import csv
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE, wait_until

import tiny
import train
from common import UserError
from models.checkpoints import read_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(train.__file__).parent
THINGS = ["dogs", "cats", "cars", "boats"]
CAPTIONS = [[f"a picture of {thing} number {i}" for i in range(3)] for thing in THINGS * 3]
COMMON = "--device cpu --prefix_length 4 --bs 6 --warmup_steps 5 --lr 1e-3 --log_every 1 --mixed_precision no".split()


@pytest.fixture
def data(workdir):
    """A published feature file of 12 images and 36 captions: six steps an epoch."""
    tiny.save_published_features(workdir / "train.pkl", CAPTIONS, width=32)
    return workdir / "train.pkl"


def words(tiny_gpt2, *more):
    return ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), *COMMON, *map(str, more)]


def start(script, arguments, limit=None):
    """A script as a process of its own; `limit`: most bytes a file of it may have."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )  # fmt: skip


def fails(tiny_gpt2, capsys, *more):
    """The one line that a failing run prints."""
    with pytest.raises(SystemExit) as end:
        train.main(words(tiny_gpt2, *more))
    assert end.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    return line


def log(name="coco_prefix"):
    return [json.loads(line) for line in open(f"out/{name}_metrics.jsonl")]


@pytest.mark.slow
def test_a_run_killed_and_terminated_ends_in_the_same_bytes(data, tiny_gpt2):
    """SIGKILL at a random moment, then SIGTERM, then once to the end: every numbered checkpoint is that of an undisturbed run."""
    assert train.main(words(tiny_gpt2, "--epochs", 40, "--prefix", "whole", "--save_every", 20)) == 0
    more = ("--epochs", 40, "--prefix", "killed", "--save_every", 20, "--save_steps", 2, "--resume")
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start("train.py", words(tiny_gpt2, *more))
        wait_until(Path("out/killed_state.pt").exists)
        before = Path("out/killed_state.pt").stat().st_mtime_ns
        while Path("out/killed_state.pt").stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
        if number == signal.SIGTERM and process.returncode:
            assert process.returncode == 128 + signal.SIGTERM, err
            assert "stopped by SIGTERM after step" in out, err
    assert train.main(words(tiny_gpt2, *more)) == 0
    for epoch in ("000", "020", "039"):
        assert Path(f"out/whole-{epoch}.pt").read_bytes() == Path(f"out/killed-{epoch}.pt").read_bytes()
    assert [line["step"] for line in log("killed")] == list(range(1, 241))
    assert [line["loss"] for line in log("killed")] == [line["loss"] for line in log("whole")]
    assert not list(Path("out").glob(".*"))


def test_validation_writes_its_loss_and_keeps_the_best(data, tiny_gpt2, capsys):
    tiny.save_published_features(data.parent / "val.pkl", CAPTIONS[:4], width=32)
    assert train.main(words(tiny_gpt2, "--epochs", 4, "--val_data", "val.pkl")) == 0
    validated = [line for line in log() if "val_loss" in line]
    assert [line["epoch"] for line in validated] == [0, 1, 2, 3]
    assert validated[-1]["val_loss"] < validated[0]["val_loss"]
    assert validated[0]["val_perplexity"] == pytest.approx(2.718281828 ** validated[0]["val_loss"], rel=1e-6)
    best = min(validated, key=lambda line: line["val_loss"])["epoch"]
    assert Path("out/coco_prefix_best.pt").read_bytes() == Path(f"out/coco_prefix-{best:03d}.pt").read_bytes()
    assert "predict.py --checkpoint out/coco_prefix_best.pt" in capsys.readouterr().out


def test_the_validation_loss_is_the_plain_one(data, tiny_gpt2):
    """Against one caption at a time, through the language model's own loss."""
    from models.checkpoints import load_checkpoint

    embeddings, texts, rows = tiny.save_published_features(data.parent / "val.pkl", CAPTIONS[:2], width=32, seed=5)
    assert train.main(words(tiny_gpt2, "--epochs", 1, "--val_data", "val.pkl")) == 0
    model = load_checkpoint("out/coco_prefix-000.pt")
    total = count = 0
    for text, row in zip(texts, rows):
        ids = torch.tensor([model.tokenizer.encode(text) + [model.tokenizer.eos_token_id]])
        with torch.no_grad():
            embeds = torch.cat([model.encode_prefix(embeddings[row][None]), model.gpt.transformer.wte(ids)], dim=1)
            logits = model.gpt(inputs_embeds=embeds).logits[0, 3:-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item()
        count += ids.numel()
    assert [line["val_loss"] for line in log() if "val_loss" in line] == [pytest.approx(total / count, abs=1e-5)]


def test_training_stops_when_validation_stops_getting_better(data, tiny_gpt2, capsys):
    tiny.save_published_features(data.parent / "val.pkl", [["zebra quartz"], ["vexing jumble"]], width=32, seed=9)
    more = ("--epochs", 60, "--val_data", "val.pkl", "--patience", 2, "--lr", "5e-3", "--warmup_steps", 1)
    assert train.main(words(tiny_gpt2, *more)) == 0
    said = capsys.readouterr().out
    losses = [line["val_loss"] for line in log() if "val_loss" in line]
    assert len(losses) < 60
    assert "stopped early: 2 epochs without" in said
    assert losses.index(min(losses)) == len(losses) - 3
    assert train.main(words(tiny_gpt2, *more, "--resume")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_validation_file_of_another_encoder_is_refused(data, tiny_gpt2, capsys):
    tiny.save_published_features(data.parent / "val.pkl", CAPTIONS, width=40)
    assert "val.pkl holds 40-wide embeddings" in fails(tiny_gpt2, capsys, "--val_data", "val.pkl")
    assert "--patience needs --val_data" in fails(tiny_gpt2, capsys, "--patience", "2")


def test_only_the_last_checkpoints_are_kept(data, tiny_gpt2):
    Path("out").mkdir()
    Path("out/coco_prefix-notes.pt").touch()
    assert train.main(words(tiny_gpt2, "--epochs", 5, "--keep_last", 2)) == 0
    assert sorted(path.name for path in Path("out").glob("*-*.pt")) == ["coco_prefix-003.pt", "coco_prefix-004.pt", "coco_prefix-notes.pt"]


def test_a_loss_that_is_not_finite_names_its_captions_and_keeps_the_last_good_checkpoint(data, tiny_gpt2, capsys):
    mapper = ("--mapping_type", "transformer", "--num_layers", 1)
    assert train.main(words(tiny_gpt2, "--epochs", 2, "--save_every", 1, *mapper)) == 0
    good = Path("out/coco_prefix-001.pt").read_bytes()
    with open("train.pkl", "rb") as file:
        features = pickle.load(file)
    features["clip_embedding"][7] = 3e38  # the mapper's sums overflow
    with open("train.pkl", "wb") as file:
        pickle.dump(features, file)
    line = fails(tiny_gpt2, capsys, "--epochs", "2", "--log_every", "50", "--init_from", "out/coco_prefix-001.pt", *mapper)
    assert "at step" in line
    assert "1007: 'a picture of boats number" in line
    assert Path("out/coco_prefix-001.pt").read_bytes() == good


@pytest.mark.parametrize("limit", [30_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_nothing_half_written(data, tiny_gpt2, limit):
    process = start("train.py", words(tiny_gpt2, "--epochs", "1"), limit)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    [line] = [line for line in err.splitlines() if line.strip() and "step/s" not in line]
    assert line.startswith("train.py: error: cannot write out/")
    assert "File too large" in line
    written = sorted(path.name for path in Path("out").iterdir())
    assert not [name for name in written if name.startswith(".") or name.endswith(".pt")], written


@pytest.fixture
def pictures(workdir):
    """A COCO-format data set of five pictures with awkward names, and a small CLIP."""
    tiny.save_clip(workdir / "clip.pt", 512, "vit")
    names = ["plain.jpg", "two words.JPG", "line\nbreak.jpg", "写真 📷.jpg", "x" * 251 + ".jpg"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [{"id": 10 + number, "image_id": number, "caption": f"picture {number}"} for number in range(len(names))]
    (workdir / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (workdir / "photos").mkdir()
    for number, name in enumerate(names):
        tiny.save_picture(workdir / "photo.jpg", number).rename(workdir / "photos" / name)
    return names


PARSE = "--annotations captions.json --images photos --clip_model_type clip.pt --device cpu --num_workers 0 --batch_size 2".split()


def test_awkward_file_names_just_work(pictures, tiny_gpt2):
    import parse_coco
    import predict
    from features.store import load_features

    assert parse_coco.main([*PARSE, "--out", "out file ü.pkl"]) == 0
    features = load_features("out file ü.pkl")
    assert [caption["file_name"] for caption in features.captions] == pictures
    assert train.main(["--data", "out file ü.pkl", *words(tiny_gpt2, "--epochs", 1)[2:]]) == 0
    short = ["--entry_length", "4", "--device", "cpu"]
    assert predict.main(["-C", "out/coco_prefix-000.pt", "photos", "--out", "captions é.csv", *short]) == 0
    rows = list(csv.DictReader(open("captions é.csv", encoding="utf-8", newline="")))
    assert sorted(row["file"] for row in rows) == sorted(f"photos/{name}" for name in pictures)


def test_a_full_disk_while_parsing_is_one_line(pictures):
    process = start("parse_coco.py", [*PARSE, "--out", "out.pkl"], limit=3000)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    [line] = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("parse_coco.py: error: cannot write out.pkl")
    assert "File too large" in line
    assert not Path("out.pkl").exists()
    assert not list(Path().glob(".out*"))


def test_sigterm_while_parsing_keeps_the_work_done(pictures):
    """Many entries of one picture, so that there is something to interrupt; a piece is written after every batch."""
    images = [{"id": number, "file_name": "plain.jpg"} for number in range(3000)]
    annotations = [{"id": number, "image_id": number, "caption": "a"} for number in range(3000)]
    Path("captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    process = start("parse_coco.py", [*PARSE, "--out", "out.pkl", "--save_seconds", "0"])
    wait_until(Path("out.pkl.pieces").exists)
    process.terminate()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "are kept in out.pkl.pieces; run the same command to resume" in err, err
    assert not Path("out.pkl").exists()


def test_a_zip_bomb_is_refused(tmp_path):
    torch.save({"clip_project.model.0.weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member.filename))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed"):
        read_state_dict(tmp_path / "bomb.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), cut=st.floats(0.2, 1))
def test_a_mutated_checkpoint_gives_tensors_or_one_line(tmp_path_factory, changes, cut):
    path = tmp_path_factory.mktemp("mutated") / "a.pt"
    torch.save({f"clip_project.model.{i}.weight": torch.ones(3, 2) for i in range(3)}, path)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content[: max(1, int(cut * len(content)))] if cut < 0.9 else content)
    try:
        state = read_state_dict(path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    except UserError as error:
        assert "\n" not in str(error)
