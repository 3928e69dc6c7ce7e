"""parse_coco.py from the command line, in trees laid out as COCO is."""

import csv
import functools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import helpers
import parse_coco
import tiny
from features.store import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_coco.main)
PUBLISHED_OUT = Path("data/coco/oscar_split_ViT-B_32_train.pkl")


@pytest.fixture
def tree(workdir):
    """data/coco as the published recipe has it: 5 images in train2014, 2 in val2014, 14 captions, ids as strings; small weights."""
    rows = []
    for number in range(7):
        folder = "train2014" if number < 5 else "val2014"
        tiny.save_picture(workdir / "data" / "coco" / folder / f"COCO_{folder}_{318556 + number:012d}.jpg", number)
    for number in (0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0):
        rows.append({"image_id": str(318556 + number), "caption": tiny.CAPTIONS[number], "id": str(len(rows) + 48)})
    write_json("data/coco/annotations/train_caption.json", rows)
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def write_json(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


def expected_embedding(path, weights="data/weights/ViT-B-32.pt"):
    """One picture through CLIP's own library."""
    import clip
    from PIL import Image

    model, preprocess = clip.load(weights, device="cpu")
    with torch.no_grad():
        return model.encode_image(preprocess(Image.open(path))[None])[0]


def files():
    return sorted(str(path) for path in Path(".").rglob("*"))


def test_the_published_command_writes_one_row_an_image_and_every_caption(tree, capsys):
    assert parse_coco.main(["--clip_model_type", "ViT-B/32"]) == 0
    with open(PUBLISHED_OUT, "rb") as file:
        content = pickle.load(file)  # as the published train.py reads it
    assert content["clip_embedding"].shape == (7, 512)
    assert content["clip_embedding"].dtype == torch.float32
    assert [caption["clip_embedding"] for caption in content["captions"]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    first, last = content["captions"][0], content["captions"][-1]
    assert (first["image_id"], first["caption"], first["id"]) == ("318556", tiny.CAPTIONS[0], "48")
    assert (last["image_id"], last["file_name"]) == ("318562", "COCO_val2014_000000318562.jpg")
    for row, path in ((0, "train2014/COCO_train2014_000000318556.jpg"), (6, "val2014/COCO_val2014_000000318562.jpg")):
        assert torch.allclose(content["clip_embedding"][row], expected_embedding(f"data/coco/{path}"), atol=1e-5)
    meta = load_features(PUBLISHED_OUT).meta
    assert meta["encoder"] == "ViT-B/32"
    assert (meta["images"], meta["captions"], meta["skipped"], meta["width"]) == (7, 14, 0, 512)
    assert meta["normalized"] is False
    assert meta["split"] == "train"
    assert meta["preprocessing"]["image_size"] == 64
    told = capsys.readouterr().out
    assert f"7 images, 14 captions -> {PUBLISHED_OUT} (512 wide" in told
    assert f"python train.py --data {PUBLISHED_OUT}" in told
    assert not [name for name in files() if "pieces" in name or "skipped" in name or name.endswith(".tmp")]


def test_cocos_own_json_is_read_under_2017_and_2014_names(tree):
    for number in range(5):
        shutil.copy(f"data/coco/train2014/COCO_train2014_{318556 + number:012d}.jpg", tree / f"{318556 + number:012d}.jpg")
    (tree / "flat").mkdir()
    (tree / "other" / "train2017").mkdir(parents=True)
    for number in range(5):
        shutil.move(tree / f"{318556 + number:012d}.jpg", tree / ("flat" if number < 2 else "other/train2017"))
    annotations = [{"image_id": 318556 + number % 5, "id": 100 + number, "caption": f"Caption {number}."} for number in range(10)]
    short, long = "{:012d}.jpg", "COCO_train2014_{:012d}.jpg"
    for names, folders in ((short, ["flat", "other"]), (long, ["data/coco"]), (short, ["data/coco"])):
        images = [{"id": 318556 + number, "file_name": names.format(318556 + number)} for number in range(5)]
        write_json("captions_val2017.json", {"info": {}, "licenses": [], "images": images, "annotations": annotations})
        assert parse_coco.main(["--annotations", "captions_val2017.json", "--images", *folders]) == 0
        features = load_features("data/coco/oscar_split_ViT-B_32_val.pkl")
        assert features.clip_embedding.shape == (5, 512)
        assert features.meta["split"] == "val"
        assert [caption["image_id"] for caption in features.captions[::2]] == list(range(318556, 318561))
        for row in (0, 4):
            expected = expected_embedding(f"data/coco/train2014/COCO_train2014_{318556 + row:012d}.jpg")
            assert torch.allclose(features.clip_embedding[row], expected, atol=1e-5)


def test_a_file_in_cocos_format_may_name_pictures_as_it_likes(tree):
    odd = ["no number.jpg", "sub/ü\n.jpg", "x" * 251 + ".jpg"]
    for number, name in enumerate(odd):
        tiny.save_picture(Path("mine") / name, number)
    write_json("mine.json", {"images": [{"id": name[:5], "file_name": name} for name in odd],
                             "annotations": [{"image_id": name[:5], "caption": f" {name[:2]} "} for name in odd]})  # fmt: skip
    assert parse_coco.main(["--annotations", "mine.json", "--images", "mine", "--out", "new folder/mine.pkl"]) == 0
    captions = load_features("new folder/mine.pkl").captions
    assert [caption["id"] for caption in captions] == [0, 1, 2], "captions without an id get a running number"
    assert [caption["file_name"] for caption in captions] == [Path(name).name for name in odd]


@pytest.mark.parametrize(("name", "width"), [("RN50x4", 640), ("tinyvit", 576), ("data/weights/small-RN.pt", 640)])
def test_other_encoders_name_their_file_as_published(name, width, tree):
    if name == "tinyvit":
        tiny.save_tinyvit("data/weights/tinyvit")
        write_json("data/coco/annotations/train_caption.json", [{"image_id": 318556, "caption": "A cat.", "id": 1}])
    else:
        tiny.save_clip("data/weights/RN50x4.pt" if name == "RN50x4" else name, width, "resnet")
    assert parse_coco.main(["--clip_model_type", name]) == 0
    features = load_features(f"data/coco/oscar_split_{Path(name).stem}_train.pkl")
    assert features.width == width
    assert features.meta["encoder"] == name


def test_bytes_do_not_depend_on_workers_and_embeddings_hardly_on_batch_size(tree):
    written = []
    for options in (["--num_workers", "0"], ["--num_workers", "2"], ["--num_workers", "0", "--save_seconds", "0"]):
        parse_coco.main(["--batch_size", "3", *options])
        written.append(PUBLISHED_OUT.read_bytes())
    assert written[0] == written[1] == written[2]
    rows = load_features(PUBLISHED_OUT).clip_embedding
    parse_coco.main(["--batch_size", "64", "--num_workers", "0"])
    assert torch.allclose(rows, load_features(PUBLISHED_OUT).clip_embedding, atol=1e-5)


def test_workers_send_pictures_through_a_pipe_where_shared_memory_is_scarce(tree, monkeypatch):
    parse_coco.main(["--num_workers", "2"])
    written = PUBLISHED_OUT.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20))
    parse_coco.main(["--num_workers", "2"])
    assert PUBLISHED_OUT.read_bytes() == written


def test_a_picture_that_cannot_be_read_is_skipped_counted_and_listed(tree, capsys):
    Path("data/coco/train2014/COCO_train2014_000000318557.jpg").write_bytes(b"")
    Path("data/coco/train2014/COCO_train2014_000000318559.jpg").unlink()
    assert parse_coco.main([]) == 0
    features = load_features(PUBLISHED_OUT)
    assert features.clip_embedding.shape == (5, 512)
    assert len(features.captions) == 10
    assert features.meta["skipped"] == 2
    assert {caption["image_id"] for caption in features.captions} == {"318556", "318558", "318560", "318561", "318562"}
    assert torch.allclose(features.clip_embedding[4], expected_embedding("data/coco/val2014/COCO_val2014_000000318562.jpg"), atol=1e-5)
    listed = Path(f"{PUBLISHED_OUT}.skipped.csv")
    with open(listed, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image_id"], row["reason"]) for row in rows] == [("318557", "empty: zero bytes"), ("318559", "no such file")]
    assert rows[0]["path"] == "data/coco/train2014/COCO_train2014_000000318557.jpg"
    assert "2 skipped" in capsys.readouterr().out
    PUBLISHED_OUT.unlink()
    assert "found 6 of 7" in error_line(capsys, ["--max_skipped", "0"])
    assert not PUBLISHED_OUT.exists()
    for number in (1, 3):
        tiny.save_picture(f"data/coco/train2014/COCO_train2014_{318556 + number:012d}.jpg", number)
    assert parse_coco.main(["--max_skipped", "0"]) == 0
    assert not listed.exists(), "an old list does not stay"


def test_too_many_unreadable_pictures_stop_the_job(tree, capsys):
    for number in (1, 2):
        Path(f"data/coco/train2014/COCO_train2014_{318556 + number:012d}.jpg").write_text("not a picture")
    line = error_line(capsys, ["--max_skipped", "1", "--batch_size", "2", "--num_workers", "0"])
    assert "at most 1 may be skipped" in line
    assert "not a picture" in line
    assert not PUBLISHED_OUT.exists()
    assert Path(f"{PUBLISHED_OUT}.skipped.csv").exists()
    for path in Path("data/coco").glob("*2014/*.jpg"):
        path.write_text("not a picture")
    assert "7 of 7 images could not be read" in error_line(capsys, [])


def test_user_mistakes_end_in_one_line_and_leave_nothing(tree, capsys):
    write_json("dict.json", {"annotations": 3})
    write_json("instances.json", {"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]})
    write_json("names.json", [{"image_id": "a cat", "caption": "A cat."}])
    write_json("empty.json", [])
    write_json("number.json", 5)
    write_json("blank.json", [{"image_id": 318556, "caption": " \n"}])
    Path("text.json").write_text("{broken")
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    before = files()
    for annotations, message in (
        ("nowhere.json", "no annotations nowhere.json"),
        ("dict.json", "holds a dict with annotations; expected"),
        ("instances.json", "instances.json has no annotations[0].caption"),
        ("names.json", "neither a COCO number nor listed"),
        ("empty.json", "no image with a caption"),
        ("blank.json", "no image with a caption"),
        ("number.json", "holds a int"),
        ("text.json", "is not JSON"),
        ("binary.json", "is not JSON"),
    ):
        assert message in error_line(capsys, ["--annotations", annotations])
    line = error_line(capsys, ["--images", "elsewhere"])
    assert "found 0 of 7; elsewhere/train2014/COCO_train2014_000000318556.jpg, for example, is missing" in line
    assert "no encoder and no file named ViT-B/33" in error_line(capsys, ["--clip_model_type", "ViT-B/33"])
    assert "no device" in error_line(capsys, ["--device", "toaster"])
    assert "cannot write dict.json/x.pkl" in error_line(capsys, ["--out", "dict.json/x.pkl"])
    assert "is a folder" in error_line(capsys, ["--out", "data"])
    for wrong in (["--batch_size", "0"], ["--num_workers", "-1"], ["--max_skipped", "many"], ["--max_skipped", "-3"], ["--imag", "x"]):
        error_line(capsys, wrong)
    assert files() == before


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_at_random_moments_the_result_has_the_same_bytes(kills, tree, root):
    rows = []
    for number in range(150):
        tiny.save_picture(f"data/coco/train2014/COCO_train2014_{number:012d}.jpg", number)
        rows.append({"image_id": number, "caption": f"Caption {number}.", "id": number})
    write_json("many.json", rows)
    options = ["--annotations", "many.json", "--batch_size", "4", "--save_seconds", "0", "--num_workers", "1"]
    parse_coco.main([*options, "--out", "whole.pkl"])
    command = [sys.executable, str(root / "parse_coco.py"), *options, "--out", "killed.pkl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(0)

    def pieces():
        return len(list(Path(".").glob("killed.pkl.pieces/*.npz")))

    for _ in range(kills):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        wanted = pieces() + moments.randint(1, 6)
        while process.poll() is None and pieces() < wanted:
            time.sleep(moments.random() * 0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < pieces() < 38, "the kills came in the middle"
    parse_coco.main([*options, "--out", "killed.pkl"])
    assert Path("killed.pkl").read_bytes() == Path("whole.pkl").read_bytes()
    assert not Path("killed.pkl.pieces").exists()


def test_help_loads_no_heavy_library(root):
    shown = subprocess.run([sys.executable, "parse_coco.py", "--help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "--annotations" in shown
    assert "--max_skipped" in shown
    heavy = "import sys, parse_coco; print([name for name in ('torch', 'clip', 'timm', 'skimage', 'tqdm') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_eighty_photographs_of_coco_2017_give_eighty_rows_and_four_hundred_captions(tree, shared_data):
    coco = shared_data / "coco_mini"
    assert parse_coco.main(["--annotations", str(coco / "captions_train2017.json"), "--images", str(coco)]) == 0
    features = load_features(PUBLISHED_OUT)
    assert features.clip_embedding.shape == (80, 512)
    assert len(features.captions) == 400
    assert features.meta["skipped"] == 0
    caption = features.captions[-1]
    expected = expected_embedding(coco / "train2017" / caption["file_name"])
    assert torch.allclose(features.clip_embedding[caption["clip_embedding"]], expected, atol=1e-5)
