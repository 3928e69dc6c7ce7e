"""Several embeddings an image: patch tokens, and a sound's windows apart, from the parse script to the caption."""

import csv

import numpy as np
import pytest
import soundfile
import torch

import parse_clotho
import parse_folder
import predict
import tiny
import train
from features.loading import MOST_APART, encode_views
from features.store import load_features
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
TRANSFORMER = "--mapping_type transformer --num_layers 1 --prefix_length 4 --max_steps 2 --warmup_steps 1 --device cpu".split()


def learn_and_caption(features, tiny_gpt2, thing, capsys):
    words = ["--data", features, "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), *TRANSFORMER]
    assert train.main(words) == 0
    assert predict.main(["-C", "out/coco_prefix-000.pt", thing, "--device", "cpu", "--entry_length", "4"]) == 0
    name, caption = capsys.readouterr().out.splitlines()[-2:]
    assert name == thing
    assert caption


def test_patch_tokens_are_kept_and_read_by_the_transformer(workdir, tiny_gpt2, capsys):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    for number in range(3):
        path = tiny.save_picture(workdir / f"photos/{number}.jpg", number)
        path.with_suffix(".txt").write_text(tiny.CAPTIONS[number])
    words = ["photos", "--val_share", "0", "--out", "tokens.pkl", "--pooling", "none", "--device", "cpu", "--batch_size", "2"]
    assert parse_folder.main(words) == 0
    features = load_features("tokens.pkl")
    assert features.clip_embedding.shape == (3, 5, 64)
    assert features.meta["pooling"] == "none"  # class token and 2 x 2 patches
    encoder = load_encoder("ViT-B/32", pooling="none")
    expected = torch.stack([encoder.preprocess(workdir / f"photos/{number}.jpg") for number in range(3)])
    assert torch.allclose(features.clip_embedding, encoder.encode(expected), atol=1e-5)
    learn_and_caption("tokens.pkl", tiny_gpt2, "photos/1.jpg", capsys)
    with pytest.raises(SystemExit):
        train.main(["--data", "tokens.pkl", "--out_dir", "mlp", "--gpt2_type", str(tiny_gpt2), "--device", "cpu"])
    assert "take --mapping_type transformer" in capsys.readouterr().err


def test_a_sounds_windows_are_kept_apart(workdir, tiny_gpt2, capsys):
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    noise = np.random.default_rng(0)
    (workdir / "sounds").mkdir()
    with open("captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", *(f"caption_{n}" for n in range(1, 6))])
        for number, seconds in enumerate((0.5, 5.0, 3.0)):
            soundfile.write(f"sounds/{number}.wav", noise.standard_normal(int(44100 * seconds)) * 0.1, 44100)
            table.writerow([f"{number}.wav", *tiny.CAPTIONS[:5]])
    words = ["--captions_path", "captions.csv", "--audio_path", "sounds", "--device", "cpu", "--batch_size", "1", "--out"]
    assert parse_clotho.main([*words, "apart.pkl", "--pooling", "none"]) == 0
    assert parse_clotho.main([*words, "mean.pkl"]) == 0
    apart, mean = load_features("apart.pkl").clip_embedding, load_features("mean.pkl").clip_embedding
    held = (apart != 0).any(-1).sum(1)
    assert apart.shape == (3, held.max(), 512)
    assert held[0] == 1 < held[2] < held[1]
    assert torch.allclose(apart.sum(1) / held[:, None], mean, atol=1e-5)
    learn_and_caption("apart.pkl", tiny_gpt2, "sounds/1.wav", capsys)


def test_of_a_very_long_record_neighbouring_views_are_averaged():
    class Encoder:
        device, pooling = torch.device("cpu"), "none"

        def encode(self, views):
            return views

    long, short = torch.arange(3.0 * MOST_APART).view(-1, 1), torch.ones(2, 1)
    rows = encode_views(Encoder(), [long, short])
    assert rows.shape == (2, MOST_APART, 1)
    assert rows[0, :, 0].tolist() == [3.0 * number + 1 for number in range(MOST_APART)]
    assert rows[1, :2, 0].tolist() == [1.0, 1.0]
    assert not rows[1, 2:].any()
