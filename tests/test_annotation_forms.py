"""The forms that caption annotations come in: each is read as it is meant, and a wrong one is named in one line."""

import copy
import json
import random
import unicodedata
from pathlib import Path

import pytest

import parse_coco
import parse_flickr
import tiny
from common import UserError
from features.annotations import read_annotations
from features.finder import FileFinder
from features.store import load_features
from features.tables import read_table, texts_of

pytestmark = pytest.mark.usefixtures("one_thread")


def written(name, content, encoding="utf-8"):
    """Write JSON or text. Returns its path."""
    text = content if isinstance(content, str) else json.dumps(content)
    Path(name).write_bytes(text.encode(encoding))
    return Path(name)


def texts(annotations):
    """What was read: {image_id: captions}."""
    return {image.image_id: [row["caption"] for row in image.captions] for image in annotations.images}


# -- JSON ------------------------------------------------------------------------------------------------------------------


def test_lavis_lists_have_a_caption_or_several_and_ids_of_coco(workdir):
    train = [{"image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418", "caption": text} for text in ("One.", "Two.")]
    assert texts(read_annotations(written("a.json", train))) == {522418: ["One.", "Two."]}
    test = [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a", "b"]}, {"image": "flickr30k/1.jpg", "caption": ["c"]}]
    assert texts(read_annotations(written("b.json", test))) == {391895: ["a", "b"], "1.jpg": ["c"]}


def test_a_list_that_names_its_own_files_takes_no_coco_picture_of_the_same_number(workdir):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    for folder, name, number in (("train2014", "COCO_train2014_000000000042.jpg", 1), ("mine", "dog.jpg", 2)):
        tiny.save_picture(f"data/coco/{folder}/{name}", number)
    for key in ("image", "file_name", "filename"):
        written("list.json", [{"image_id": 42, key: "dog.jpg", "caption": "A dog."}])
        assert parse_coco.main(["--annotations", "list.json", "--images", "data/coco", "data/coco/mine", "--out", "o.pkl"]) == 0
        assert [caption["file_name"] for caption in load_features("o.pkl").captions] == ["dog.jpg"]


def test_vizwiz_leaves_out_rejected_and_precanned_captions_and_counts_them(workdir, capsys):
    marks = [{"is_rejected": False, "is_precanned": False}, {"is_rejected": True, "is_precanned": False}, {"is_precanned": True}]
    content = {
        "images": [{"id": 0, "file_name": "VizWiz_train_00000000.jpg"}],
        "annotations": [{"image_id": 0, "id": n, "caption": f"Caption {n}.", **mark} for n, mark in enumerate(marks)],
    }
    annotations = read_annotations(written("vizwiz.json", content))
    assert texts(annotations) == {0: ["Caption 0."]}
    assert annotations.left_out == {"rejected captions": 1, "precanned captions": 1}


def test_half_a_surrogate_pair_in_json_is_replaced_and_counted_and_a_whole_one_kept(workdir, capsys):
    path = written("a.json", '[{"image_id": 1, "caption": "half \\ud83d"}, {"image_id": 2, "caption": "whole \\ud83d\\udc36"}]')
    assert texts(read_annotations(path)) == {1: ["half \ufffd"], 2: ["whole \U0001f436"]}
    assert "1 texts hold half of a surrogate pair" in capsys.readouterr().out


GOOD = {
    "coco": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "id": 2, "caption": "A cat."}]},
    "list": [{"image": "a.jpg", "image_id": 1, "caption": ["A cat."]}],
    "captions": [{"image_id": 1, "id": 2, "caption": "A cat."}],
    "karpathy": {"images": [{"filename": "a.jpg", "cocoid": 1, "split": "train", "sentences": [{"raw": "A cat.", "sentid": 3}]}]},
}
ODD = [None, True, -1, 2**70, 1.5, float("nan"), "", "\0", "²", "x" * 5000, [], {}, [[]], {"a": 1}, [None]]


def places_in(content, path=()):
    """Every place in nested JSON, as a path of keys."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [path] * bool(path) + [place for key in keys for place in places_in(content[key], (*path, key))]


@pytest.mark.parametrize("form", GOOD)
def test_annotations_with_anything_odd_in_any_place_are_read_or_refused_in_one_line(form, workdir):
    draw = random.Random(form)
    for _ in range(60):
        content = copy.deepcopy(GOOD[form])
        *before, last = draw.choice(places_in(content))
        inside = content
        for key in before:
            inside = inside[key]
        if draw.random() < 0.2:
            del inside[last]
        else:
            inside[last] = draw.choice(ODD)
        try:
            read_annotations(written("a.json", content))
        except UserError as error:
            assert str(error).startswith("a.json "), content


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", '{"images": 1}', "5", '[{"image_id": ' + "9" * 5000 + "}]", "\xff"])
def test_json_of_another_form_is_refused_in_one_line(text, workdir):
    with pytest.raises(UserError, match="a.json"):
        read_annotations(written("a.json", text, "latin-1"))


# -- Tables ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, expected", [
    ("image_name,comment_number,comment\n1.jpg,0,A dog, a cat\n1.jpg,1,Two.\n", {"1.jpg": ["A dog, a cat", "Two."]}),
    ("image,caption\n1.jpg,A dog, a cat\n", {"1.jpg": ["A dog, a cat"]}),
    ('raw,sentids,split,filename,img_id\n"[""One."", ""Two.""]","[0, 1]",test,1.jpg,0\n', {"1.jpg": ["One.", "Two."]}),
    ("image_name| comment_number| comment\n1.jpg| 0| A dog | a cat\n", {"1.jpg": ["A dog | a cat"]}),
    ("1.jpg#0\tA dog\n1.jpg#1\tTwo.\n", {"1.jpg": ["A dog", "Two."]}),
    ("file_name;caption\n1.jpg;A dog, a cat\n2.png;b\n", {"1.jpg": ["A dog, a cat"], "2.png": ["b"]}),
    ("file_name,caption_1,caption_2\nrain&amp;wind.wav , One., Two.\n", {"rain&wind.wav": ["One.", "Two."]}),
])  # fmt: skip
def test_tables_are_known_by_what_is_in_them(content, expected, workdir):
    assert texts(read_annotations(written("table.csv", content))) == expected


def test_flickr_annotations_have_their_own_splits(workdir):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    rows = ["raw,sentids,split,filename,img_id"]
    for number, split in enumerate(("train", "val", "test")):
        tiny.save_picture(f"{number}.jpg", number)
        rows.append(f'"[""Picture {number}.""]","[{number}]",{split},{number}.jpg,{number}')
    written("flickr_annotations_30k.csv", "\n".join(rows))
    assert parse_flickr.main(["--annotations", "flickr_annotations_30k.csv", "--out", "f.pkl"]) == 0
    assert [load_features(f"f_{split}.pkl").captions[0]["image_id"] for split in ("train", "val", "test")] == ["0.jpg", "1.jpg", "2.jpg"]


def test_equal_stems_with_different_suffixes_are_different_images(workdir):
    found = texts(read_annotations(written("captions.txt", "image,caption\ncat.jpg,one\ncat.png,two\na/1.jpg,three\nb/1.jpg,four\n")))
    assert len(found) == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_tables_are_read_in_the_usual_encodings(encoding, workdir, capsys):
    path = written("metadata.csv", "file_name,caption\na.jpg,Café à Paris\n", encoding)
    assert [found for _, found, _ in read_table(path, ["file_name"])] == [["Café à Paris"]]
    assert ("not UTF-8" in capsys.readouterr().out) == (encoding in ("cp1252", "latin-1"))


@pytest.mark.parametrize("cell, expected", [
    ('["a", "b"]', ["a", "b"]), ("['a', \"it's\"]", ["a", "it's"]), ("[laughs] He speaks.", ["[laughs] He speaks."]),
    ("[1, 2]", ["[1, 2]"]), ("[applause]", ["[applause]"]),
    (["a", ["b"]], ValueError), ({"raw": {"raw": "x"}}, ValueError), (7, ValueError), (None, []),
    ("[" * 60_000 + "]" * 100, ["[" * 60_000 + "]" * 100]),
])  # fmt: skip
def test_a_list_written_into_a_cell_is_a_list_of_captions(cell, expected):
    if expected is ValueError:
        with pytest.raises(ValueError, match="a (list|dict|int)"):
            texts_of(cell)
    else:
        assert texts_of(cell) == expected


def test_an_over_long_field_and_a_nul_are_no_traceback(workdir):
    long = written("long.csv", "file_name,caption\na.jpg," + "x" * 200_000 + "\n")
    assert [len(found[0]) for _, found, _ in read_table(long, ["file_name"])] == [200_000]
    for name, content in (("nul.csv", "file_name,caption\na.jpg,a\0b\n"), ("open.csv", 'file_name,caption\na.jpg,"x\n')):
        with pytest.raises(UserError, match=name):
            list(read_table(written(name, content), ["file_name"]))


# -- Names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, there", [
    (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg")),
    (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")),
    ("a\\b.jpg", "a/b.jpg"), ("rain&amp;wind.wav", "rain&wind.wav"), (" x.jpg ", "x.jpg"), ("a/b.jpg", "a/b.jpg"),
])  # fmt: skip
def test_a_name_may_be_spelled_otherwise_than_the_file(given, there, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    found = FileFinder([tmp_path]).find(given)
    assert found is not None
    assert Path(found).is_file()
    assert FileFinder([tmp_path]).find("other.jpg") is None
