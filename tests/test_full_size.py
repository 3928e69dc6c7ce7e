"""The published commands on real photographs, with a full-size ViT-B/32 and GPT-2 of random weights."""

import json
import shutil

import pytest
import torch

import parse_coco
import predict
import train

pytestmark = pytest.mark.slow
SHORT = ["--max_steps", "5", "--warmup_steps", "5", "--lr", "1e-4", "--log_every", "1", "--device", "cpu"]
VARIANTS = {
    "mlp": [],
    "transformer": "--only_prefix --mapping_type transformer --num_layers 8 --prefix_length 40 --prefix_length_clip 40".split(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    """A working directory with the photographs parsed and both variants trained for 5 steps."""
    from clip.model import CLIP
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("full_size")
    weights = folder / "data/weights"
    (weights / "gpt2").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12).state_dict(), weights / "ViT-B-32.pt")
    GPT2LMHeadModel(GPT2Config()).save_pretrained(weights / "gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "gpt2" / name, weights / "gpt2" / name)
    tokenizer = GPT2TokenizerFast.from_pretrained(weights / "gpt2")
    tokenizer.save_pretrained(weights / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mini = shared_data / "coco_mini"
        words = ["--annotations", mini / "captions_train2017.json", "--images", mini / "train2017", "--out", "mini.pkl"]
        assert parse_coco.main([*map(str, words), "--clip_model_type", "ViT-B/32", "--device", "cpu"]) == 0
        for prefix, words in VARIANTS.items():
            assert train.main(["--data", "mini.pkl", "--out_dir", "out", "--prefix", prefix, *words, *SHORT]) == 0
    return folder


def test_eighty_photographs_are_eighty_rows_and_four_hundred_captions(folder):
    from features.store import load_features

    features = load_features(folder / "mini.pkl")
    assert features.clip_embedding.shape == (80, 512)
    assert len(features.captions) == 400
    assert sorted(features.caption_rows.tolist()) == [row for row in range(80) for _ in range(5)]
    assert features.meta["encoder"] == "ViT-B/32"


@pytest.mark.parametrize("prefix", VARIANTS)
def test_both_published_commands_learn(folder, prefix):
    losses = [json.loads(line)["loss"] for line in open(folder / f"out/{prefix}_metrics.jsonl")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("prefix", VARIANTS)
@pytest.mark.parametrize("decoding", ["beam", "greedy", "sample"])
def test_three_photographs_are_captioned_each_way(folder, shared_data, monkeypatch, prefix, decoding):
    monkeypatch.chdir(folder)
    photographs = [str(path) for path in sorted((shared_data / "coco_mini/train2017").glob("*.jpg"))[:3]]
    words = ["--decoding", decoding, "--entry_length", "12", "--out", "out.jsonl", "--device", "cpu"]
    assert predict.main(["-C", f"out/{prefix}-000.pt", *photographs, *words]) == 0
    lines = [json.loads(line) for line in open("out.jsonl")]
    assert [line["file"] for line in lines] == photographs
    assert all(line["score"] < 0 for line in lines)
