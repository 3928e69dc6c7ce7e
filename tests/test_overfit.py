"""One command learns eight pictures by heart; prediction then says their captions word for word."""

import json

import pytest
import torch

import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = (
    "--data data/eight.pkl --out_dir out --gpt2_type {gpt2} --prefix_length 4 --bs 2 --epochs 24 --save_every 1000 "
    "--lr 1e-2 --warmup_steps 10 --gpt2_dropout 0 --device cpu --seed 1 --log_every 10"
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_gpt2):
    """A folder in which the one command has run."""
    import train

    folder = tmp_path_factory.mktemp("overfit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.save_published_features("data/eight.pkl", [[caption] for caption in tiny.CAPTIONS])
        assert not train.main(TRAIN.format(gpt2=tiny_gpt2).split())
    return folder


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_eight_captions_learned_by_heart_come_back_word_for_word(learned, decoding, monkeypatch):
    import predict

    monkeypatch.chdir(learned)
    assert any("!" in caption for caption in tiny.CAPTIONS)
    assert any("St. Louis" in caption for caption in tiny.CAPTIONS)
    checkpoint = sorted((learned / "out").glob("coco_prefix-[0-9][0-9][0-9].pt"))[-1]
    assert not predict.main(
        ["--data", "data/eight.pkl", "--checkpoint", str(checkpoint), "--decoding", decoding, "--out", "captions.json", "--device", "cpu"]
    )
    found = json.loads((learned / "captions.json").read_text())
    assert [str(one["image_id"]) for one in found] == [str(1000 + row) for row in range(8)]
    assert [one["caption"] for one in found] == tiny.CAPTIONS


def test_the_checkpoint_alone_rebuilds_the_captioner(learned, tiny_gpt2, monkeypatch):
    from features.store import load_features
    from models.checkpoints import load_checkpoint
    from models.decoding import generate

    monkeypatch.chdir(learned)
    checkpoint = sorted((learned / "out").glob("coco_prefix-[0-9][0-9][0-9].pt"))[-1]
    model = load_checkpoint(checkpoint)
    embeddings = torch.as_tensor(load_features("data/eight.pkl").clip_embedding)
    assert [one[0][0] for one in generate(model, embeddings)] == tiny.CAPTIONS


def test_the_loss_is_logged_and_falls(learned):
    lines = [json.loads(line) for line in (learned / "out/coco_prefix_metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.4 < 2 < losses[0]
    assert all({"step", "epoch", "loss", "lr", "captions_per_s"} <= line.keys() for line in lines if "loss" in line)
