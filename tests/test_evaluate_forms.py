"""Which caption belongs to which image: ids in every file that evaluate.py reads, and the forms of references that people have."""

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

import parse_folder
import tiny
from evaluating import FAST, read, refuse, run, write
from features.image_ids import name_images
from prediction.clipxgpt import write_titled
from prediction.inputs import find_files, find_pictures

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = ["Two dogs play in a park.", "A plate of rice.", "A cat sleeps.", "A man rides a wave."]
WORDS = ("--metrics", "rouge", "--bootstrap", "0", "--out", "scores.json")


def score(references, ids, captions=CAPTIONS):
    """Score captions under these ids. Returns scores.json; ROUGE-L is 1 where each image has its own references and no others'."""
    write("predictions.json", [{"image_id": image_id, "caption": text} for image_id, text in zip(ids, captions)])
    run("--predictions", "predictions.json", "--references", references, *WORDS)
    found = read(Path("scores.json"))
    assert found["scores"]["ROUGE-L"] == 1
    assert found["images"] == len(ids)
    return found


def refusal(capsys, references, ids):
    write("predictions.json", [{"image_id": image_id, "caption": text} for image_id, text in zip(ids, CAPTIONS)])
    return refuse(capsys, "--predictions", "predictions.json", "--references", references, *WORDS)


# -- Ids -------------------------------------------------------------------------------------------------------------------


def test_equal_stems_in_other_folders_or_with_other_suffixes_stay_apart(workdir, capsys):
    names = ["cat.jpg", "cat.png", "a/1.jpg", "b/1.jpg"]
    write("list.json", [{"image": name, "caption": text} for name, text in zip(names, CAPTIONS)])
    found = score("list.json", names)
    assert found["references_per_image"]["most"] == 1
    assert found["images_with_references"] == 4
    assert "images without references: cat" in refusal(capsys, "list.json", ["cat"])
    sounds = ["bell.wav", "bell.flac"]
    write("clotho.csv", "file_name,caption_1\n" + "".join(f"{name},{text}\n" for name, text in zip(sounds, CAPTIONS)))
    score("clotho.csv", sounds)


def test_ids_of_predict_are_those_of_the_features_of_the_same_folder(workdir):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    names = ["cat.jpg", "cat.png", "a/1.jpg", "b/1.jpg", "COCO_val2014_000000000139.jpg"]
    for name, text in zip(names, [*CAPTIONS, "A surfer."]):
        tiny.save_picture(Path("photos", name), 1)
        Path("photos", name + ".txt").write_text(text)
    write("photos/metadata.csv", "file_name,caption\n" + "".join(f"{name},{text}\n" for name, text in zip(names, [*CAPTIONS, "A surfer."])))
    assert parse_folder.main(["photos", "--out", "all.pkl", "--device", "cpu", "--val_share", "0"]) == 0
    paths, folders = find_files(["photos"], sounds=False)
    texts = dict(zip(names, [*CAPTIONS, "A surfer."]))
    ids = name_images(paths, folders)
    assert set(ids) == {*names[:4], 139}
    score("all.pkl", ids, [texts[str(path.relative_to("photos"))] for path in paths])


def test_each_of_cocos_forms_of_a_number_means_its_picture(workdir):
    write("captions_val2014.json", {"annotations": [{"image_id": key, "caption": text} for key, text in zip((9, 25, 30, 34), CAPTIONS)]})
    ids = [9, "COCO_val2014_000000000025.jpg", "000000000030", "val2017/000000000034.jpg"]
    assert score("captions_val2014.json", ids)["split"] == "val"


def test_a_number_that_names_two_different_pictures_is_refused(workdir, capsys):
    references = {"images": [{"id": 1, "file_name": "dogs.jpg"}], "annotations": [{"image_id": 1, "caption": CAPTIONS[0]}]}
    write("references.json", references)
    write("mine.jsonl", json.dumps({"image_id": 1, "file": "my/cat.jpg", "caption": "A cat."}))
    said = refuse(capsys, "--predictions", "mine.jsonl", "--references", "references.json", *WORDS)
    assert "captions my/cat.jpg as image 1, and the references name dogs.jpg" in said
    write("mine.jsonl", json.dumps({"image_id": 1, "file": "my/dogs.png", "caption": CAPTIONS[0]}))
    run("--predictions", "mine.jsonl", "--references", "references.json", *WORDS)


def test_titled_pictures_of_equal_names_do_not_replace_each_other(workdir):
    paths = [tiny.save_picture(workdir / name, number) for number, name in enumerate(("a/1.jpg", "b/1.jpg", "1-2.jpg"))]
    write_titled(SimpleNamespace(config=SimpleNamespace(clip_width=512)), paths, [[("A cat.", -1.0)]] * 3, "out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["1-2-2-RS.jpg", "1-2-RS.jpg", "1-RS.jpg"]


# -- Forms of references ---------------------------------------------------------------------------------------------------


def test_vizwiz_references_leave_out_what_was_rejected_or_written_beforehand(workdir, capsys):
    annotations = [{"image_id": key, "caption": text, "is_rejected": False, "is_precanned": False} for key, text in enumerate(CAPTIONS)]
    annotations += [{"image_id": 0, "caption": "Quality issues are too severe.", "is_rejected": True, "is_precanned": True}]
    images = [{"id": key, "file_name": f"VizWiz_val_{key:08d}.jpg"} for key in range(4)]
    write("vizwiz_val.json", {"images": images, "annotations": annotations})
    found = score("vizwiz_val.json", [f"VizWiz_val_{key:08d}.jpg" for key in range(4)])
    assert found["references_per_image"]["most"] == 1
    assert "1 rejected captions left out" in capsys.readouterr().err


def test_karpathys_json_gives_references_and_the_split_of_the_images_that_are_scored(workdir):
    images = [
        {"filename": f"COCO_val2014_{key:012d}.jpg", "cocoid": key, "split": split, "sentences": [{"raw": text, "sentid": key}]}
        for key, split, text in zip((9, 25, 30, 34), ("test", "test", "val", "test"), CAPTIONS)
    ]
    write("dataset_coco.json", {"dataset": "coco", "images": images})
    assert score("dataset_coco.json", [9, 25], CAPTIONS)["split"] == "test"
    assert score("dataset_coco.json", [9, 25, 30, 34], CAPTIONS)["split"] is None


@pytest.mark.parametrize("entry", [
    lambda key, text: {"image": f"val2014/COCO_val2014_{key:012d}.jpg", "caption": [text, text], "image_id": f"coco_{key}"},
    lambda key, text: {"image": f"COCO_val2014_{key:012d}.jpg", "caption": text},
    lambda key, text: {"image_id": key, "id": 10 * key, "caption": text},
    lambda key, text: {"image_id": f"COCO_val2014_{key:012d}.jpg", "caption": text},
])  # fmt: skip
def test_lists_as_references_in_each_of_their_forms(workdir, entry):
    keys = (9, 25, 30, 34)
    write("coco_karpathy_test_gt.json", [entry(key, text) for key, text in zip(keys, CAPTIONS)])
    score("coco_karpathy_test_gt.json", keys)
    score("coco_karpathy_test_gt.json", [f"COCO_val2014_{key:012d}" for key in keys])


def test_a_clotho_csv_with_latin_letters_html_escapes_and_spaces_is_read_as_parse_clotho_reads_it(workdir):
    rows = 'file_name;caption_1;caption_2\n" Caf\xe9 &amp; rain.wav ";It rains;\nBell .wav;A bell;\n'
    (workdir / "clotho_captions_evaluation.csv").write_bytes(rows.encode("cp1252"))
    for ids in (["Caf\xe9 & rain.wav", "Bell.wav"], ["Caf\xe9 &amp; rain.wav", "Bell .wav"], ["Caf\xe9 & rain", "Bell"]):
        assert score("clotho_captions_evaluation.csv", ids, ["It rains", "A bell"])["split"] == "evaluation"


@pytest.mark.parametrize("name, lines", [
    ("results.csv", ["image_name| comment_number| comment", "1.jpg| 0| {}", "2.jpg| 0| {}"]),
    ("captions.txt", ["image,caption", "1.jpg,{}", "2.jpg,{}"]),
    ("flickr.csv", ["image_name,comment_number,comment", "1.jpg,0,{}", "2.jpg,0,{}"]),
    ("results.token", ["1.jpg#0\t{}", "2.jpg#0\t{}"]),
    ("mine.csv", ["filename;raw;split", "1.jpg;{};test", "2.jpg;{};test"]),
])  # fmt: skip
def test_tables_of_flickr_are_references(workdir, name, lines):
    texts = iter(CAPTIONS)
    write(name, "\n".join(line.format(next(texts)) if "{}" in line else line for line in lines) + "\n")
    score(name, ["1.jpg", "2.jpg"])
    score(name, ["flickr30k-images/1.jpg", "2"])


def test_names_match_in_either_form_of_unicode_and_with_either_separator(workdir):
    write("list.json", [{"image": unicodedata.normalize("NFD", "a/Zürich.jpg"), "caption": CAPTIONS[0]}])
    score("list.json", [unicodedata.normalize("NFC", "a\\Zürich.jpg")])


# -- Names on the command line ---------------------------------------------------------------------------------------------


def test_patterns_unicode_forms_and_backslashes_name_pictures(workdir):
    for number, name in enumerate(("photos/1.jpg", "photos/2.jpg", unicodedata.normalize("NFD", "photos/Zürich.jpg"), "photos/[x].jpg")):
        tiny.save_picture(workdir / name, number)
    assert [str(path) for path in find_pictures(["photos/[12].jpg"])] == ["photos/1.jpg", "photos/2.jpg"]
    assert len(find_pictures(["photos/*.jpg", "photos/1.jpg"])) == 4, "each picture once"
    assert [path.name for path in find_pictures(["photos\\1.jpg", "photos/[x].jpg"])] == ["1.jpg", "[x].jpg"]
    assert find_pictures([unicodedata.normalize("NFC", "photos/Zürich.jpg")])[0].is_file()


def test_urls_are_named_as_such_with_how_to_fetch_them(workdir, capsys):
    import predict

    write("predictions.json", [{"image_id": 1, "caption": "A cat."}])
    url = "https://example.org/captions.json"
    for words in (["--predictions", url, "--references", "r.json"], ["--predictions", "predictions.json", "--references", url]):
        assert f"{url} is a URL; expected a file. Download it first" in refuse(capsys, *words, *FAST)
    for words in ([url], ["--data", url], ["photo.jpg", "--checkpoint", url]):
        with pytest.raises(SystemExit) as end:
            predict.main(words)
        assert end.value.code == 2
        assert f"{url} is a URL" in capsys.readouterr().err
