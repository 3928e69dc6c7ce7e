"""Captions chosen by CLIP: the order is that of the cosines, and nothing else changes."""

import pytest
import torch

import evaluate
import predict
from evaluating import FAST, read, stand_in_tower
from prediction.reranking import rerank_by_clip

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainTower:
    """A text tower of three directions: a text points where its last word says."""

    modality, width = "image", 3

    def encode_text(self, texts):
        return torch.stack([torch.eye(3)["xyz".index(text[-1])] for text in texts])

    def project(self, clip_embedding):
        return torch.nn.functional.normalize(clip_embedding, dim=-1)


def test_the_nearest_caption_comes_first_and_equal_ones_keep_their_order():
    captions = [[("x", -1.0), ("y", -2.0), ("a z", -3.0), ("b z", -4.0)]]
    found = rerank_by_clip(captions, torch.tensor([[0.1, -0.5, 0.9]]), PlainTower(), 4)
    assert found == [[("a z", -3.0), ("b z", -4.0), ("x", -1.0), ("y", -2.0)]]
    assert rerank_by_clip(captions, torch.tensor([[0.1, -0.5, 0.9]]), PlainTower(), 1) == [found[0][:1]]


def test_cosine_and_score_are_weighed_in_standard_deviations():
    captions, image = [[("x", -1.0), ("y", -2.5), ("z", -4.5), ("x ", -1.5)]], torch.tensor([[0.6, 0.0, 0.8]])
    captions[0][3] = ("y x", -1.5)
    cosines, scores = [0.6, 0.0, 0.8, 0.6], [score for _, score in captions[0]]

    def plain(values):
        mean = sum(values) / len(values)
        spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        return [(value - mean) / spread for value in values]

    orders = set()
    for weight in (0.0, 0.5, 1.0, 3.0):
        totals = [cosine + weight * score for cosine, score in zip(plain(cosines), plain(scores))]
        expected = [captions[0][place] for place in sorted(range(4), key=lambda place: -totals[place])]
        assert rerank_by_clip(captions, image, PlainTower(), 4, weight) == [expected]
        orders.add(tuple(expected))
    assert len(orders) > 1
    assert rerank_by_clip([[("x", -1.0)] * 2], image, PlainTower(), 2, 1.0) == [[("x", -1.0)] * 2]


def test_reranked_captions_lie_nearer_to_their_pictures(mini_demo, monkeypatch, workdir):
    tower = stand_in_tower(mini_demo, monkeypatch)()
    words = ["-C", str(mini_demo / "checkpoints/demo-003.pt"), "--data", str(mini_demo / "heldout.pkl"), "--device", "cpu"]
    words += ["--entry_length", "30"]
    assert predict.main([*words, "--out", "plain.json"]) == 0
    assert predict.main([*words, "--rerank", "clip", "--out", "reranked.json"]) == 0
    from features.store import load_features

    features = load_features(mini_demo / "heldout.pkl")
    rows = {caption["image_id"]: caption["clip_embedding"] for caption in features.captions}
    means = []
    for name in ("plain.json", "reranked.json"):
        captions = read(workdir / name)
        images = tower.project(features.clip_embedding[[rows[row["image_id"]] for row in captions]])
        texts = tower.encode_text(["A photo depicts " + row["caption"] for row in captions])
        means.append((images * texts).sum(-1).mean().item())
    assert means[1] > means[0]


def test_evaluate_scores_the_captions_that_predict_chooses(mini_demo, monkeypatch, workdir):
    stand_in_tower(mini_demo, monkeypatch)
    words = ["-C", str(mini_demo / "checkpoints/demo-003.pt"), "--data", str(mini_demo / "heldout.pkl"), "--rerank", "clip"]
    words += ["--device", "cpu", "--entry_length", "30"]
    assert predict.main([*words, "--out", "predicted.json"]) == 0
    assert evaluate.main([*words, *FAST, "--out", "scores.json"]) == 0
    files = (workdir / "scores.predictions.json", workdir / "predicted.json")
    scored, predicted = ({row["image_id"]: row["caption"] for row in read(file)} for file in files)
    assert scored == predicted and len(scored) == 40


def test_reranking_needs_a_text_tower_and_several_captions(mini_demo, monkeypatch, workdir, capsys):
    stand_in_tower(mini_demo, monkeypatch)
    words = ["-C", str(mini_demo / "checkpoints/demo-003.pt"), "--data", str(mini_demo / "heldout.pkl"), "--rerank", "clip", "--device=cpu"]
    for more, expected in ((["--clip_model_type", "tinyvit"], "tinyvit has no text tower"), (["--decoding", "greedy"], "beam or sample")):
        with pytest.raises(SystemExit) as end:
            predict.main([*words, *more])
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
