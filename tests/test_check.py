"""check.py and features.store's command line: what they find in feature files, and what they let pass."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import check
import tiny
from features.store import load_features, save_features

pytestmark = pytest.mark.usefixtures("one_thread")
META = {"encoder": "ViT-B/32", "normalized": False}


def save(path, images=20, texts=None, seed=0, embedding=None, first_id=0, meta=META):
    embedding = torch.randn(images, 16, generator=torch.Generator().manual_seed(seed)) if embedding is None else embedding
    captions = [{"image_id": first_id + row, "caption": text, "clip_embedding": row}
                for row, text in enumerate(texts or [f"picture {seed} {row}." for row in range(images)])]  # fmt: skip
    save_features(path, embedding, captions, meta)
    return str(path)


def run(capsys, *words, main=check.main, code=0):
    """→ what the check prints with --json: (problems of all files, the reports)."""
    assert main([*map(str, words), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    return [problem for report in found["files"] for problem in report["problems"]], found["files"]


@pytest.fixture
def no_towers(monkeypatch):
    """Encoders that all have no text tower."""
    monkeypatch.setitem(sys.modules, "models.encoders.text", types.SimpleNamespace(load_text_tower=lambda name, device="cpu": None))


def test_a_true_file_is_aligned_and_a_shuffled_one_is_not(mini_demo, tmp_path, capsys):
    problems, (report,) = run(capsys, mini_demo / "train.pkl", "--clip_model_type", mini_demo / "weights/demo_clip.pt")
    assert not problems
    assert report["alignment"]["verdict"] == "aligned"
    assert report["alignment"]["standard_errors"] > 8
    assert report["alignment"]["true_cosine"] > report["alignment"]["shuffled_cosine"]
    assert report["alignment"]["closer_share"] > 0.7

    features = load_features(mini_demo / "train.pkl")
    order = torch.randperm(len(features.clip_embedding), generator=torch.Generator().manual_seed(0))
    save_features(tmp_path / "shuffled", features.clip_embedding[order], features.captions, features.meta)
    problems, (report,) = run(capsys, tmp_path / "shuffled", code=1)
    assert report["alignment"]["verdict"] == "no gap"
    assert len(problems) == 1
    assert "do not belong" in problems[0]

    right = len(order) * 3 // 4
    out_of_step = torch.cat([features.clip_embedding[:right], features.clip_embedding[right:][order[order >= right] - right]])
    save_features(tmp_path / "partly.pkl", out_of_step, features.captions, features.meta)
    problems, (report,) = run(capsys, tmp_path / "partly.pkl", code=1)
    assert report["alignment"]["verdict"] == "partly"
    assert report["alignment"]["rows_without_gap"][-1][1] >= right


def test_rows_out_of_step_from_some_row_on_are_located(tmp_path, capsys, monkeypatch):
    """A tower that knows each text's own embedding, with noise: what a good CLIP does."""
    texts = [f"picture {row}." for row in range(800)]
    images = torch.nn.functional.normalize(torch.randn(800, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    known = dict(zip(texts, images))
    tower = types.SimpleNamespace(encode_text=lambda batch: torch.stack([known[text] for text in batch]), project=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "models.encoders.text", types.SimpleNamespace(load_text_tower=lambda name, device="cpu": tower))
    shifted = torch.cat([images[:600], images[601:], images[600:601]])  # one picture left out, its row taken by the next
    problems, (report,) = run(capsys, save(tmp_path / "a.pkl", texts=texts, embedding=shifted), code=1)
    (first, _), *_, (_, last) = report["alignment"]["rows_without_gap"]
    assert report["alignment"]["verdict"] == "partly"
    assert 590 < first <= 620
    assert last == 799
    assert run(capsys, save(tmp_path / "b.pkl", texts=texts, embedding=images))[1][0]["alignment"]["verdict"] == "aligned"


def test_embeddings_that_do_not_fit_the_named_encoder_are_a_problem(tmp_path, capsys, monkeypatch):
    tower = types.SimpleNamespace(encode_text=lambda texts: torch.ones(len(texts), 4), project=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "models.encoders.text", types.SimpleNamespace(load_text_tower=lambda name, device="cpu": tower))
    problems, _ = run(capsys, save(tmp_path / "a.pkl"), code=1)
    assert len(problems) == 1
    assert "not what ViT-B/32 gives" in problems[0]
    assert "16 wide" in problems[0]
    with pytest.raises(SystemExit) as end:
        check.main([str(tmp_path / "a.pkl"), "--clip_model_type", "ViT-B/16"])
    assert end.value.code == 2


def test_a_good_file_has_no_problem_and_says_what_was_not_tested(tmp_path, capsys, no_towers):
    assert check.main([save(tmp_path / "a.pkl")]) == 0
    said = capsys.readouterr().out
    assert "images 20, captions 20, width 16" in said
    assert "ViT-B/32 has no text tower" in said
    assert "no problem found" in said


def test_bad_rows_are_counted_and_named(tmp_path, capsys, no_towers):
    embedding = torch.randn(300, 16)
    embedding[3], embedding[5, 2], embedding[7, 0], embedding[9] = 0, float("nan"), float("inf"), 0.25
    embedding[20:30] = embedding[40]
    for name in ("a.pkl", "a"):
        problems, (report,) = run(capsys, save(tmp_path / name, 300, embedding=embedding), code=1)
        assert [problem.split(" embeddings ")[0] for problem in problems[:3]] == ["2 of 300", "1 of 300", "1 of 300"]
        assert "NaN or infinity (row 5; row 7)" in problems[0]
        assert "zero throughout (row 3)" in problems[1]
        assert "row 9" in problems[2]
        assert problems[3].startswith("10 of 300 images have the embedding of another image")
        assert report["distinct_embeddings"] == 287 - 1


def test_bad_captions_are_counted_and_named(tmp_path, capsys, no_towers):
    texts = ["A dog.", " ", "", "word " * 80 + ".", "no period", "雪の中の犬。", "A dog."] + [f"Number {n}." for n in range(13)]
    problems, (report,) = run(capsys, save(tmp_path / "a.pkl", texts=texts), code=1)
    assert [problem[:8] for problem in problems] == ["2 of 20 ", "1 of 20 "]
    assert "longer than 60 words" in problems[1]
    assert any("1 of 20 captions have no final period" in note and "no period" in note for note in report["notes"])
    assert any("2 times 'A dog.'" in note for note in report["notes"])
    assert report["duplicate_caption_share"] == 0.1


def test_lists_control_tokens_and_replacement_characters_in_captions_are_problems(tmp_path, capsys, no_towers):
    texts = [f"picture [{row}] <of> many." for row in range(20)]
    texts[:6] = ['["a", "b"]', "['a']", "a dog <|endoftext|>.", "</s>", "a caf\ufffd.", " [\"it's\", 'b'] "]
    problems, _ = run(capsys, save(tmp_path / "a.pkl", texts=texts), code=1)
    assert [problem.split(" captions ")[0] for problem in problems] == ["3 of 20", "2 of 20", "1 of 20"]


def test_captions_that_cannot_be_used_are_told_and_the_rest_is_checked(tmp_path, capsys, no_towers):
    good = {"image_id": 1, "caption": "a dog", "clip_embedding": 0}
    bad = [{**good, "clip_embedding": 9}, {**good, "caption": 5}, "text", {**good, "clip_embedding": None}]
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"clip_embedding": torch.randn(2, 8), "captions": [good, *bad], "meta": {"width": 4}}, file)
    problems, (report,) = run(capsys, tmp_path / "a.pkl", code=1)
    assert "row is 9 of 2" in problems[0]
    assert problems[3] == "1 more captions that cannot be used"
    assert problems[4] == "meta says width 4, found 8"
    assert report["captions"] == 1
    with open(tmp_path / "b.pkl", "wb") as file:
        pickle.dump({"clip_embedding": torch.randn(2, 8), "captions": []}, file)
    assert "holds no caption" in run(capsys, tmp_path / "b.pkl", code=1)[0][0]


def test_damaged_files_are_problems_and_a_missing_one_is_a_mistake(tmp_path, capsys, no_towers):
    (tmp_path / "a.pkl").write_bytes(b"no pickle")
    (tmp_path / "folder").mkdir()
    problems, reports = run(capsys, tmp_path / "a.pkl", tmp_path / "folder", save(tmp_path / "c.pkl"), code=1)
    assert "cannot be read" in problems[0]
    assert "img_emb" in problems[1]
    assert len(reports) == 3
    for words in ([], ["describe"]):
        with pytest.raises(SystemExit) as end:
            check.main([*words, str(tmp_path / "none.pkl")])
        assert end.value.code == 2, words
        assert "no feature file" in capsys.readouterr().err, words


def test_images_in_two_files_are_leaks_by_id_and_by_embedding(tmp_path, capsys, no_towers):
    train = save(tmp_path / "train", 50, seed=1)
    same = load_features(train).clip_embedding[10:15]
    by_id = save(tmp_path / "by_id.pkl", 5, embedding=same * 1.0001, first_id=10)
    by_embedding = save(tmp_path / "by_embedding.pkl", 5, embedding=same, first_id=900)
    unlike = save(tmp_path / "unlike.pkl", 5, seed=2, first_id=10)
    clean = save(tmp_path / "clean.pkl", 5, seed=3, first_id=700)
    for other, found in ((by_id, "5 of 5 images are in both"), (by_embedding, "under two image_ids, by embedding (900; 901; 902")):
        problems, reports = run(capsys, *((train, other) if other == by_id else (other, train)), code=1)
        assert len(problems) == 1, problems
        assert found in problems[0], problems
    problems, reports = run(capsys, train, unlike)
    assert not problems
    assert "image_ids" in reports[-1]["notes"][0]
    assert "5 of 5" in reports[-1]["notes"][0]
    assert not run(capsys, train, clean)[1][-1]["notes"]
    other_encoder = save(tmp_path / "rn.pkl", 5, embedding=torch.randn(5, 640), first_id=10, meta={"encoder": "RN50x4"})
    assert "by image_id" in run(capsys, train, other_encoder, code=1)[0][0]


def test_published_files_with_a_row_a_caption_are_no_duplicates(tmp_path, capsys, no_towers):
    embedding = torch.randn(4, 640).repeat_interleave(5, dim=0)
    captions = [{"image_id": str(row // 5), "caption": f"text {row}.", "clip_embedding": row} for row in range(20)]
    with open(tmp_path / "oscar_split_RN50x4_train.pkl", "wb") as file:
        pickle.dump({"clip_embedding": embedding, "captions": captions}, file)
    problems, (report,) = run(capsys, tmp_path / "oscar_split_RN50x4_train.pkl")
    assert not problems
    assert report["distinct_embeddings"] == 4
    assert report["encoder"] == "RN50x4"


def test_several_embeddings_an_image_are_checked_too(tmp_path, capsys, no_towers):
    embedding = torch.randn(6, 3, 8)
    embedding[0, 2] = 0  # no vector here: nothing wrong
    embedding[4] = 0
    for name in ("a.pkl", "a"):
        problems, (report,) = run(capsys, save(tmp_path / name, 6, embedding=embedding), code=1)
        assert problems == ["1 of 6 embeddings are zero throughout (row 4)"]
        assert report["embeddings_per_image"] == 3
    assert "several embeddings an image" in report["alignment"]["reason"]


def test_describe_tells_what_a_published_file_does_not_say(tmp_path, capsys):
    tiny.save_published_features(tmp_path / "oscar_split_ViT-B_32_train.pkl", [["a dog", "one dog"], ["a cat"]])
    save(tmp_path / "ours", 3)
    assert check.main(["describe", str(tmp_path / "oscar_split_ViT-B_32_train.pkl"), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "shape: [2, 512]\ndtype: float32\nimages: 2\ncaptions: 3\nwidth: 512\nencoder: ViT-B/32" in said
    assert "format_version: 1" in said
    assert "normalized: False" in said


def test_equal_rows_have_equal_hashes_and_others_do_not():
    from features.check import _hashes

    weights = np.random.default_rng(0).integers(1, 2**63, 16, dtype=np.uint64)
    rows = np.random.default_rng(1).integers(-1, 2, (5000, 16)).astype(np.float16).astype(np.float32)
    assert len(np.unique(_hashes(rows, weights))) == len(np.unique(rows, axis=0))
