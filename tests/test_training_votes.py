"""Captions chosen by the training set: the weights are those of plain ridge regression, and the order that of the weighted similarities."""

import json
import random

import numpy as np
import pytest
import torch
from test_consensus import draw_captions, plain_chrf, plain_cider

import evaluate
import predict
from evaluating import FAST, read
from features.store import load_features, save_features
from helpers import captioner, error_line
from models.checkpoints import save_checkpoint
from prediction.training_votes import RIDGE, VOTERS, TrainingVotes

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, SEVERAL = 32, 3


def save_set(path, images, seed, several=0, encoder="any", captions=2):
    """Write a feature file of random embeddings and captions, image 0 to images - 1. Returns its Features."""
    shape = (images, several, WIDTH) if several else (images, WIDTH)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    texts = draw_captions(random.Random(seed), images * captions)
    rows = [
        {"image_id": f"{seed}-{number % images}", "caption": f"a {text}", "clip_embedding": number % images}
        for number, text in enumerate(texts)
    ]
    save_features(path, embeddings, rows, {"encoder": encoder})
    return load_features(path)


def units(embeddings):
    embeddings = embeddings.double().sum(1) if embeddings.ndim == 3 else embeddings.double()
    return (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()


def plain_weights(known, query, left_out=None):
    """Weights of ridge regression in its dual form, over all images but one."""
    kept = [row for row in range(len(known)) if row != left_out]
    inner = known[kept] @ known[kept].T
    weights = np.zeros(len(known))
    weights[kept] = np.linalg.solve(inner + RIDGE * np.eye(len(kept)), known[kept] @ query)
    return weights


@pytest.mark.parametrize("several", [0, SEVERAL])
@pytest.mark.parametrize("images", [5, 60, 300])
def test_the_weights_are_those_of_ridge_regression(workdir, images, several):
    train = save_set("train.pkl", images, 1, several)
    others = save_set("val.pkl", 4, 2, several)
    votes, known = TrainingVotes(train, "train.pkl"), units(train.clip_embedding)
    places, weights = votes.weigh(others.clip_embedding[:])
    for query, of_image, found in zip(units(others.clip_embedding), places, weights):
        expected = plain_weights(known, query)
        summed = np.zeros(images)
        np.add.at(summed, of_image, found)
        counting = summed != 0
        assert set(np.flatnonzero(counting)) <= set(of_image)
        assert np.allclose(summed[counting], expected[counting], atol=1e-5)
        assert set(np.argsort(expected)[-VOTERS:]) | set(np.argsort(expected)[:VOTERS]) <= set(np.flatnonzero(counting))


def test_an_image_of_the_training_set_is_judged_by_the_others(workdir):
    train = save_set("train.pkl", 60, 1)
    votes, known = TrainingVotes(train, "train.pkl"), units(train.clip_embedding)
    ids = [f"1-{row}" for row in (0, 7)]
    for row, of_image, found in zip((0, 7), *votes.weigh(train.clip_embedding[[0, 7]], ids)):
        expected = plain_weights(known, known[row], left_out=row)
        summed = np.zeros(60)
        np.add.at(summed, of_image, found)
        assert summed[row] == 0
        ratio = summed[expected != 0] / expected[expected != 0]  # leaving an image out divides the weights of the others by one number
        assert np.allclose(ratio, ratio[0], rtol=1e-3)


@pytest.mark.parametrize("images", [20, 120])
def test_captions_are_judged_by_weighted_similarity(workdir, images):
    """Fewer than 100 images do not tell rare words from common ones: chrF compares there."""
    train = save_set("train.pkl", images, 1)
    votes = TrainingVotes(train, "train.pkl")
    embedding = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(9))
    texts = draw_captions(random.Random(3), 6)
    documents = {}
    for caption in train.captions:
        documents.setdefault(caption["clip_embedding"], []).append(caption["caption"])
    places, weights = (values[0] for values in votes.weigh(embedding))

    def similarity(one, other):
        return plain_cider(one, other, list(documents.values())) if images >= 100 else plain_chrf(one, other)

    expected = [
        sum(weight * np.mean([similarity(text, other) for other in documents[place]]) for place, weight in zip(places, weights) if weight)
        for text in texts
    ]
    assert np.allclose(votes.judge([texts], embedding)[0], expected, atol=1e-5)
    assert len(set(np.round(expected, 6))) > 1


@pytest.fixture
def scripts(tiny_gpt2, workdir):
    """A checkpoint of random weights, model.pt, with train.pkl and val.pkl. Returns the words that caption val.pkl."""
    save_checkpoint(captioner(tiny_gpt2, encoder="any"), "model.pt")
    save_set("train.pkl", 30, 1)
    save_set("val.pkl", 3, 2)
    return ["-C", "model.pt", "--data", "val.pkl", "--device", "cpu", "--entry_length", "6", "--num_captions", "5"]


@pytest.mark.parametrize("samples", [0, 7])
def test_predict_and_evaluate_put_the_best_judged_caption_first(scripts, workdir, samples):
    """Among beams, or among beams and samples, which are those of predict.py --decoding sample."""
    words = [*scripts, "--rerank", "train", "--train_data", "train.pkl", "--rerank_samples", str(samples)]
    assert predict.main([*scripts, "--out", "beams.jsonl"]) == 0
    sampling = ["--decoding", "sample", "--temperature", "0.6", "--top_p", "0.95", "--num_captions", str(samples or 1)]
    assert predict.main([*scripts, *sampling, "--out", "samples.jsonl"]) == 0
    assert predict.main([*words, "--out", "chosen.json"]) == 0
    assert evaluate.main([*words, *FAST, "--out", "scores.json"]) == 0
    votes = TrainingVotes(load_features("train.pkl"), "train.pkl")
    candidates = {}
    for name in ("beams.jsonl", "samples.jsonl")[: 1 + bool(samples)]:
        for line in (workdir / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            candidates.setdefault(row["image_id"], []).append(row["caption"])
    assert {len(texts) for texts in candidates.values()} == {5 + samples}
    judged = votes.judge(list(candidates.values()), load_features("val.pkl").clip_embedding[:3], list(candidates))
    expected = {image_id: texts[np.argmax(values.round(9))] for (image_id, texts), values in zip(candidates.items(), judged)}
    assert {row["image_id"]: row["caption"] for row in read(workdir / "chosen.json")} == expected
    assert {row["image_id"]: row["caption"] for row in read(workdir / "scores.predictions.json")} == expected
    assert expected != {image_id: texts[0] for image_id, texts in candidates.items()}


def test_wrong_training_sets_give_one_line(scripts, capsys):
    save_set("other.pkl", 3, 4, encoder="another")
    save_set("several.pkl", 3, 4, several=2)
    save_features("blank.pkl", torch.ones(1, WIDTH), [{"image_id": 1, "caption": " ", "clip_embedding": 0}], {"encoder": "any"})
    for script in (predict, evaluate):
        rerank = [*scripts, "--rerank", "train"]
        assert "give its feature file as --train_data" in error_line(script.main, capsys, rerank)
        wrong = {"other": "embeddings of another", "several": "--pooling", "blank": "blank captions only", "no": "no.pkl"}
        for name, expected in wrong.items():
            assert expected in error_line(script.main, capsys, [*rerank, "--train_data", f"{name}.pkl"])
        rerank += ["--train_data", "train.pkl"]
        for several in (["--num_captions", "501"], ["--rerank_samples", "496"]):
            assert "at most 500" in error_line(script.main, capsys, [*rerank, *several])
        assert "expected 0 or more" in error_line(script.main, capsys, [*rerank, "--rerank_samples", "-1"])
        for elsewhere in (rerank + ["--decoding", "sample"], [*scripts, "--rerank", "consensus"], scripts):
            assert "--rerank_samples adds samples" in error_line(script.main, capsys, [*elsewhere, "--rerank_samples", "2"])
    assert "--train_data is for --rerank" in error_line(predict.main, capsys, [*scripts, "--train_data", "train.pkl"])
