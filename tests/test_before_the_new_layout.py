"""Files written by the code as it was before training/ was rearranged: they load, decode and resume to the same weights.

Processors round differently, so weights and losses are compared to 1e-4. Under tests/data/before_the_new_layout/ stand a tiny GPT-2 (8
wide, one block), features of six images (16 wide), and two runs that were interrupted: `run` after four of twelve steps, `published`
(with --published) after three of nine. expected-003.pt is where the old code ended `run`, captions.json what it said of the six images
with run-000.pt.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from features.store import load_features
from models.checkpoints import load_checkpoint
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = Path(__file__).parent / "data" / "before_the_new_layout"
COMMON = "--data train.pkl --out_dir out --gpt2_type ./gpt2 --device cpu --prefix_length 2 --bs 4 --lr 1e-2 --warmup_steps 2 --tracker none"
COMMON += " --resume"
RUN = f"{COMMON} --prefix run --val_data val.pkl --val_every 3 --mixed_precision no --epochs 4 --log_every 1 --save_steps 2"
PUBLISHED = f"{COMMON} --prefix published --published --mapping_type transformer --num_layers 1 --prefix_length_clip 2 --only_prefix"
PUBLISHED += " --epochs 3 --log_every 2 --save_steps 1"


@pytest.fixture
def old(workdir):
    """The old files, in the working directory."""
    return shutil.copytree(FILES, workdir, dirs_exist_ok=True)


def log(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("captions_per_s", "val_collapse")} for line in lines]


def test_the_feature_file_loads(old):
    features = load_features("train.pkl")
    assert features.clip_embedding.shape == (6, 16)
    assert len(features.captions) == 12
    assert features.meta["encoder"] == "ViT-B/32"


def test_the_checkpoint_says_what_it_said(old):
    model = load_checkpoint("out/run-000.pt")
    embeddings = load_features("train.pkl").clip_embedding.float()
    said = json.loads(Path("captions.json").read_text())
    for decoding in ("greedy", "beam"):
        assert [several[0][0] for several in generate(model, embeddings, decoding, entry_length=12)] == said[decoding]


def test_the_run_resumes_to_the_weights_that_the_old_code_reached(old, capsys):
    assert train.main(RUN.split()) == 0
    assert "resumed out/run_state.pt after step 4 of 12" in capsys.readouterr().out
    found, expected = (torch.load(path, weights_only=True) for path in ("out/run-003.pt", "expected-003.pt"))
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    lines, old_lines = log("out/run_metrics.jsonl"), log("expected_metrics.jsonl")
    assert len(lines) == len(old_lines)
    assert all(line == pytest.approx(old_line, rel=1e-4, abs=1e-5) for line, old_line in zip(lines, old_lines))


def test_a_published_run_resumes(old, capsys):
    assert train.main(PUBLISHED.split()) == 0
    assert "resumed out/published_state.pt after step 3 of 9" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in torch.load("out/published-002.pt", weights_only=True).values())


@pytest.mark.parametrize("more, named", [("--seed 3", "seed 0 (now 3)"), ("--lr 1e-3", "lr 0.01 (now 0.001)"),
                                         ("--prefix_length 3", "prefix_length 2 (now 3)"),
                                         ("--val_every 2", "val_every 3 (now 2)"), ("--data val.pkl", "data '")])  # fmt: skip
def test_another_run_is_refused_by_what_differs(old, capsys, more, named):
    before = Path("out/run_state.pt").read_bytes()
    with pytest.raises(SystemExit):
        train.main([*RUN.split(), *more.split()])
    message = capsys.readouterr().err
    assert named in message
    assert message.count("(now") == 1
    assert Path("out/run_state.pt").read_bytes() == before
