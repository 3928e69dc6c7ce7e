"""What export writes beside the weights: a Space that runs with nothing but itself, and a model card."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gradio_client import Client, handle_file

import paging
from helpers import call, captioner
from models.checkpoints import config_path, save_checkpoint, save_config
from models.hub import HubCaptionModel, main
from models.space import page_requirements, write_space

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exported(page_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    rows = [{"image_id": 1, "caption": "a <b> | dog", "references": ["a dog"], "metrics": {}}]
    (folder / "predictions.json").write_text(json.dumps(rows))
    scores = {"scores": {"BLEU-4": 0.25, "CIDEr": 1.05, "SPICE": None}, "images": 20, "predictions_file": "predictions.json"}
    (folder / "scores.json").write_text(json.dumps(scores))
    call(main, ["export", page_world / "first.pt", folder / "out", "--scores", folder / "scores.json"])
    return folder / "out"


def test_the_card_states_scores_samples_and_the_command(exported):
    head, card = (exported / "README.md").read_text().split("---\n", 2)[1:]
    about = yaml.safe_load(head)
    assert (about["sdk"], about["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={about['sdk_version']}" in (ROOT / "requirements.txt").read_text()
    assert "on 20 images" in card
    assert "| BLEU-4 | 25.0 |\n| CIDEr | 105.0 |\n" in card and "SPICE" not in card
    assert r"| a \<b\> \| dog | a dog |" in card
    assert "python train.py --data x.pkl" in card


def test_a_card_without_scores_has_no_empty_sections(page_world, tmp_path):
    call(main, ["export", page_world / "second.pt", tmp_path / "out"])
    card = (tmp_path / "out/README.md").read_text()
    assert "## Training" in card and "## Scores" not in card and "## Samples" not in card


def test_a_captioner_that_retrieves_gets_no_space_that_cannot_run(tiny_gpt2, tmp_path, capsys):
    retrieval = {"captions": 2, "datastore": ["train.pkl"], "digest": "0"}
    model = captioner(tiny_gpt2, prompt="Like {retrieved} ", retrieval=retrieval)
    save_checkpoint(model, tmp_path / "x.pt", full=True)
    save_config(model.config, {}, config_path(tmp_path / "x.pt"))
    call(main, ["export", tmp_path / "x.pt", tmp_path / "out"])
    assert "no Space: its prompts need a datastore" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out/app.py").exists()


def test_packages_are_those_pinned_here_that_the_page_needs():
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    kept = [line for line in page_requirements().splitlines() if "==" in line]
    assert set(kept) <= set(pinned)
    assert {"torch", "transformers", "gradio", "timm", "librosa"} <= {line.partition("==")[0] for line in kept}
    assert not {"pytest", "ruff", "playwright", "tensorboard"} & {line.partition("==")[0] for line in kept}


@pytest.mark.slow
def test_the_space_runs_elsewhere_with_nothing_of_this_folder(exported, page_world, tmp_path):
    moved = exported.rename(tmp_path / "moved")
    port = paging.free_port()
    words = [sys.executable, moved / "app.py", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as space:
        try:
            assert space.stdout.readline().startswith(f"captions by moved at http://127.0.0.1:{port}")
            found = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
                file=handle_file(str(page_world / "pictures/1.jpg")), api_name="/caption"
            )
        finally:
            space.terminate()
    with paging.serving(page_world / "first.pt") as url:
        here = Client(url, verbose=False).predict(file=handle_file(str(page_world / "pictures/1.jpg")), api_name="/caption")
    moved.rename(exported)
    assert [row["caption"] for row in found[0]["captions"]] == [row["caption"] for row in here[0]["captions"]]
    scores = [row["score"] for row in found[0]["captions"]]
    # The Space has all cores and this process one: sums in another order.
    assert scores == pytest.approx([row["score"] for row in here[0]["captions"]], abs=1e-4)


def test_an_encoder_that_is_a_file_or_in_the_checkpoint_comes_along(exported, tmp_path, page_world):
    assert (exported / "encoder.pt").read_bytes() == (page_world / "clip.pt").read_bytes()
    assert '"--clip_model_type", str(HERE / "encoder.pt")' in (exported / "app.py").read_text()
    model = HubCaptionModel.from_pretrained(exported)
    inside = f"clipxgpt:{page_world / 'second.pt'}"  # what published CLIPxGPT weights, which hold their vision tower, are called
    model.origin = dataclasses.replace(model.origin, encoder=inside)
    write_space(tmp_path, model)
    assert '"--clip_model_type", "clipxgpt:" + str(HERE / "encoder.pt")' in (tmp_path / "app.py").read_text()
    assert (tmp_path / "encoder.pt").read_bytes() == (page_world / "second.pt").read_bytes()


def test_the_space_holds_all_the_code_that_it_imports(exported):
    inside = {path.relative_to(exported / "prefixcap").as_posix() for path in (exported / "prefixcap").rglob("*.py")}
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in inside:
        for module in re.findall(r"(?m)^\s*(?:from|import) (\w+)", (exported / "prefixcap" / name).read_text()):
            there = f"{module}.py" in inside or f"{module}/__init__.py" in inside
            assert module not in ours or there or (name, module) == ("app.py", "demo"), (name, module)


@pytest.mark.parametrize("content", ["[]", "{", '{"scores": 3}'])
def test_a_file_without_scores_is_one_line(page_world, tmp_path, capsys, content):
    (tmp_path / "scores.json").write_text(content)
    call(main, ["export", page_world / "first.pt", tmp_path / "out", "--scores", tmp_path / "scores.json"], code=2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
