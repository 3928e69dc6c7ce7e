"""Captions copied from the training set: they equal a plain reference, never come from the evaluated images, and are scored beside ours."""

import math
import random

import numpy as np
import pytest
import torch
from test_consensus import choose_plainly, plain_cider, plain_frequencies

from evaluating import read, refuse, run, write
from evaluation import baseline
from features import neighbours
from features.embeddings import MappedEmbeddings
from features.store import load_features, save_features

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--metrics", "rouge", "cider", "--bootstrap", "50"]
WIDTH, ENCODER = 8, "ViT-B/32"
WORDS = "a a the dog cat red runs on grass two sits".split()


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The plain tokenizer, which takes no time to start."""
    monkeypatch.setattr("evaluation.tokens.java_is_here", lambda: False)


def save_set(path, ids, seed, per_image=3, width=WIDTH, encoder=ENCODER, **meta):
    """Write a feature file of random embeddings and captions, the rows in another order than the captions. Returns Features."""
    draw, count = random.Random(seed), len(ids)
    embeddings = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.rand(count, 1).add(0.1)
    rows = draw.sample(range(count), count)
    captions = [
        {"image_id": image_id, "caption": " ".join(draw.choices(WORDS, k=draw.randrange(2, 8))), "clip_embedding": row}
        for _ in range(per_image)
        for image_id, row in zip(ids, rows)
    ]
    save_features(path, embeddings, captions, {"encoder": encoder, "normalized": False, **meta})
    return load_features(path)


@pytest.fixture
def sets(workdir):
    """train.pkl of 40 images, val.pkl of 6 others, and predictions of these."""
    train, val = save_set("train.pkl", list(range(40)), seed=1), save_set("val.pkl", list(range(100, 106)), seed=2)
    write("ours.json", [{"image_id": image_id, "caption": "a dog runs"} for image_id in range(100, 106)])
    return train, val


def words_for(*more, data="val.pkl", train="train.pkl"):
    return ["--predictions", "ours.json", "--data", data, "--train_data", train, "--baseline", "nearest", *FAST, *more]


def copied(workdir, name):
    """The captions of a baseline that scores.json came with, by image_id."""
    return {row["image_id"]: row["caption"] for row in read(workdir / f"scores.predictions.{name}.json")}


def plain_baseline(train, val, evaluated=()):
    """For each image of val, what both baselines say, by loops alone; captions of `evaluated` images are not used."""

    def by_image(features):
        images = {}
        for caption in features.captions:
            row = caption["clip_embedding"]
            images.setdefault(caption["image_id"], (features.clip_embedding[row].tolist(), []))[1].append(caption["caption"])
        return images

    known = {image_id: one for image_id, one in by_image(train).items() if image_id not in evaluated}
    documents, found = [captions for _, captions in known.values()], {}
    for image_id, (embedding, _) in by_image(val).items():

        def cosine(other):
            return sum(a * b for a, b in zip(embedding, other)) / math.sqrt(sum(a * a for a in embedding) * sum(b * b for b in other))

        near = sorted(known.values(), key=lambda one: -cosine(one[0]))[:15]
        texts = [text for _, captions in near for text in captions]
        agreed = texts[choose_plainly(texts, Cider(documents))]
        found[image_id] = {"nearest": near[0][1][0], "agreed": agreed}
    return found


class Cider:
    """plain_cider over fixed documents, each pair computed once."""

    def __init__(self, documents):
        self.documents, self.frequencies, self.known = documents, plain_frequencies(documents), {}

    def __call__(self, one, other):
        if (one, other) not in self.known:
            self.known[one, other] = plain_cider(one, other, self.documents, self.frequencies)
        return self.known[one, other]


@pytest.mark.parametrize("blocks", [4096, 7])
def test_copied_captions_equal_a_plain_reference(sets, workdir, monkeypatch, blocks):
    monkeypatch.setattr(neighbours, "QUERIES", blocks - 3)
    monkeypatch.setattr(neighbours, "ROWS", blocks)
    run(*words_for("--out", "scores.json"))
    expected = plain_baseline(*sets)
    for name in baseline.BASELINES:
        assert copied(workdir, name) == {image_id: one[name] for image_id, one in expected.items()}


@pytest.mark.parametrize("name", [str, "{:012d}.jpg".format, "COCO_val2014_{:012d}".format, "coco_{}".format])
def test_an_evaluated_images_own_captions_are_never_copied(sets, workdir, capsys, name):
    train, val = sets
    leaked = [
        {"image_id": name(image_id), "caption": f"leaked {image_id}", "clip_embedding": len(train.clip_embedding) + row}
        for image_id, row in {caption["image_id"]: caption["clip_embedding"] for caption in val.captions}.items()
    ]
    embeddings = torch.cat([train.clip_embedding, val.clip_embedding])  # the nearest image to each would be itself
    save_features("leaky.pkl", embeddings, [*train.captions, *leaked], train.meta)
    run(*words_for("--out", "scores.json", train="leaky.pkl"))
    expected = plain_baseline(*sets)
    for which in baseline.BASELINES:
        assert copied(workdir, which) == {image_id: one[which] for image_id, one in expected.items()}
    assert "copied captions come from 40 images of leaky.pkl; 6 more are evaluated here, and left out" in capsys.readouterr().out


def test_ids_without_suffix_or_folder_are_known_as_the_evaluated_images_too(workdir):
    train = save_set("train.pkl", [f"a/{number}.jpg" for number in range(20)], seed=1)
    rows = {caption["image_id"]: caption["clip_embedding"] for caption in train.captions}
    own = {"3": "a/3.jpg", "photos/4.jpg": "a/4.jpg"}
    captions = [{"image_id": image_id, "caption": "a dog", "clip_embedding": place} for place, image_id in enumerate(own)]
    save_features("val.pkl", train.clip_embedding[[rows[image_id] for image_id in own.values()]], captions, train.meta)
    write("ours.json", [{"image_id": image_id, "caption": "a dog"} for image_id in own])
    run(*words_for("--out", "scores.json"))
    expected = plain_baseline(train, load_features("val.pkl"), evaluated=set(own.values()))
    for name in baseline.BASELINES:
        assert copied(workdir, name) == {image_id: one[name] for image_id, one in expected.items()}


def test_a_feature_directory_gives_the_same_captions_and_stays_mapped(sets, workdir, monkeypatch):
    run(*words_for("--out", "scores.json"))
    expected = {name: copied(workdir, name) for name in baseline.BASELINES}
    train, val = sets
    for folder, features in (("train_set", train), ("val_set", val)):
        save_features(folder, features.clip_embedding, features.captions, features.meta)
    monkeypatch.setattr(neighbours, "ROWS", 5)
    monkeypatch.setattr(neighbours, "QUERIES", 2)
    read_rows, read_as_it_was = [], MappedEmbeddings.__getitem__

    def counted(self, index):
        found = read_as_it_was(self, index)
        read_rows.append(len(found) if found.ndim > 1 and not isinstance(index, slice) else 0)  # slices: the check for NaN
        return found

    monkeypatch.setattr(MappedEmbeddings, "__getitem__", counted)
    run(*words_for("--out", "scores.json", data="val_set", train="train_set"))
    assert {name: copied(workdir, name) for name in baseline.BASELINES} == expected
    assert 0 < max(read_rows) <= 5


def test_of_several_embeddings_per_image_the_sum_is_compared_and_a_row_of_zeros_is_nobodys_neighbour():
    draw = torch.Generator().manual_seed(3)
    queries, known = torch.randn(4, 3, 5, generator=draw), torch.randn(9, 2, 5, generator=draw).half()
    known[2] = 0
    rows = np.array([0, 2, 3, 7, 8])
    found = neighbours.find_nearest(queries, [3, 1], known, rows, 4)
    cosines = torch.nn.functional.cosine_similarity(queries[[3, 1]].sum(1)[:, None], known[rows].float().sum(1)[None], dim=-1)
    assert found.tolist() == cosines.argsort(dim=1, descending=True)[:, :4].tolist()
    huge = neighbours.find_nearest(queries * 1e30, [3, 1], known.float() * 1e30, rows, 4)
    assert huge.tolist() == found.tolist()


def test_a_published_file_with_a_row_per_caption_counts_each_image_once(sets, workdir):
    train, _ = sets
    captions = [{**caption, "clip_embedding": row} for row, caption in enumerate(train.captions)]
    save_features("published.pkl", train.clip_embedding[train.caption_rows], captions, train.meta)
    written = []
    for name in ("train.pkl", "published.pkl"):
        run(*words_for("--out", "scores.json", train=name))
        written.append([copied(workdir, which) for which in baseline.BASELINES])
    assert written[0] == written[1]


def test_fewer_training_images_than_neighbours_are_all_used(sets, workdir):
    few = save_set("few.pkl", [7, 8], seed=4, per_image=1)
    run(*words_for("--out", "scores.json", train="few.pkl"))
    expected = plain_baseline(few, sets[1])
    assert copied(workdir, "agreed") == {image_id: one["agreed"] for image_id, one in expected.items()}


# -- Scores ------------------------------------------------------------------------------------------------------------------


def test_they_stand_in_the_same_table_and_the_paired_test_is_that_of_two_files(sets, workdir, capsys):
    run(*words_for("--out", "scores.json"))
    printed = capsys.readouterr().out
    heading = next(line for line in printed.splitlines() if line.startswith("score x 100"))
    assert heading.split("  ")[-1].strip() == "agreed of 15 nearest" and "nearest training image" in heading and "ours.json" in heading
    assert "captioner - nearest training image" in printed and "captioner - agreed of 15 nearest" in printed
    found = read(workdir / "scores.json")
    for name in ("nearest", "agreed"):
        one = found["baselines"][name]
        assert one["predictions_file"] == f"scores.predictions.{name}.json"
        run("--predictions", one["predictions_file"], "ours.json", "--data", "val.pkl", *FAST, "--out", "pair.json")
        pair = read(workdir / "pair.json")
        assert pair["scores"] == one["scores"] and pair["intervals"] == one["intervals"] and pair["comparison"] == one["comparison"]
        assert pair["other"]["scores"] == found["scores"]


def test_a_captioner_that_does_not_beat_them_is_told_so_and_one_that_does_is_not(sets, workdir, capsys):
    run(*words_for("--out", "scores.json"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "does not beat" in line]
    assert len(lines) == 2 and lines == [line for line in read(workdir / "scores.json")["notes"] if "beat" in line]
    cider = read(workdir / "scores.json")["baselines"]["agreed"]["scores"]["CIDEr"]
    assert lines[1].startswith("ours.json does not beat captions copied from the training set (agreed of 15 nearest): CIDEr ")
    assert f"against {100 * cider:.2f}, 95 % interval of the difference " in lines[1]
    truth = {caption["image_id"]: caption["caption"] for caption in sets[1].captions}
    write("ours.json", [{"image_id": image_id, "caption": caption} for image_id, caption in truth.items()])
    run(*words_for("--metrics", "rouge", "--bootstrap", "0"))
    assert "does not beat" not in capsys.readouterr().out


def test_a_checkpoint_is_scored_beside_them(mini_demo, workdir, capsys):
    words = ["-C", mini_demo / "checkpoints/demo-003.pt", "--data", mini_demo / "heldout.pkl", "--device", "cpu", "--entry_length", 30]
    run(*words, "--train_data", mini_demo / "train.pkl", "--baseline", "nearest", *FAST, "--out", "scores.json", "--histogram", "rouge")
    found = read(workdir / "scores.json")
    assert found["baselines"]["nearest"]["captions"]["novel_share"] == found["baselines"]["agreed"]["captions"]["novel_share"] == 0
    assert {row["image_id"] for row in read(workdir / "scores.predictions.agreed.json")} == {
        row["image_id"] for row in read(workdir / "scores.predictions.json")
    }


# -- Bad input ---------------------------------------------------------------------------------------------------------------


def test_a_training_set_that_does_not_fit_gives_one_line(sets, workdir, capsys):
    train, val = sets
    save_set("other.pkl", [1, 2], seed=1, encoder="RN50")
    save_set("wide.pkl", [1, 2], seed=1, width=WIDTH + 1)
    save_set("unit.pkl", [1, 2], seed=1, normalized=True)
    save_features("several.pkl", torch.ones(1, 2, WIDTH), [{"image_id": 1, "caption": "a dog", "clip_embedding": 0}], {"encoder": ENCODER})
    save_features("none.pkl", torch.ones(1, WIDTH), [], {"encoder": ENCODER})
    save_features("blank.pkl", torch.ones(1, WIDTH), [{"image_id": 1, "caption": " ", "clip_embedding": 0}], {"encoder": ENCODER})
    for name, expected in (
        ("other.pkl", "other.pkl holds embeddings of RN50; val.pkl needs those of ViT-B/32"),
        ("wide.pkl", "wide.pkl holds 9-wide embeddings (ViT-B/32); val.pkl needs 8-wide ones"),
        ("unit.pkl", "unit.pkl holds normalised embeddings"), ("several.pkl", "several.pkl holds several embeddings per image"),
        ("none.pkl", "none.pkl holds no caption"), ("blank.pkl", "blank.pkl holds blank captions only"),
        ("val.pkl", "val.pkl holds captions of images that are all in val.pkl too"), ("absent.pkl", "no feature file absent.pkl"),
    ):  # fmt: skip
        assert expected in refuse(capsys, *words_for("--out", "scores.json", train=name))
    assert not (workdir / "scores.json").exists()


def test_wrong_options_give_one_line(sets, capsys):
    words = words_for()
    for words, expected in (
        (["--predictions", "ours.json", "--data", "val.pkl", "--baseline", "nearest"], "--baseline needs the embeddings of both sets"),
        (["--predictions", "ours.json", "--references", "val.pkl", "--train_data", "train.pkl", "--baseline", "nearest"], "both sets"),
        (words_for("--predictions", "ours.json", "ours.json"), "one set of captions"), (words_for("--baseline", "far"), "invalid choice"),
    ):  # fmt: skip
        assert expected in refuse(capsys, *words)
