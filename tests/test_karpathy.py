"""parse_coco.py on Karpathy's dataset_coco.json and on nocaps."""

import functools
import json
from pathlib import Path

import pytest
import torch

import helpers
import parse_coco
import tiny
import train
from features.store import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_coco.main)
OUT = "data/coco/oscar_split_ViT-B_32_{}.pkl"
SPLITS = ["train", "restval", "val", "test", "train", "restval"]


@pytest.fixture
def tree(workdir):
    """data/coco with one picture for each of SPLITS under their 2014 names, and dataset_coco.json as published."""
    images = []
    for number, split in enumerate(SPLITS):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{500 + number:012d}.jpg"
        tiny.save_picture(f"data/coco/{folder}/{name}", number)
        sentences = [{"tokens": ["a"], "raw": f"Sentence {text} of {split} {number}.", "imgid": number, "sentid": 10 * number + text}
                     for text in range(2)]  # fmt: skip
        images.append({"filepath": folder, "sentids": [one["sentid"] for one in sentences], "filename": name, "imgid": number,
                       "split": split, "sentences": sentences, "cocoid": 500 + number})  # fmt: skip
    write_json("data/coco/annotations/dataset_coco.json", {"images": images, "dataset": "coco"})
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def write_json(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


def parse(*words):
    return parse_coco.main(["--annotations", "data/coco/annotations/dataset_coco.json", "--num_workers", "0", *words])


def test_train_and_restval_are_the_papers_training_set(tree):
    assert parse() == 0
    features = load_features(OUT.format("train"))
    assert [caption["image_id"] for caption in features.captions] == [500, 500, 501, 501, 504, 504, 505, 505]
    first = features.captions[3]
    assert (first["caption"], first["id"], first["file_name"]) == ("Sentence 1 of restval 1.", 11, "COCO_val2014_000000000501.jpg")
    assert features.meta["split"] == "train"
    assert train.main(f"--data {OUT.format('train')} --out_dir o --gpt2_type {tiny.save_gpt2('gpt2', width=16, layers=1, heads=2)} "
                      "--epochs 1 --bs 4 --warmup_steps 2 --device cpu --prefix_length 2".split()) == 0  # fmt: skip
    assert Path("o/coco_prefix-000.pt").exists()


@pytest.mark.parametrize(("split", "name", "ids"), [
    (["val"], "val", [502]), (["test"], "test", [503]), (["restval"], "restval", [501, 505]), (["val", "test"], "val_test", [502, 503]),
    (["restval", "train"], "train", [500, 501, 504, 505])])  # fmt: skip
def test_each_split_has_its_own_images_and_file(split, name, ids, tree):
    assert parse("--split", *split) == 0
    features = load_features(OUT.format(name))
    assert features.meta["split"] == name
    assert [caption["image_id"] for caption in features.captions][::2] == ids


def test_pictures_of_2017_serve_for_karpathys_names(tree):
    for path in Path("data/coco").glob("*2014/*.jpg"):
        target = Path("data/coco/train2017") / path.name[-16:]
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    assert parse() == 0
    assert load_features(OUT.format("train")).meta["images"] == 4


def test_nocaps_keeps_the_domain_and_takes_no_coco_picture_of_the_same_number(tree, capsys):
    images = [{"id": 500 + number, "open_images_id": f"{number}aa", "file_name": f"{number}aa.jpg", "domain": domain}
              for number, domain in enumerate(("in-domain", "near-domain", "out-domain"))]  # fmt: skip
    captions = [{"image_id": 500 + number % 3, "id": number, "caption": f"A thing {number}."} for number in range(6)]
    write_json("data/nocaps/nocaps_val_4500_captions.json", {"licenses": [], "info": {}, "images": images, "annotations": captions})
    command = ["--annotations", "data/nocaps/nocaps_val_4500_captions.json"]
    line = error_line(capsys, [*command, "--images", "data/coco"])
    assert "found 0 of 3; data/coco/0aa.jpg" in line, "picture 500 of COCO is another one"
    for number in range(3):
        tiny.save_picture(f"data/nocaps/val/{number}aa.jpg", 20 + number)
    assert parse_coco.main(command) == 0
    features = load_features("data/nocaps/oscar_split_ViT-B_32_val.pkl")
    assert [caption["domain"] for caption in features.captions] == [
        "in-domain", "in-domain", "near-domain", "near-domain", "out-domain", "out-domain"]  # fmt: skip
    assert features.captions[2]["image_id"] == 501
    assert features.meta["split"] == "val"
    assert torch.isfinite(features.clip_embedding).all()
    write_json("data/nocaps/nocaps_test_image_info.json", {"images": images[:2], "annotations": []})
    assert "lists 2 images and no caption" in error_line(capsys, ["--annotations", "data/nocaps/nocaps_test_image_info.json"])


def test_user_mistakes_end_in_one_line(tree, capsys):
    write_json("list.json", [{"image_id": 500, "caption": "A."}])
    assert "--split chooses among" in error_line(capsys, ["--annotations", "list.json", "--split", "val"])
    assert "invalid choice: 'everything'" in error_line(capsys, ["--annotations", "list.json", "--split", "everything"])
    flickr = {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A."}]}]}
    write_json("flickr.json", flickr)
    assert "parse_flickr.py" in error_line(capsys, ["--annotations", "flickr.json"])
    write_json("broken.json", {"images": [*flickr["images"], {"filename": "1.jpg", "split": "train", "sentences": [{"tokens": []}]}]})
    assert "broken.json has no images[1].sentences[0].raw" in error_line(capsys, ["--annotations", "broken.json"])
    write_json("none.json", {"images": [{"filename": "COCO_val2014_000000000502.jpg", "split": "val", "cocoid": 502, "sentences": []}]})
    assert "no image with a caption" in error_line(capsys, ["--annotations", "none.json", "--split", "val"])
