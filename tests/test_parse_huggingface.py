"""parse_huggingface.py from the command line, on data sets saved to disk, as parquet, and as a folder of pictures."""

import functools
import json
import os
import pickle
import sys
import types
from pathlib import Path

import datasets
import pytest
import torch

import helpers
import parse_huggingface
import tiny
import train
from features.rows import lazy_records
from features.store import load_features
from features.tables import texts_of

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_huggingface.main)
CAPTIONS = ["一只猫 🐈", "Two dogs.", "A plate of food.", "Late evening ✨ #sun", "A train.", "Kites at the beach."]


@pytest.fixture
def world(workdir, monkeypatch):
    """saved/ (train and test, by save_to_disk), shards/ (parquet), pictures/ (six, with metadata.csv); small weights for ViT-B/32."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "cache")
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    pictures = [tiny.save_picture(f"pictures/{number}.jpg", number) for number in range(6)]
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "likes": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": cells, "caption": CAPTIONS, "likes": range(6)}, features=features)
    datasets.DatasetDict({"train": data.select(range(4)), "test": data.select((4, 5))}).save_to_disk("saved")
    Path("shards").mkdir()
    data.select(range(3)).to_parquet("shards/train-00000-of-00002.parquet")
    data.select(range(3, 6)).to_parquet("shards/train-00001-of-00002.parquet")
    rows = "".join(f'{number}.jpg,"{text}"\n' for number, text in enumerate(CAPTIONS))
    Path("pictures/metadata.csv").write_text("file_name,text\n" + rows, encoding="utf-8")
    return workdir


def rows_of(path):
    """Feature file → [(image_id, caption)], embeddings of the captions [C, D]."""
    features = load_features(path)
    return [(row["image_id"], row["caption"]) for row in features.captions], features.clip_embedding[torch.tensor(features.caption_rows)]


def test_a_data_set_saved_to_disk_gives_a_file_a_split_that_trains(world, tiny_gpt2):
    assert parse_huggingface.main(["saved"]) == 0
    assert parse_huggingface.main(["saved", "--split", "test"]) == 0
    captions, embeddings = rows_of("data/saved_ViT-B_32_train.pkl")
    assert captions == list(enumerate(CAPTIONS[:4]))
    assert rows_of("data/saved_ViT-B_32_test.pkl")[0] == list(enumerate(CAPTIONS[4:]))
    from models.encoders import load_encoder

    encoder = load_encoder("ViT-B/32")
    expected = encoder.encode(torch.stack([encoder.preprocess(f"pictures/{number}.jpg") for number in range(4)]))
    assert torch.allclose(embeddings, expected, atol=1e-5)
    meta = load_features("data/saved_ViT-B_32_test.pkl").meta
    assert (meta["source"], meta["split"]) == ("saved", "test")
    short = "--max_steps 2 --bs 4 --warmup_steps 1 --device cpu --prefix_length 2 --out_dir out --gpt2_type".split()
    files = ["--data", "data/saved_ViT-B_32_train.pkl", "--val_data", "data/saved_ViT-B_32_test.pkl"]
    assert train.main([*files, *short, str(tiny_gpt2)]) == 0


@pytest.mark.parametrize("source", ["shards", "pictures"])
def test_streaming_and_workers_give_the_rows_of_a_plain_run(source, world):
    written = []
    for number, options in enumerate(([], ["--streaming"], ["--num_workers", "2", "--batch_size", "2"])):
        assert parse_huggingface.main([source, "--out", f"{number}.pkl", *options]) == 0
        written.append(rows_of(f"{number}.pkl"))
    assert written[0][0] == list(enumerate(CAPTIONS)) == written[1][0] == written[2][0]
    assert all(torch.allclose(written[0][1], embeddings, atol=1e-5) for _, embeddings in written[1:])
    assert not Path("1.pkl.rows").exists()


def test_only_the_first_rows_are_read_and_a_part_of_a_split_may_be_named(world):
    for options in (["--max_rows", "4"], ["--max_rows", "4", "--streaming"], ["--split", "train[:4]"]):
        assert parse_huggingface.main(["shards", "--out", "x.pkl", *options]) == 0
        assert rows_of("x.pkl")[0] == list(enumerate(CAPTIONS[:4]))
    assert parse_huggingface.main(["shards/train-00001-of-00002.parquet", "--max_rows", "99"]) == 0
    assert rows_of("data/train-00001-of-00002_ViT-B_32_train.pkl")[0] == list(enumerate(CAPTIONS[3:]))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_columns_are_found_by_type_or_named_and_rows_of_one_image_joined(streaming, world):
    path = Path("pictures/0.jpg").resolve()
    rows = [{"shot": str(path), "note": ["a", "b"], "group": 7}, {"shot": "pictures/1.jpg", "note": ["c"], "group": 7},
            {"shot": "pictures/2.jpg", "note": None, "group": 8}, {"shot": "pictures/3.jpg", "note": ["d " * 300], "group": None},
            {"shot": None, "note": ["e"], "group": 9}]  # fmt: skip
    Path("notes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    argv = ["notes.jsonl", "--image_column", "shot", "--id_column", "group", "--out", "x.pkl", *streaming]
    assert parse_huggingface.main(argv) == 0
    assert rows_of("x.pkl")[0] == [(7, "a"), (7, "b"), (7, "c"), ("row 3", "d " * 300)], "kept whole; the image is the first row's"
    meta = load_features("x.pkl").meta
    assert (meta["images_without_caption"], meta["skipped"], meta["images"]) == (1, 1, 2)
    assert "9,,nothing in this row" in Path("x.pkl.skipped.csv").read_text()
    assert parse_huggingface.main(["saved", "--val_share", "0.5", "--caption_column", "caption", "--out", "two.pkl", *streaming]) == 0
    assert sorted(rows_of("two.pkl")[0] + rows_of("two_val.pkl")[0]) == list(enumerate(CAPTIONS[:4]))


def test_records_of_a_big_data_set_hold_no_picture(workdir):
    cells = [{"bytes": bytes([number]) * 100_000, "path": None} for number in range(50)]
    data = datasets.Dataset.from_dict({"image": cells, "caption": [f"Number {number}." for number in range(50)]})
    data.save_to_disk("big")
    records = lazy_records(datasets.load_from_disk("big"), "image", ["caption"], None, None)
    kept = pickle.dumps(records)
    assert len(kept) < 20_000, "not even when they go to a worker"
    assert [record.image.read()[0] for record in pickle.loads(kept)] == list(range(50))
    assert len({record.image.key for record in records}) == 50


def test_a_stream_that_broke_off_goes_on_where_it_stopped(world, monkeypatch, capsys):
    fetched = []
    fetch = parse_huggingface.fetched_records.__globals__["_fetch"]

    def breaking(cell, folder):
        if len(fetched) == 4:
            fetched.append("broken")
            raise ConnectionError("gone")
        fetched.append(cell)
        return fetch(cell, folder)

    monkeypatch.setitem(parse_huggingface.fetched_records.__globals__, "_fetch", breaking)
    argv = ["shards", "--streaming", "--out", "x.pkl"]
    assert "the stream broke off after 4 rows (gone). Run the same command again" in error_line(capsys, argv)
    with open("x.pkl.rows/rows.jsonl", "a") as file:
        file.write('[17, 4, ["half')
    assert parse_huggingface.main(argv) == 0
    assert len(fetched) == 7
    assert rows_of("x.pkl")[0] == list(enumerate(CAPTIONS))


def test_sounds_are_handed_over_undecoded(world, monkeypatch):
    """The encoder of sounds is a stand-in here: what is tested is what it is given."""
    asked = []

    def sound_encoder(encoder, spectrogram="mel", pooling="pooled"):
        preprocess = encoder.preprocess
        encoder.preprocess = lambda sound: asked.append((spectrogram, sound)) or preprocess("pictures/0.jpg")
        return encoder

    monkeypatch.setitem(sys.modules, "features.audio", types.SimpleNamespace(sound_encoder=sound_encoder))
    cells = [{"bytes": b"one", "path": "a.wav"}, {"bytes": b"two", "path": "b.wav"}]
    data = datasets.Dataset.from_dict({"audio": cells, "caption": [["Rain.", "Water."], ["A dog."]]})
    data = data.cast_column("audio", datasets.Audio())
    data.save_to_disk("sounds")
    data.to_parquet("sounds.parquet")
    for argv in (["sounds"], ["sounds.parquet", "--streaming", "--spectrogram", "published"]):
        assert parse_huggingface.main([*argv, "--num_workers", "0"]) == 0
        assert rows_of("data/sounds_ViT-B_32_train.pkl")[0] == [(0, "Rain."), (0, "Water."), (1, "A dog.")]
    # Threads read the sounds, in no fixed order.
    assert sorted(asked[:2]) == [("mel", b"one"), ("mel", b"two")]
    assert [how for how, _ in asked[2:]] == ["published"] * 2


def test_captions_may_be_texts_lists_or_dicts():
    assert texts_of({"raw": "A cat.", "tokens": ["A", "cat"]}) == ["A cat."]
    assert texts_of([{"caption": "One."}, "Two.", None]) == ["One.", "Two."]
    assert texts_of(None) == texts_of(float("nan")) == texts_of([]) == []
    for wrong in (5, {"tokens": []}, [5]):
        with pytest.raises(ValueError):
            texts_of(wrong)


def test_a_hub_name_without_a_network_says_how_to_pass_a_folder(world, monkeypatch, capsys):
    line = error_line(capsys, ["kkcosmos/instagram-images-with-captions"])
    assert "the hub cannot be reached" in line
    assert "`hf download kkcosmos/instagram-images-with-captions --repo-type dataset --local-dir FOLDER`, and give FOLDER" in line
    assert "the hub cannot be reached" in error_line(capsys, ["kkcosmos/instagram-images-with-captions", "--streaming"])
    probed = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(parse_huggingface, "hub_is_reachable", lambda address: probed.append(address))
    assert "the hub cannot be reached" in error_line(capsys, ["owner/name"])
    assert probed == ["https://huggingface.co"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_user_mistakes_end_in_one_line_and_leave_nothing(world, capsys):
    Path("numbers.csv").write_text("image,caption\npictures/0.jpg,5\n")
    Path("broken.parquet").write_bytes(b"PAR1 no")
    Path("empty.csv").write_text("image,caption\n")
    Path("addresses.csv").write_text("image,caption\n" + "https://example.org/a.jpg,x\n" * 20)
    before = sorted(path.name for path in Path(".").iterdir())
    for argv, message in (
        (["./nowhere"], "no folder or file ./nowhere"),
        (["saved", "--split", "validation"], "saved has no split validation; it has train, test. Name one with --split"),
        (["shards", "--split", "validation"], "Unknown split"),
        (["shards", "--split", "validation", "--streaming"], "Bad split"),
        (["saved", "--image_column", "picture"], "saved (train) has no column picture; it has image, caption, likes"),
        (["saved", "--caption_column", "title"], "saved (train) has no column title; it has image, caption, likes"),
        (["saved", "--caption_column", "likes"], "row 0 has a caption that is a int (0)"),
        (["saved", "--id_column", "post"], "has no column post; it has image, caption, likes"),
        (["numbers.csv"], "row 0 has a caption that is a int (5)"),
        (["broken.parquet"], "broken.parquet cannot be read as a data set"),
        (["empty.csv"], "empty.csv"),
        (["addresses.csv"], "an address, https://example.org/a.jpg, not a picture: --streaming downloads it"),
        (["data/weights/ViT-B-32.pt"], "is not a file of a data set; expected .parquet"),
        (["data/weights"], "cannot be read as a data set"),
        (["saved", "--split", "test", "--max_rows", "1", "--val_share", "0.5"], "1 image(s) with a caption cannot be split in two"),
        (["saved", "--clip_model_type", "ViT-B/33"], "no encoder and no file named ViT-B/33"),
        (["saved", "--max_rows", "0"], "--max_rows"),
    ):
        assert message in error_line(capsys, argv), argv
    assert not list(Path("data").glob("*.pkl"))
    assert sorted(path.name for path in Path(".").iterdir() if path.name != "cache") == before
