"""parse_flickr.py on the forms Flickr30k and Flickr8k come in."""

import csv
import functools
import json
from pathlib import Path

import pytest

import helpers
import parse_flickr
import tiny
import train
from features.store import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_flickr.main)
THIRTY, EIGHT = "data/flickr30k/oscar_split_ViT-B_32_{}.pkl", "data/flickr8k/oscar_split_ViT-B_32_{}.pkl"
SPLITS = ("train", "val", "test")


@pytest.fixture
def tree(workdir):
    """data/flickr30k as Kaggle's archive has it: 12 pictures, results.csv with its stray spaces and its malformed row; small weights."""
    names = [f"{1000092795 + number}.jpg" for number in range(11)] + ["2199200615.jpg"]
    lines = ["image_name| comment_number| comment"]
    for number, name in enumerate(names):
        tiny.save_picture(f"data/flickr30k/flickr30k_images/{name}", number)
        lines += [f"{name}| {row}| Caption {row} of {Path(name).stem} ." for row in range(4)]
        lines.append(f"{name}| 4   A dog runs across the grass ." if name == names[-1] else f"{name}| 4| A bar | stays .")
    Path("data/flickr30k/results.csv").write_text("\n".join(lines) + "\n", "utf-8")
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def images_of(path):
    return {caption["image_id"] for caption in load_features(path).captions}


def test_results_csv_is_split_by_image_and_its_malformed_row_is_read(tree, capsys):
    assert parse_flickr.main(["--num_workers", "0"]) == 0
    sides = {split: images_of(THIRTY.format(split)) for split in SPLITS}
    assert sum(map(len, sides.values())) == 12 == len(set().union(*sides.values())), "no image stands on two sides"
    assert (len(sides["val"]), len(sides["test"])) == (1, 1), "13 and 3 percent of 12, at least one"
    every = [caption for split in SPLITS for caption in load_features(THIRTY.format(split)).captions]
    assert len(every) == 60
    texts = [caption["caption"] for caption in every if caption["image_id"] == "2199200615.jpg"]
    assert texts[-1] == "A dog runs across the grass ."
    assert len(texts) == 5
    assert {caption["caption"] for caption in every} >= {"A bar | stays .", "Caption 0 of 1000092795 ."}
    assert load_features(THIRTY.format("val")).meta["split"] == "val"
    assert f"train.py --data {THIRTY.format('train')} --val_data {THIRTY.format('val')}" in capsys.readouterr().out
    tiny.save_gpt2("gpt2", width=16, layers=1, heads=2)
    assert train.main(f"--data {THIRTY.format('train')} --val_data {THIRTY.format('val')} --out_dir o --epochs 1 --bs 20 --device cpu "
                      "--gpt2_type gpt2 --warmup_steps 2 --prefix_length 2".split()) == 0  # fmt: skip


def test_the_draw_depends_on_the_seed_alone(tree):
    drawn = []
    for seed, lines in (("1", 1), ("1", -1), ("2", 1)):
        rows = Path("data/flickr30k/results.csv").read_text().splitlines()
        Path("some.csv").write_text("\n".join([rows[0], *rows[1:][::lines]]))
        words = ["--annotations", "some.csv", "--images", "data/flickr30k/flickr30k_images", "--seed", seed, "--val_share", "40%"]
        assert parse_flickr.main([*words, "--test_share", "0", "--out", "x.pkl", "--num_workers", "0"]) == 0
        drawn.append(images_of("x_val.pkl"))
        assert len(drawn[-1]) == 5
        assert not Path("x_test.pkl").exists()
    assert drawn[0] == drawn[1] != drawn[2]


def test_flickr8k_tokens_and_the_name_that_is_not_there(tree):
    names = ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg", "10815824_2997e03d76.jpg"]
    lines = []
    for number, name in enumerate(names):
        tiny.save_picture(f"data/flickr8k/Flicker8k_Dataset/{name}", number)
        lines += [f"{name}#{row}\tCaption {row} , 狗 🐕 ." for row in range(5)]
    lines += [f"2258277193_586949ec62.jpg.1#{row}\tA picture that is missing ." for row in range(5)]
    Path("data/flickr8k/Flickr8k.token.txt").write_text("\r\n".join(lines), "utf-8")
    command = ["--annotations", "data/flickr8k/Flickr8k.token.txt", "--val_share", "0.25", "--test_share", "0", "--num_workers", "0"]
    assert parse_flickr.main([*command, "--seed", "2"]) == 0
    assert set(names) == {one for split in ("train", "val") for one in images_of(EIGHT.format(split))}
    listed = [row for path in Path("data/flickr8k").glob("*.skipped.csv") for row in csv.DictReader(path.open())]
    assert [(row["image_id"], row["reason"]) for row in listed] == [("2258277193_586949ec62.jpg", "no such file")]
    assert load_features(EIGHT.format("train")).captions[0]["caption"].endswith(", 狗 🐕 .")
    Path("data/flickr8k/captions.txt").write_text("image,caption\n" + "".join(f'{name},"A, b"\n{name},c, d\n' for name in names))
    assert parse_flickr.main(["--annotations", "data/flickr8k/captions.txt", "--out", "k.pkl", "--num_workers", "0"]) == 0
    assert [caption["caption"] for caption in load_features("k_val.pkl").captions] == ["A, b", "c, d"]


def test_karpathys_json_has_its_own_splits(tree, capsys):
    images = [{"filename": f"{1000092795 + number}.jpg", "imgid": number, "split": split, "sentences": [
        {"raw": f"Sentence {row}.", "sentid": 5 * number + row} for row in range(5)]}
        for number, split in enumerate(["train", "val", "test", "train", "restval"])]  # fmt: skip
    Path("data/flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    command = ["--annotations", "data/flickr30k/dataset_flickr30k.json", "--num_workers", "0"]
    assert parse_flickr.main(command) == 0
    assert [len(images_of(THIRTY.format(split))) for split in SPLITS] == [3, 1, 1]
    assert images_of(THIRTY.format("test")) == {"1000092797.jpg"}
    assert "has its own splits" in error_line(capsys, [*command, "--val_share", "0.2"])
    images[0]["split"] = "dev"
    Path("data/flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    assert "the split 'dev'" in error_line(capsys, command)


def test_user_mistakes_end_in_one_line_and_leave_nothing(tree, capsys):
    Path("bars.csv").write_text("image_name| comment_number| comment\n" + "a.jpg| x\n" * 5)
    Path("prose.csv").write_text("Once upon a time\n")
    Path("empty.csv").write_text("")
    Path("coco.json").write_text('{"images": [], "annotations": []}')
    before = sorted(str(path) for path in Path(".").rglob("*"))
    for words, message in (
        (["--annotations", "nowhere.csv"], "no captions nowhere.csv"),
        (["--annotations", "bars.csv"], "5 of 5 lines hold no caption, bars.csv, line 2 the first"),
        (["--annotations", "prose.csv"], "starts with 'Once upon a time'"),
        (["--annotations", "empty.csv"], "starts with ''"),
        (["--annotations", "coco.json"], "coco.json holds no caption"),
        (["--images", "nowhere"], "no folder nowhere"),
        (["--images", "data"], "found 0 of 12"),
        (["--val_share", "0.6", "--test_share", "0.5"], "leave nothing to train on"),
        (["--val_share", "2"], "argument --val_share"),
    ):
        assert message in error_line(capsys, words)
    assert sorted(str(path) for path in Path(".").rglob("*")) == before
