"""parse_conceptual.py on shards that webdataset writes and on the published layout of a TSV with numbered pictures."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers
import parse_conceptual
import tiny
import train
from features.shards import FetchError, TarPicture, fetch_shard, index_shard
from features.store import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "data/weights/ViT-B-32.pt"
OUT = "data/conceptual/conceptual_clip_ViT-B_32_{}.pkl"


@pytest.fixture
def tree(workdir):
    """A working folder with small CLIP weights."""
    tiny.save_clip(WEIGHTS, 512, "vit")
    return workdir


def picture_bytes(number):
    return tiny.save_picture("made.jpg", number).read_bytes()


def write_shard(path, numbers, with_json=True, **replaced):
    """A shard as img2dataset writes it, by webdataset's own writer; replaced: samples to write otherwise, by key."""
    import webdataset

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as shard:
        for number in numbers:
            sample = {"__key__": f"{number:09d}", "jpg": picture_bytes(number), "txt": f"caption of {number}"}
            if with_json:
                sample["json"] = {"caption": f"caption of {number}", "status": "success", "key": f"{number:09d}"}
            shard.write(replaced.get(f"k{number}", sample))
    return str(path)


def expected_rows(numbers):
    """The pictures through CLIP's own library → [N, D]."""
    import clip
    from PIL import Image

    model, preprocess = clip.load(WEIGHTS, device="cpu")
    with torch.no_grad():
        return torch.cat([model.encode_image(preprocess(Image.open(io.BytesIO(picture_bytes(number))))[None]) for number in numbers])


def check_rows(path, numbers):
    """Every caption of a feature file names a number whose picture its row was made of."""
    features = load_features(path)
    assert [caption["caption"] for caption in features.captions] == [f"caption of {number}." for number in numbers]
    rows = features.clip_embedding[torch.tensor(features.caption_rows)]
    assert torch.allclose(rows, expected_rows(numbers), atol=1e-5)
    return features


def skipped(path):
    with open(f"{path}.skipped.csv", newline="") as file:
        return [(row["image_id"], row["path"], row["reason"]) for row in csv.DictReader(file)]


def error_line(capsys, argv):
    """Run main, which must fail. Returns the line of the error, the last one: notes on shards come before it."""
    helpers.call(parse_conceptual.main, argv, code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("parse_conceptual.py: error: ")
    return line


@pytest.mark.parametrize("order", [["train", "val"], ["val", "train"]])
def test_two_splits_in_a_row_keep_captions_with_their_images(order, tree, capsys):
    write_shard("data/conceptual/train/00000.tar", range(5))
    write_shard("data/conceptual/train/00001.tar", range(5, 8), with_json=False)
    write_shard("data/conceptual/val/00000.tar", range(3, 6))
    assert parse_conceptual.main(["--clip_model_type", "ViT-B/32", "--num_threads", "0", "--split", *order]) == 0
    features = check_rows(OUT.format("train"), range(8))
    assert features.meta["split"] == "train"
    assert features.meta["skipped"] == 0
    assert features.captions[0]["image_id"] == "000000000"
    assert check_rows(OUT.format("val"), range(3, 6)).meta["images"] == 3, "the val pass starts anew"
    assert "python train.py --data data/conceptual/conceptual_clip_ViT-B_32_train.pkl" in capsys.readouterr().out
    assert not [path for path in Path(".").rglob("*") if path.suffix in (".shards", ".pieces", ".tmp")]


def test_a_broken_tar_in_the_middle_is_listed_and_the_rest_is_read(tree, capsys):
    for number in range(5):
        write_shard(f"cc/{number:05d}.tar", range(3 * number, 3 * number + 3), with_json=False)
    whole = Path("cc/00001.tar").read_bytes()
    second = index_shard("cc/00001.tar")[0][1][2].offset
    Path("cc/00001.tar").write_bytes(whole[: second + 100])  # its second picture is cut
    Path("cc/00002.tar").write_bytes(b"<html>not found</html>")
    damaged = bytearray(Path("cc/00003.tar").read_bytes())
    third = index_shard("cc/00003.tar")[0][2][2].offset
    damaged[third - 512 : third] = b"x" * 512
    Path("cc/00003.tar").write_bytes(damaged)
    assert parse_conceptual.main(["--shards", "cc/{00000..00005}.tar", "--num_workers", "2"]) == 0
    features = check_rows(OUT.format("train"), [0, 1, 2, 3, 9, 10, 12, 13, 14])
    listed = {path: reason for _, path, reason in skipped(OUT.format("train"))}
    assert "cut short" in listed["cc/00001.tar"]
    assert "not a tar" in listed["cc/00002.tar"]
    assert "header" in listed["cc/00003.tar"]
    assert listed["cc/00005.tar"] == "no such file"
    assert features.meta["skipped"] == len(skipped(OUT.format("train")))
    assert "cc/00002.tar: not a tar" in capsys.readouterr().err


def test_dead_and_broken_pictures_are_counted_and_listed(tree):
    import pyarrow
    import pyarrow.parquet

    broken = {"__key__": "000000001", "jpg": b"not a picture", "txt": "broken"}
    alone = {"__key__": "000000002", "txt": "no picture"}
    only_json = {"__key__": "000000003", "jpg": picture_bytes(3), "json": {"caption": "caption of 3"}}
    no_caption = {"__key__": "000000004", "jpg": picture_bytes(4)}
    write_shard("cc/00000.tar", range(6), with_json=False, k1=broken, k2=alone, k3=only_json, k4=no_caption)
    rows = [("000000000", "http://a/0", "success", None), ("000000009", "http://a/9", "failed_to_download", "HTTP Error 404: Not Found")]
    table = pyarrow.table(dict(zip(("key", "url", "status", "error_message"), map(list, zip(*rows)))))
    pyarrow.parquet.write_table(table, "cc/00000.parquet")
    assert parse_conceptual.main(["--shards", "cc/00000.tar", "--split", "val"]) == 0
    features = check_rows(OUT.format("val"), [0, 3, 5])
    listed = {image_id: (path, reason) for image_id, path, reason in skipped(OUT.format("val"))}
    assert features.meta["skipped"] == 4 == len(listed)
    assert "not a picture" in listed["000000001"][1]
    assert listed["000000001"][0].startswith("cc/00000.tar, 13 bytes from ")
    assert listed["000000002"][1] == "no picture beside its caption"
    assert listed["000000004"][1] == "no caption"
    assert listed["000000009"] == ("http://a/9", "failed_to_download HTTP Error 404: Not Found")


def test_piped_shards_are_copied_once_and_a_failing_command_is_listed(tree):
    write_shard("far/0.tar", range(2))
    write_shard("far/2.tar", range(2, 4))
    assert parse_conceptual.main(["--shards", "pipe:cat far/{0..2}.tar 2>/dev/null", "--out", "o.pkl"]) == 0
    check_rows("o.pkl", range(4))
    assert "could not be fetched" in skipped("o.pkl")[0][2]
    assert skipped("o.pkl")[0][1] == "pipe:cat far/1.tar 2>/dev/null"
    assert not Path("o.pkl.shards").exists()


def test_a_piped_shard_is_fetched_once_and_a_cut_one_leaves_nothing(tree):
    whole = Path(write_shard("far/0.tar", range(2))).read_bytes()
    address = "pipe:echo asked >> log; cat far/0.tar"
    for _ in range(2):
        assert Path(fetch_shard(address, "copies")).read_bytes() == whole
    assert Path("log").read_text() == "asked\n"
    with pytest.raises(FetchError):
        fetch_shard("pipe:head -c 600 far/0.tar; exit 3", "copies")
    assert len(list(Path("copies").iterdir())) == 1


def test_the_same_key_in_two_downloads_stays_two_pictures(tree):
    write_shard("a/00000.tar", range(2))
    shard = write_shard("b/00000.tar", range(2), k1={"__key__": "000000001", "jpg": picture_bytes(7), "txt": "caption of 7"})
    assert parse_conceptual.main(["--shards", "a/00000.tar", shard, "--out", "o.pkl"]) == 0
    assert [caption["image_id"] for caption in check_rows("o.pkl", [0, 1, 0, 7]).captions][2:] == [
        "b/00000.tar/000000000", "b/00000.tar/000000001"]  # fmt: skip


def test_the_published_layout_of_a_tsv_and_numbered_pictures(tree, capsys):
    root = Path("data/conceptual")
    for split, name, numbers in (("train", "Train_GCC-training.tsv", range(6)), ("val", "Validation_GCC-1.1.0-Validation.tsv", (8, 9))):
        for row, number in enumerate(numbers):
            tiny.save_picture(root / split / f"{row:08d}.jpg", number)
        (root / name).write_text("".join(f"caption of {number}\thttp://a/{number}.jpg\n" for number in numbers), "utf-8")
    (root / "train" / "00000002.jpg").unlink()
    (root / "train" / "00000004.jpg").write_bytes(b"<html>")
    (root / "train" / "00000001.json").write_text("{}")
    assert parse_conceptual.main([]) == 0
    assert [caption["image_id"] for caption in check_rows(OUT.format("train"), [0, 1, 3, 5]).captions] == [
        "00000000", "00000001", "00000003", "00000005"]  # fmt: skip
    check_rows(OUT.format("val"), [8, 9])
    listed = skipped(OUT.format("train"))
    assert ("00000002", "http://a/2.jpg", "no picture (a dead link)") in listed
    assert len(listed) == 2
    tiny.save_gpt2("gpt2", width=16, layers=1, heads=2)
    assert train.main(f"--data {OUT.format('train')} --out_dir o --gpt2_type gpt2 --epochs 1 --bs 2 --warmup_steps 2 --device cpu "
                      "--prefix_length 2".split()) == 0  # fmt: skip
    assert Path("o/coco_prefix-000.pt").exists()


def test_a_tsv_with_a_heading_and_img2dataset_folders_or_paths(tree):
    for row in range(3):
        tiny.save_picture(f"files/00000/{row:09d}.jpg", row)
    Path("a.tsv").write_text("caption\turl\n" + "".join(f"caption of {row}\thttps://a/{row}\n" for row in range(3)), "utf-8")
    assert parse_conceptual.main(["--tsv", "a.tsv", "--images", "files", "--out", "a.pkl"]) == 0
    check_rows("a.pkl", range(3))
    Path("b.tsv").write_text("狗在跑 🐕\tfiles/00000/000000001.jpg\r\nno tab\n\ncaption of 2 .\tfiles/00000/000000002.jpg\n", "utf-8")
    assert parse_conceptual.main(["--tsv", "b.tsv", "--out", "b.pkl"]) == 0
    assert [caption["caption"] for caption in load_features("b.pkl").captions] == ["狗在跑 🐕.", "caption of 2."]
    assert skipped("b.pkl")[0][2].startswith("1 fields")


@given(st.text(max_size=12))
def test_a_caption_ends_with_one_full_stop(text):
    ended = parse_conceptual.end_with_full_stop(text)
    assert not text.strip() and not ended or ended.endswith(".") and not ended[:-1].endswith(" ")
    assert parse_conceptual.end_with_full_stop(ended) == ended


@given(st.lists(st.binary(max_size=700), max_size=5), st.integers(0, 6000))
def test_a_shard_cut_anywhere_gives_whole_pictures_only(tmp_path_factory, pictures, length):
    path = tmp_path_factory.mktemp("cut") / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, data in enumerate(pictures):
            entry = tarfile.TarInfo(f"{number}.jpg")
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    assert index_shard(path)[1] is None
    path.write_bytes(path.read_bytes()[:length])
    samples, fault = index_shard(path)
    assert [picture.read() for _, _, picture in samples] == pictures[: len(samples)]
    assert fault is None or fault.startswith(("cut short", "broken", "not a tar"))
    assert fault or len(samples) == len(pictures), "what is lost is said"


def test_a_shard_that_shrank_since_is_an_unreadable_picture(tree):
    path = write_shard("cc/00000.tar", range(1))
    picture = index_shard(path)[0][0][2]
    Path(path).write_bytes(Path(path).read_bytes()[:600])
    with pytest.raises(ValueError, match="cut short"):
        picture.read()
    assert isinstance(picture, TarPicture)


def test_a_stopped_run_goes_on_with_what_it_had_read_from_the_shards(tree, capsys):
    write_shard("cc/0.tar", range(8), with_json=False, k7={"__key__": "000000007", "jpg": b"broken", "txt": "broken"})
    command = ["--shards", "cc/0.tar", "--out", "o.pkl", "--batch_size", "2", "--save_seconds", "0", "--num_workers", "0"]
    assert "1 of 8 images could not be read" in error_line(capsys, [*command, "--max_skipped", "0"])
    assert parse_conceptual.main(command) == 0
    assert "resuming from o.pkl.pieces: 8 images are done" in capsys.readouterr().err
    check_rows("o.pkl", range(7))


def test_photographs_in_a_shard_give_the_rows_of_the_files(tree, shared_data):
    import webdataset

    photographs = sorted((shared_data / "coco_mini" / "train2017").glob("*.jpg"))[:6]
    with webdataset.TarWriter("real.tar") as shard:
        for number, path in enumerate(photographs):
            shard.write({"__key__": f"{number:09d}", "jpg": path.read_bytes(), "txt": path.name})
    Path("real.tsv").write_text("".join(f"{path.name}\t{path}\n" for path in photographs))
    assert parse_conceptual.main(["--shards", "real.tar", "--out", "a.pkl"]) == 0
    assert parse_conceptual.main(["--tsv", "real.tsv", "--out", "b.pkl"]) == 0
    tar, files = load_features("a.pkl"), load_features("b.pkl")
    assert torch.equal(tar.clip_embedding, files.clip_embedding)
    assert tar.clip_embedding.shape == (6, 512)
    assert [caption["caption"] for caption in tar.captions] == [f"{path.name}." for path in photographs]


def test_user_mistakes_end_in_one_line(tree, capsys):
    shutil.rmtree("data/conceptual", ignore_errors=True)
    assert "no Conceptual Captions under data/conceptual" in error_line(capsys, [])
    assert "no captions nowhere.tsv" in error_line(capsys, ["--tsv", "nowhere.tsv"])
    Path("a.tsv").write_text("a cat\thttp://a/1\n")
    assert "no folder of pictures nowhere" in error_line(capsys, ["--tsv", "a.tsv", "--images", "nowhere"])
    assert "none of the 1 rows of a.tsv has a picture" in error_line(capsys, ["--tsv", "a.tsv"])
    assert "unbalanced braces" in error_line(capsys, ["--shards", "cc/{0..2.tar"])
    assert "no such file" in error_line(capsys, ["--shards", "cc/{0..2}.tar"])
    assert "give one" in error_line(capsys, ["--shards", "x", "--tsv", "y"])
    assert "one split" in error_line(capsys, ["--shards", "x", "--split", "train", "val"])
    assert "goes with --tsv" in error_line(capsys, ["--images", "y"])
    for number in (1, 2):
        write_shard(f"data/conceptual/{'train' if number == 1 else 'val'}/0.tar", [number])
    assert "--out names one file" in error_line(capsys, ["--out", "x.pkl"])
    for name in ("1.jpg", "0001.jpg"):
        tiny.save_picture(f"twice/{name}", 0)
    assert "two pictures have the number 1" in error_line(capsys, ["--tsv", "a.tsv", "--images", "twice"])
    assert json.dumps(sorted(str(path) for path in Path(".").rglob("*.pkl"))) == "[]"
