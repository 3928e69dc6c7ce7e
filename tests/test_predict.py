"""predict.py as its users run it: pictures, folders and feature files in; screen, csv, json, jsonl and a picture out."""

import csv
import io
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import helpers
import predict
import tiny
import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_gpt2):
    """A folder with two small trained checkpoints, the CLIP weights they name, and six pictures."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.save_clip(folder / "data/weights/ViT-B-32.pt", 512, "vit")
    tiny.save_published_features(folder / "oscar_split_ViT-B_32_train.pkl", [[text] for text in tiny.CAPTIONS])
    for number in range(6):
        tiny.save_picture(folder / f"photos/photo {number}.jpg", number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for prefix, more in (("tuned", []), ("frozen", ["--only_prefix", "--mapping_type", "transformer", "--num_layers", "1"])):
            words = ["--data", "oscar_split_ViT-B_32_train.pkl", "--out_dir", "out", "--prefix", prefix, "--gpt2_type", str(tiny_gpt2)]
            words += ["--device", "cpu", "--epochs", "3", "--bs", "4", "--warmup_steps", "1", "--lr", "1e-3", "--prefix_length", "4", *more]
            assert train.main(words) == 0
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def run(*words, code=0):
    words = ["--device", "cpu", "--entry_length", "8", *map(str, words)]
    helpers.call(predict.main, words, code)


TUNED, FROZEN = "out/tuned-002.pt", "out/frozen-002.pt"


def test_one_picture_needs_nothing_but_the_checkpoint(here, capsys):
    run("--checkpoint", TUNED, "photos/photo 1.jpg")
    name, caption = capsys.readouterr().out.splitlines()
    assert name == "photos/photo 1.jpg"
    assert caption.strip()
    run("-C", TUNED, "-I", "photos/photo 1.jpg")
    assert capsys.readouterr().out.splitlines() == [name, caption]


def test_a_folder_gives_one_row_a_picture(here, capsys):
    run("-C", TUNED, "photos", "--out", "captions.csv", "--num_captions", 3)
    rows = list(csv.DictReader(open("captions.csv", encoding="utf-8")))
    assert len(rows) == 18
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "3", "1"]
    scores = [float(row["score"]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True)
    assert all(score < 0 for score in scores)
    assert rows[0]["caption"] in capsys.readouterr().out


def test_the_coco_format_has_one_caption_an_image(here):
    tiny.save_picture(here / "coco/COCO_val2014_000000391895.jpg", 1)
    tiny.save_picture(here / "coco/000000000139.jpg", 2)
    run("-C", TUNED, "coco", "--out", "results.json", "--num_captions", 2)
    results = json.load(open("results.json"))
    assert [result["image_id"] for result in results] == [139, 391895]
    assert set(results[0]) == {"image_id", "caption"}


def test_a_feature_file_is_captioned_row_by_row_whatever_the_batch(here):
    for size in (1, 3, 32):
        run("-C", TUNED, "--data", "oscar_split_ViT-B_32_train.pkl", "--out", f"out{size}.jsonl", "--batch_size", size)
    lines = [open(f"out{size}.jsonl").read() for size in (1, 3, 32)]
    texts = [[json.loads(line)["caption"] for line in text.splitlines()] for text in lines]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == len(tiny.CAPTIONS)
    assert [json.loads(line)["image_id"] for line in lines[0].splitlines()] == [str(1000 + row) for row in range(len(tiny.CAPTIONS))]


def test_a_feature_folder_is_captioned_from_its_files_as_the_file_is(here, monkeypatch):
    from features.embeddings import MappedEmbeddings
    from features.store import load_features, save_features

    features = load_features("oscar_split_ViT-B_32_train.pkl")
    kept = [caption for caption in features.captions if caption["clip_embedding"] != 1]  # a row without a caption is left out
    for out in ("fewer.pkl", "fewer"):
        save_features(out, features.clip_embedding, kept, features.meta)
    most, plain = [], MappedEmbeddings.__getitem__
    monkeypatch.setattr(MappedEmbeddings, "__getitem__", lambda self, index: (most.append(len(plain(self, index))), plain(self, index))[1])
    found = []
    for out in ("fewer.pkl", "fewer"):
        run("-C", TUNED, "--data", out, "--out", "fewer.jsonl", "--batch_size", 2)
        found.append([json.loads(line) for line in open("fewer.jsonl", encoding="utf-8")])
    assert found[0] == found[1]
    assert len(found[0]) == len(tiny.CAPTIONS) - 1
    assert most[-4:] == [2, 2, 2, 1], "a batch at a time"


def test_sampling_does_not_depend_on_the_batch_size(here):
    for size in (2, 8):
        words = ["--decoding", "sample", "--temperature", "2", "--seed", "3", "--num_captions", "2"]
        run("-C", TUNED, "--data", "oscar_split_ViT-B_32_train.pkl", "--out", f"sample{size}.csv", "--batch_size", size, *words)
    first, second = ([row["caption"] for row in csv.DictReader(open(f"sample{size}.csv"))] for size in (2, 8))
    assert first == second
    assert len(set(first)) > 8


def test_half_precision_gives_nearly_the_same_scores(here):
    for precision in ("no", "bf16"):
        words = ["--decoding", "greedy", "--mixed_precision", precision, "--out", f"{precision}.csv"]
        run("-C", TUNED, "--data", "oscar_split_ViT-B_32_train.pkl", *words)
    fp32, bf16 = ([float(row["score"]) for row in csv.DictReader(open(f"{name}.csv"))] for name in ("no", "bf16"))
    assert fp32 != bf16
    assert fp32 == pytest.approx(bf16, rel=0.05)


def test_two_checkpoints_stand_side_by_side(here, capsys):
    run("-C", TUNED, "-C", FROZEN, "photos", "--out", "both.csv", "--plot", "both.png")
    heading = next(csv.reader(open("both.csv")))
    assert heading == ["image_id", "file", "rank", "tuned-002", "score tuned-002", "frozen-002", "score frozen-002"]
    out = capsys.readouterr().out
    assert "  tuned-002: " in out
    assert "  frozen-002: " in out
    assert Image.open("both.png").size[0] > 800
    run("-C", TUNED, "-C", FROZEN, "photos", "--out", "both.json", code=2)


def test_greedy_and_beam_are_what_generate_gives(here, capsys):
    from models.checkpoints import load_checkpoint
    from models.decoding import generate
    from models.encoders import load_encoder

    encoder = load_encoder("ViT-B/32")
    embedding = encoder.encode(encoder.preprocess("photos/photo 2.jpg")[None])
    model = load_checkpoint(TUNED)
    for decoding in ("greedy", "beam"):
        run("-C", TUNED, "photos/photo 2.jpg", "--decoding", decoding)
        [[(text, _)]] = generate(model, embedding, decoding=decoding, entry_length=8)
        assert capsys.readouterr().out.splitlines()[1] == f"  {text}"


def test_a_picture_that_cannot_be_read_is_skipped_and_named(here, capsys):
    (here / "mixed").mkdir()
    tiny.save_picture(here / "mixed/good.jpg", 1)
    (here / "mixed/bad.jpg").write_bytes(b"not a picture")
    run("-C", TUNED, "mixed", "--out", "mixed.csv")
    assert len(list(csv.DictReader(open("mixed.csv")))) == 1
    assert "skipped mixed/bad.jpg" in capsys.readouterr().err
    run("-C", TUNED, "mixed", "--out", "workers.csv", "--num_workers", 2, "--batch_size", 1)
    assert open("workers.csv").read() == open("mixed.csv").read()
    assert "skipped mixed/bad.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["photos"], "no --checkpoint given, which means CLIPxGPT's published weights"),
    (["-C", TUNED], "give pictures or folders, or --data"),
    (["-C", TUNED, "photos", "--data", "x.pkl"], "not both"),
    (["-C", "no.pt", "photos"], "no checkpoint no.pt"),
    (["-C", TUNED, "nowhere.jpg"], "no picture or folder nowhere.jpg"),
    (["-C", TUNED, "data"], "holds no picture"),
    (["-C", TUNED, "--data", "narrow.pkl"], "640-wide embeddings"),
    (["-C", TUNED, "photos", "--clip_model_type", "RN50x4"], "RN50x4"),
    (["-C", TUNED, "photos", "--clip_model_type", "nonsense"], "nonsense"),
    (["-C", TUNED, "photos", "--num_captions", "9"], "num_captions is 9"),
    (["-C", TUNED, "photos", "--decoding", "greedy", "--num_captions", "2"], "num_captions is 2"),
    (["-C", TUNED, "photos", "--beam_size", "0"], "beam_size is 0"),
    (["-C", TUNED, "photos", "--top_p", "0"], "top_p is 0"),
    (["-C", TUNED, "photos", "--stop_token", "the end of it"], "expected one"),
    (["-C", TUNED, "photos", "--out", "captions.xlsx"], ".csv, .json or .jsonl"),
    (["-C", TUNED, "photos", "--out", "results.json/captions.csv"], "cannot write"),
    (["-C", "no.pt", "photos", "--out", "folder.csv"], "cannot write folder.csv: it is a folder"),
    (["-C", "no.pt", "photos", "--plot", "folder.csv"], "cannot write folder.csv: it is a folder"),
    (["-C", TUNED, "photos", "--device", "tpu"], "no device tpu here"),
    (["-C", TUNED, "photos", "--batch_size", "0"], "--batch_size is 0"),
    (["-C", TUNED, "photos", "--num_workers", "-1"], "--num_workers is -1"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(here, capsys, words, message):
    if "narrow.pkl" in words:
        tiny.save_published_features(here / "narrow.pkl", [["a dog"]], width=640)
    (here / "results.json").write_text("[]")
    (here / "folder.csv").mkdir(exist_ok=True)
    before = sorted(path.name for path in here.rglob("*"))
    run(*words, code=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("predict.py: error: ")
    assert sorted(path.name for path in here.rglob("*")) == before


def test_a_checkpoint_without_an_encoder_asks_for_one(here, capsys):
    state = dict(torch.load(TUNED))  # without the config that it carries
    fields = json.load(open("out/tuned.json"))
    fields["model"]["encoder"] = None
    torch.save(state, "out/unknown.pt")
    json.dump(fields, open("out/unknown.json", "w"))
    run("-C", "out/unknown.pt", "photos", code=2)
    assert "Give --clip_model_type" in capsys.readouterr().err
    run("-C", "out/unknown.pt", "photos", "--clip_model_type", "ViT-B/32")


# -- Files and names of any kind -------------------------------------------------------------------------------------------


class Picky:
    """An encoder that cannot read one picture; its embedding is the picture's own number."""

    def __init__(self, refused):
        self.refused, self.device, self.many_views, self.width, self.pooling = refused, torch.device("cpu"), False, 1, "pooled"

    def preprocess(self, path):
        if path.name == self.refused:
            raise ValueError("cannot be read")
        return torch.tensor([float(path.stem)])

    def encode(self, batch):
        return batch


def test_encoders_that_skip_different_pictures_are_joined_by_picture(tmp_path):
    from prediction.inputs import encode_files

    paths = [tmp_path / f"{number}.jpg" for number in range(5)]
    said = []
    encoders = [Picky("1.jpg"), Picky("3.jpg")]
    inputs = encode_files(paths, [tmp_path] * 5, [*encoders, encoders[0]], False, said.append, batch_size=2, num_workers=0)
    assert inputs.ids == ["0.jpg", "2.jpg", "4.jpg"]
    assert [path.name for path in inputs.paths] == inputs.ids
    assert [embedding.flatten().tolist() for embedding in inputs.embeddings] == [[0, 2, 4]] * 3
    assert len(said) == 2
    assert "1.jpg" in said[0]
    assert "3.jpg" in said[1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_and_captions_that_a_terminal_cannot_show_are_escaped_and_cost_no_file(here, monkeypatch, encoding):
    names = [b"odd/caf\xe9.jpg", "odd/雨😀.jpg".encode()]
    for number, name in enumerate(names):
        tiny.save_picture(os.fsdecode(b"plain.jpg"), number)
        os.makedirs("odd", exist_ok=True)
        os.replace("plain.jpg", name)
    for suffix in ("csv", "jsonl", "json"):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        run("-C", TUNED, "odd", "--text_prompt", "雨 …", "--out", f"odd.{suffix}")
        monkeypatch.undo()
        os.chdir(here)
        terminal.flush()
        assert f"wrote odd.{suffix}".encode() in terminal.buffer.getvalue()
        text = open(f"odd.{suffix}", encoding="utf-8").read()
        assert "雨 …" in text
        assert "雨😀.jpg" in text
        assert "caf\\xe9.jpg" in text.replace("\\\\", "\\")


def test_ids_of_numpy_and_torch_and_half_emoji_are_written(here):
    ids = [np.int64(7), torch.tensor(8), np.array([9]), "half \ud83d", 10]
    captions = [{"image_id": image_id, "caption": "a dog \ud83d", "clip_embedding": row} for row, image_id in enumerate(ids)]
    with open("ids.pkl", "wb") as file:
        pickle.dump({"clip_embedding": torch.randn(5, 512), "captions": captions}, file)
    for suffix in ("csv", "jsonl", "json"):
        run("-C", TUNED, "--data", "ids.pkl", "--out", f"ids.{suffix}")
    assert [row["image_id"] for row in json.load(open("ids.json"))] == [7, 8, 9, "half \ufffd", 10]
    words = ["--data", "ids.pkl", "--metrics", "rouge", "--bootstrap", "0", "--out", "scores.json"]
    for suffix in ("csv", "jsonl", "json"):
        evaluate.main(["--predictions", f"ids.{suffix}", *words])
        assert len(json.load(open("scores.predictions.json", encoding="utf-8"))) == 5


def test_embeddings_of_another_encoder_or_form_are_refused_before_anything_is_decoded(here, capsys):
    from features.store import load_features, save_features

    features = load_features("oscar_split_ViT-B_32_train.pkl")
    for name, embedding, meta, expected in (
        ("other.pkl", features.clip_embedding, {"encoder": "ViT-B/16"}, "holds embeddings of ViT-B/16"),
        ("normal.pkl", features.clip_embedding, {"encoder": "ViT-B/32", "normalized": True}, "holds normalised embeddings"),
        ("several.pkl", features.clip_embedding[:, None].repeat(1, 3, 1), {"encoder": "ViT-B/32"}, "several embeddings per image"),
    ):  # fmt: skip
        save_features(name, embedding, features.captions, {**features.meta, **meta})
        run("-C", TUNED, "--data", name, code=2)
        assert expected in capsys.readouterr().err
        with pytest.raises(SystemExit):
            evaluate.main(["--checkpoint", TUNED, "--data", name, "--metrics", "rouge", "--device", "cpu"])
        assert expected in capsys.readouterr().err
