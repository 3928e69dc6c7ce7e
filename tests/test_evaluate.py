"""evaluate.py as its users run it: a checkpoint or prediction files in; a table, scores, captions and pictures out."""

import csv

import pytest

import predict
from evaluating import FAST, read, refuse, run, stand_in_tower, write, write_coco
from evaluation import tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def coco(workdir):
    """Four images, their references and predictions, in the working directory."""
    return write_coco()


@pytest.fixture(scope="module")
def captioned(mini_demo, tmp_path_factory):
    """scores.json and what goes with it, of the mini demo's checkpoint on its held-out pictures: the folder."""
    folder = tmp_path_factory.mktemp("captioned")
    words = ["--data", mini_demo / "heldout.pkl", "--checkpoint", mini_demo / "checkpoints/demo-003.pt", "--device", "cpu", *FAST]
    words += ["--train_data", mini_demo / "train.pkl", "--num_captions", 5, "--entry_length", 30, "--histogram", "bleu4"]
    run(*words, "--out", folder / "scores.json")
    return folder


def test_a_checkpoint_is_scored_on_a_feature_file_with_all_that_made_the_scores(captioned, mini_demo):
    found = read(captioned / "scores.json")
    assert list(found["scores"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert found["scores"]["BLEU-4"] > 0.2
    assert found["images"] == 40
    assert found["references_per_image"] == {"fewest": 5, "most": 5, "mean": 5.0}
    assert found["tokeniser"] in (tokens.PTB, tokens.PLAIN)
    for name, (low, high) in found["intervals"].items():
        assert low <= found["scores"][name] <= high
    captions = found["captions"]
    assert 0 < captions["distinct"] <= 40
    assert captions["ended_share"] > 0.9
    assert 0 <= captions["novel_share"] <= 1
    made_by = found["made_by"]
    assert made_by["command"].startswith("python evaluate.py --data ")
    assert made_by["seed"] == 0
    assert {"python", "torch", "java", "pycocoevalcap"} <= set(made_by["versions"])
    assert {path.rpartition("/")[2] for path in made_by["sha256"]} == {"heldout.pkl", "demo-003.pt", "train.pkl"}
    assert all(len(digest) == 64 for digest in made_by["sha256"].values())
    rows = read(captioned / "scores.predictions.json")
    assert len(rows) == 40
    assert all(len(row["captions"]) == 5 and row["captions"][0] == row["caption"] for row in rows)
    assert all(row["score"] < 0 and isinstance(row["ended"], bool) and set(row["metrics"]) == set(found["scores"]) for row in rows)
    assert found["best_of_captions"]["mean"] >= sum(row["metrics"]["BLEU-4"] for row in rows) / 40
    assert (captioned / "scores.bleu4.png").read_bytes().startswith(b"\x89PNG")


def test_the_captions_it_writes_score_the_same_when_read_back(captioned, mini_demo, workdir, capsys):
    annotations = next((mini_demo / "annotations").glob("*heldout*"))
    for references in (["--references", annotations], ["--data", mini_demo / "heldout.pkl"], ["--references", mini_demo / "heldout.pkl"]):
        run("--predictions", captioned / "scores.predictions.json", *references, *FAST, "--out", "again.json")
        assert read(workdir / "again.json")["scores"] == pytest.approx(read(captioned / "scores.json")["scores"], abs=1e-12)


def test_what_predict_writes_can_be_scored_in_each_of_its_formats(captioned, mini_demo, workdir):
    words = ["--checkpoint", str(mini_demo / "checkpoints/demo-003.pt"), "--data", str(mini_demo / "heldout.pkl"), "--device", "cpu"]
    expected = read(captioned / "scores.json")["scores"]
    for suffix in ("json", "jsonl", "csv"):
        assert predict.main([*words, "--entry_length", "30", "--num_captions", "2", "--out", f"captions.{suffix}"]) == 0
        run("--predictions", f"captions.{suffix}", "--data", mini_demo / "heldout.pkl", *FAST, "--out", "scores.json")
        assert read(workdir / "scores.json")["scores"] == pytest.approx(expected, abs=1e-12)


def test_equal_runs_write_equal_files(coco, workdir):
    written = []
    for _ in range(2):
        run("--predictions", "predictions.json", "--references", "captions_val2017.json", *FAST, "--out", "scores.json")
        written.append([(workdir / name).read_bytes() for name in ("scores.json", "scores.predictions.json")])
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.skipif(not tokens.java_is_here(), reason="no Java here")
def test_without_options_meteor_is_among_the_scores_and_the_table_names_what_they_hang_on(coco, workdir, capsys):
    run("--predictions", "predictions.json", "--references", "captions_val2017.json", "--out", "scores.json")
    printed = capsys.readouterr().out
    assert "4 images, 2.0 references per image (2 to 2), split val, words by PTB" in printed
    assert all(name in printed for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr"))
    found = read(workdir / "scores.json")
    assert found["scores"]["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert found["split"] == "val"
    # Every candidate is its second reference, word for word.
    assert found["scores"]["METEOR"] == pytest.approx(1)
    assert found["scores"]["ROUGE-L"] == 1


def test_two_files_are_compared_on_the_same_images(coco, workdir, capsys):
    write("worse.json", [{"image_id": key, "caption": "A cat."} for key in reversed(coco)])
    run("--predictions", "worse.json", "predictions.json", "--references", "captions_val2017.json", *FAST, "--out", "scores.json")
    found = read(workdir / "scores.json")
    assert found["predictions"] == "worse.json"
    assert found["other"]["predictions"] == "predictions.json"
    for name, one in found["comparison"].items():
        assert one["difference"] == pytest.approx(found["other"]["scores"][name] - found["scores"][name])
        assert 0 < one["p_value"] <= 1
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    assert found["comparison"]["CIDEr"]["difference"] > 0
    assert [row["caption"] for row in read(workdir / "scores.predictions.json")] == ["A cat."] * 4
    assert read(workdir / "scores.predictions.2.json")[0]["caption"] == coco[1][1]
    assert "second - first" in capsys.readouterr().out


def test_images_without_a_prediction_are_left_out_and_said_so(coco, capsys):
    write("few.json", [{"image_id": "000000000003", "caption": "A cat."}, {"image_id": 1, "caption": "A surfer."}])
    run("--predictions", "few.json", "--references", "captions_val2017.json", *FAST)
    assert "2 images have references but no prediction: they are left out" in capsys.readouterr().out


def test_clotho_captions_are_references_with_or_without_the_suffix(workdir):
    with open("clotho_captions_evaluation.csv", "w", newline="", encoding="utf-8") as file:
        rows = [["Rain, far.wav", "It rains", "Rain\nfalls"], ["Bell.wav", "A bell", ""]]
        csv.writer(file).writerows([["file_name", "caption_1", "caption_2"], *rows])
    write("predictions.json", [{"image_id": "Rain, far.wav", "caption": "It rains"}, {"image_id": "Bell", "caption": "A bell"}])
    run("--predictions", "predictions.json", "--references", "clotho_captions_evaluation.csv", *FAST, "--out", "scores.json")
    found = read(workdir / "scores.json")
    assert found["scores"]["ROUGE-L"] == 1
    assert found["split"] == "evaluation"
    assert found["references_per_image"] == {"fewest": 1, "most": 2, "mean": 1.5}


def test_nocaps_is_scored_by_domain_and_its_upload_file_written(coco, workdir, capsys):
    nocaps = read(workdir / "captions_val2017.json")
    nocaps["images"] = [{"id": key, "domain": name} for key, name in zip(coco, ("in-domain", "near-domain", "out-domain", "near-domain"))]
    write("nocaps_val.json", nocaps)
    rows = [{"image_id": key, "caption": "A cat on a plate."} for key in coco]
    write("captions.json", rows)
    run("--predictions", "captions.json", "--references", "nocaps_val.json", *FAST, "--out", "scores.json", "--upload", "upload.json")
    found = read(workdir / "scores.json")
    domains = found["domains"]
    assert {name: one["images"] for name, one in domains.items()} == {"in-domain": 1, "near-domain": 2, "out-of-domain": 1, "overall": 4}
    assert {name: domains["overall"][name] for name in found["scores"]} == found["scores"]
    write("near.json", [row for row in rows if row["image_id"] in (2, 4)])
    run("--predictions", "near.json", "--references", "nocaps_val.json", *FAST, "--out", "near_scores.json")
    alone = read(workdir / "near_scores.json")["scores"]
    assert {name: domains["near-domain"][name] for name in alone} == pytest.approx(alone)
    assert read(workdir / "upload.json") == rows
    assert "near-domain" in capsys.readouterr().out
    write("named.json", [{"image_id": "photo", "caption": "A cat."}])
    write("named_references.json", {"annotations": [{"image_id": "photo", "caption": "A cat."}]})
    words = ["--predictions", "named.json", "--references", "named_references.json", *FAST]
    assert "photo" in refuse(capsys, *words, "--upload", "up.json")
    assert not (workdir / "up.json").exists()


# -- CLIPScore ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tower(mini_demo, monkeypatch):
    return stand_in_tower(mini_demo, monkeypatch)


def test_clipscore_of_true_pairs_beats_shuffled_ones(mini_demo, tower, workdir):
    truth = {}
    for row in read(next((mini_demo / "annotations").glob("*heldout*")))["annotations"]:
        truth.setdefault(row["image_id"], row["caption"])
    ids, captions = list(truth), list(truth.values())
    write("true.json", [{"image_id": key, "caption": caption} for key, caption in zip(ids, captions)])
    write("shuffled.json", [{"image_id": key, "caption": caption} for key, caption in zip(ids, captions[7:] + captions[:7])])
    words = ["--data", mini_demo / "heldout.pkl", "--metrics", "clipscore", "--bootstrap", "200", "--device", "cpu", "--out", "scores.json"]
    run("--predictions", "shuffled.json", "true.json", *words)
    found = read(workdir / "scores.json")
    assert list(found["scores"]) == ["CLIPScore", "RefCLIPScore"]
    for one in found["comparison"].values():
        assert one["difference"] > 0
        assert one["interval"][0] > 0
        assert one["p_value"] < 0.05
    assert all(text.startswith("A photo depicts ") for text in tower.asked)


def test_clipscore_without_embeddings_or_without_a_text_tower_is_the_users_error(mini_demo, tower, coco, capsys):
    words = ["--predictions", "predictions.json", "--metrics", "clipscore", "--device", "cpu"]
    assert "--data" in refuse(capsys, *words, "--references", "captions_val2017.json")
    found = refuse(capsys, *words, "--data", mini_demo / "heldout.pkl", "--clip_model_type", "tinyvit")
    assert "tinyvit has no text tower" in found
