"""parse_folder.py from the command line, in folders laid out as people keep their pictures."""

import csv
import functools
import json
import sys
import types
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies

import helpers
import parse_folder
import tiny
import train
from features.own_data import split_by_image
from features.store import load_features
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_folder.main)
ONE_FILE = ["--val_share", "0", "--out", "out.pkl"]


@pytest.fixture
def photos(workdir):
    """photos/ with ten pictures 0.jpg … 9.jpg and nothing said about them; small weights for ViT-B/32."""
    for number in range(10):
        tiny.save_picture(f"photos/{number}.jpg", number)
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def write(path, text, encoding="utf-8"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def texts(path="out.pkl"):
    """Feature file → {image_id: [captions]}."""
    found = {}
    for caption in load_features(path).captions:
        found.setdefault(caption["image_id"], []).append(caption["caption"])
    return found


def test_a_metadata_csv_gives_two_files_that_train(photos, tiny_gpt2, capsys):
    rows = "".join(f"{number}.jpg,A picture of {number}.\n{number}.jpg,Number {number}.\n" for number in range(10))
    write("photos/metadata.csv", "file_name,text\n" + rows)
    assert parse_folder.main(["photos"]) == 0
    names = ["data/photos_ViT-B_32_train.pkl", "data/photos_ViT-B_32_val.pkl"]
    train_set, val_set = map(load_features, names)
    assert (len(train_set.clip_embedding), len(val_set.clip_embedding)) == (9, 1)
    assert (train_set.meta["split"], val_set.meta["split"], val_set.meta["split_seed"]) == ("train", "val", 0)
    together = texts(names[0]) | texts(names[1])
    assert together == {f"{n}.jpg": [f"A picture of {n}.", f"Number {n}."] for n in range(10)}
    caption = train_set.captions[-1]
    encoder = load_encoder("ViT-B/32")
    expected = encoder.encode(encoder.preprocess(f"photos/{caption['image_id']}")[None])[0]
    assert torch.allclose(train_set.clip_embedding[caption["clip_embedding"]], expected, atol=1e-5)
    assert not list(Path("data").glob("*.pieces")), "finished work is not left behind"
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"next: python train.py --data {names[0]} --val_data {names[1]} --out_dir ./data_train/"
    short = "--max_steps 2 --bs 4 --warmup_steps 1 --device cpu --prefix_length 2 --gpt2_type".split()
    assert train.main([*line.split()[3:], *short, str(tiny_gpt2)]) == 0
    assert Path("data_train/coco_prefix_best.pt").is_file()


def test_layouts_may_be_mixed_and_captions_are_kept_as_they_are(photos, capsys):
    tiny.save_picture("photos/more/deep/0.jpg", 20)
    tiny.save_picture("photos/more/1.PNG", 21)
    table = ["\ufefffile_name,label,caption", '0.jpg,x,"Two lines:\r\na ""cat"", and 🐈"', "1.jpg,,一只猫坐在垫子上。", "./0.jpg,,Again."]
    write("photos/metadata.csv", "\r\n".join(table))
    rows = [{"file_name": "deep/0.jpg", "caption": ["One.", "Two."]}, {"file_name": "1.PNG", "caption": "Three."},
            {"file_name": "1.PNG", "caption": None}]  # fmt: skip
    write("photos/more/metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    write("photos/2.txt", "\ufeffFirst line\u2028still first.\r\n\r\nSecond line.\r\n")
    write("photos/0.txt", "Not this: metadata say more.")
    write("photos/3.txt", "\n \n")
    write("photos/.hidden/metadata.csv", "nothing")
    assert parse_folder.main(["photos/", *ONE_FILE]) == 0
    assert texts() == {
        "0.jpg": ['Two lines:\r\na "cat", and 🐈', "Again."],
        "1.jpg": ["一只猫坐在垫子上。"],
        "2.jpg": ["First line\u2028still first.", "Second line."],
        "more/deep/0.jpg": ["One.", "Two."],
        "more/1.PNG": ["Three."],
    }
    assert "7 without a caption left out, such as photos/3.jpg" in capsys.readouterr().out


def test_caption_columns_may_be_named_or_numbered(photos):
    write("photos/metadata.csv", "file_name,caption_1,caption_2,title\n0.jpg,One.,Two.,A title\n")
    assert parse_folder.main(["photos", *ONE_FILE]) == 0
    assert texts() == {"0.jpg": ["One.", "Two."]}
    assert parse_folder.main(["photos", *ONE_FILE, "--caption_column", "title", "caption_1"]) == 0
    assert texts() == {"0.jpg": ["A title", "One."]}


def test_files_that_are_missing_or_no_pictures_are_skipped_and_listed(photos):
    write("photos/5.jpg", "not a picture")
    write("photos/metadata.csv", "file_name,caption\n" + "".join(f"{name}.jpg,x\n" for name in (*range(7), "gone")))
    assert parse_folder.main(["photos", *ONE_FILE]) == 0
    readable = {f"{number}.jpg" for number in range(7) if number != 5}
    assert set(texts()) == readable
    with open("out.pkl.skipped.csv", newline="") as file:
        listed = {row["image_id"]: row["reason"] for row in csv.DictReader(file)}
    assert listed == {"5.jpg": "not a picture in a known format", "gone.jpg": "no such file"}
    assert parse_folder.main(["photos", "--out", "two_train.pkl", "--val_share", "0.5"]) == 0
    assert set(texts("two_train.pkl")) | set(texts("two_val.pkl")) == readable


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_folder_that_is_held_out_is_one_file_of_that_split(photos, split, capsys):
    write("photos/metadata.csv", "file_name,caption\n0.jpg,One.\n1.jpg,Two.\n")
    assert parse_folder.main(["photos", "--split", split]) == 0
    out = f"data/photos_ViT-B_32_{split}.pkl"
    assert [str(path) for path in Path("data").glob("*.pkl")] == [out]
    assert load_features(out).meta["split"] == split
    assert f"next: python evaluate.py --data {out}" in capsys.readouterr().out


def test_a_held_out_validation_folder_is_not_split_again(photos, capsys):
    write("photos/metadata.csv", "file_name,caption\n0.jpg,One.\n1.jpg,Two.\n")
    assert "--split val is one" in error_line(capsys, ["photos", "--split", "val", "--val_share", "0.5"])


class Stopping:
    """An encoder that is interrupted after some batches, and counts them."""

    def __init__(self, encoder, left):
        self.encoder, self.left, self.encoded = encoder, left, 0

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, batch):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.encoded += len(batch)
        return self.encoder.encode(batch)


def test_a_stopped_run_encodes_no_picture_again_in_either_file(photos, monkeypatch):
    write("photos/metadata.csv", "file_name,caption\n" + "".join(f"{number}.jpg,x\n" for number in range(10)))
    argv = ["photos", "--val_share", "0.4", "--batch_size", "2", "--num_workers", "0", "--out"]
    assert parse_folder.main([*argv, "whole.pkl"]) == 0
    stopping = Stopping(load_encoder("ViT-B/32"), 3)
    monkeypatch.setattr(parse_folder, "load_encoder", lambda *_: stopping)
    with pytest.raises(SystemExit) as caught:
        parse_folder.main([*argv, "out.pkl"])
    assert caught.value.code == 130
    assert Path("out_val.pkl").exists()
    assert not Path("out.pkl").exists()
    stopping.left = 100
    assert parse_folder.main([*argv, "out.pkl"]) == 0
    assert stopping.encoded == 10
    for name in ("{}.pkl", "{}_val.pkl"):
        assert Path(name.format("out")).read_bytes() == Path(name.format("whole")).read_bytes()


def test_sounds_go_through_the_sound_encoder_and_pictures_not_through_one_for_sounds(photos, monkeypatch, capsys):
    """The encoder of sounds is a stand-in here: what is tested is who gets which files and which spectrogram."""
    asked = []
    encoder = load_encoder("ViT-B/32")

    class Sounds(Stopping):
        def preprocess(self, path):
            asked.append(path)
            return torch.full((3, 64, 64), float(len(Path(path).read_bytes())))

    def sound_encoder(encoder, spectrogram="mel", pooling="pooled"):
        asked.append(spectrogram)
        return Sounds(encoder, 10)

    monkeypatch.setitem(sys.modules, "features.audio", types.SimpleNamespace(sound_encoder=sound_encoder))
    write("sounds/metadata.csv", "file_name,caption\na.wav,A dog barks.\nb.MP3,Rain.\n")
    for name in ("a.wav", "b.MP3"):
        write(f"sounds/{name}", name)
    assert parse_folder.main(["sounds", *ONE_FILE, "--spectrogram", "published", "--num_workers", "0"]) == 0
    assert asked == ["published", "sounds/a.wav", "sounds/b.MP3"]
    assert texts() == {"a.wav": ["A dog barks."], "b.MP3": ["Rain."]}
    encoder.modality = "audio"
    monkeypatch.setattr(parse_folder, "load_encoder", lambda *_: encoder)
    assert parse_folder.main(["sounds", *ONE_FILE, "--num_workers", "0"]) == 0
    assert asked[3] == "waveform"
    write("photos/0.txt", "x")
    assert "takes sounds, and these are pictures" in error_line(capsys, ["photos", *ONE_FILE])
    write("photos/a.wav", "x")
    write("photos/a.txt", "x")
    assert "captions of pictures and of sounds" in error_line(capsys, ["photos", *ONE_FILE])


def test_user_mistakes_end_in_one_line_and_leave_nothing(photos, capsys):
    assert "holds 10 pictures or sounds and no caption; expected a metadata.csv" in error_line(capsys, ["photos"])
    assert "no folder elsewhere" in error_line(capsys, ["elsewhere"])
    for content, message in (
        ("image,caption\n0.jpg,x\n", "has no column file_name; it has image, caption"),
        ("file_name,label,colour\n0.jpg,x,y\n", "has no column caption or text; it has label, colour. Name one with --caption_column"),
        ("file_name,caption\n0.jpg,A cat, sitting.\n", "has 3 fields in the row that ends in line 2, and 2 columns"),
        ('file_name,caption\n0.jpg,"A cat\n', "is not a proper CSV"),
        ("file_name,caption\n,A cat\n", "has a row 1 without file_name"),
        ("", "has no column file_name; it has none"),
        ("file_name,caption\n0.jpg,\n", "holds 10 pictures or sounds and no caption"),
        ("file_name,caption\n" + "".join(f"gone{n}.jpg,x\n" for n in range(20)), "found 0 of 20; photos/gone0.jpg, for example"),
        ("file_name,caption\n0.jpg,x\n", "1 image(s) with a caption cannot be split in two"),
    ):
        write("photos/metadata.csv", content)
        assert message in error_line(capsys, ["photos"]), content
    write("photos/metadata.csv", "file_name,caption\n0.jpg,Café\n", "latin-1")
    assert parse_folder.main(["photos", "--val_share", "0", "--out", "latin.pkl"]) == 0
    assert "metadata.csv is not UTF-8; read as cp1252" in capsys.readouterr().out
    assert [caption["caption"] for caption in load_features("latin.pkl").captions] == ["Café"]
    Path("latin.pkl").unlink()
    write("photos/metadata.csv", "file_name,caption\n0.jpg,x\n")
    assert "has no column title; it has caption" in error_line(capsys, ["photos", "--caption_column", "title"])
    write("photos/metadata.jsonl", "{}")
    assert "holds metadata.csv and metadata.jsonl" in error_line(capsys, ["photos"])
    Path("photos/metadata.csv").unlink()
    for content, message in (
        ("{}", "has no column file_name; it has none"),
        ('{"file_name": "0.jpg", "caption": "x"}\n{broken', "has a line 2 that is not JSON"),
        ('["0.jpg"]', "has a list in line 1"),
        ('{"file_name": "0.jpg", "caption": 5}', "has a row 1 whose caption is a int (5)"),
    ):
        write("photos/metadata.jsonl", content)
        assert message in error_line(capsys, ["photos"]), content
    for wrong in (["--val_share", "1"], ["--val_share", "-0.1"], ["--spectrogram", "x"]):
        error_line(capsys, ["photos", *wrong])
    assert sorted(path.name for path in Path(".").iterdir()) == ["data", "photos"]
    assert not list(Path("data").glob("*.pkl*"))


@hypothesis.given(
    ids=strategies.lists(strategies.integers() | strategies.text(), min_size=3, unique_by=str),
    first=strategies.floats(0.01, 0.98),
    seed=strategies.integers(),
    shuffled=strategies.randoms(),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_a_split_is_disjoint_complete_and_does_not_depend_on_order(ids, first, seed, shuffled):
    shares = {"train": first, "val": (1 - first) / 2, "test": (1 - first) / 2, "none": 0}
    splits = split_by_image(ids, shares, seed)
    assert list(splits) == list(shares)
    assert not splits["none"]
    assert sum(len(part) for part in splits.values()) == len(ids)
    assert set().union(*splits.values()) == set(ids)
    assert all(splits[name] for name in ("train", "val", "test"))
    again = [*ids, ids[0]]
    shuffled.shuffle(again)
    assert split_by_image(again, shares, seed) == splits
