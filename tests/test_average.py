"""python -m models.average: the mean of several epochs' weights is a checkpoint like any other."""

import json

import pytest
import torch

import predict
import tiny
from helpers import call, captioner, error_line
from models.average import main
from models.checkpoints import config_path, load_checkpoint, save_checkpoint, save_config

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = [("mlp", "full"), ("linear", "mapper"), ("linear", "lora"), ("transformer", "ends")]


def save_epochs(folder, gpt2, count, mapping_type="linear", tune="mapper", prefix="run"):
    """Write checkpoints of one run whose trained weights differ. Returns their paths."""
    model = captioner(gpt2, clip_length=3, num_layers=2, mapping_type=mapping_type, tune=tune).eval()
    paths = [folder / f"{prefix}-{epoch:03d}.pt" for epoch in range(count)]
    for path in paths:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
        save_checkpoint(model, path)
    save_config(model.config, {"seed": 0}, config_path(paths[0]))
    return paths


@pytest.mark.parametrize("mapping_type, tune", FORMS)
def test_the_average_is_the_mean_of_the_epochs_and_captions(tmp_path, tiny_gpt2, mapping_type, tune):
    first, *paths = save_epochs(tmp_path, tiny_gpt2, 4, mapping_type, tune)
    out = tmp_path / "run_average.pt"
    call(main, [first, *paths, "--last", 3, "--out", out])
    states = [torch.load(path) for path in paths]
    mean = torch.load(out)
    assert list(mean) == list(states[0])
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 3)
        assert tensor.dtype == states[0][name].dtype
    assert abs(out.stat().st_size - paths[0].stat().st_size) < 5000
    assert load_checkpoint(out).config == load_checkpoint(paths[0]).config
    tiny.save_published_features(tmp_path / "val.pkl", [["A cat."]] * 4, width=32)
    call(predict.main, ["--data", tmp_path / "val.pkl", "--checkpoint", out, "--out", tmp_path / "said.json", "--entry_length", 5])
    assert len(json.loads((tmp_path / "said.json").read_text())) == 4


def test_equal_epochs_average_to_themselves(tmp_path, tiny_gpt2):
    (path,) = save_epochs(tmp_path, tiny_gpt2, 1)
    again = tmp_path / "run-001.pt"
    again.write_bytes(path.read_bytes())
    call(main, [path, again, "--out", tmp_path / "run_average.pt"])
    call(main, [path, "--out", tmp_path / "alone.pt"])
    for name in ("run_average.pt", "alone.pt"):
        mean = torch.load(tmp_path / name)
        assert all(tensor.equal(mean[key]) for key, tensor in torch.load(path).items())


def broken(path, change):
    """Write a changed copy of a checkpoint, with its config."""
    state = torch.load(path)
    metadata = state._metadata
    change(state)
    state._metadata = metadata
    other = path.with_name("run-007.pt")
    torch.save(state, other)
    return other


def remove(state):
    del state["clip_project.bias"]


def widen(state):
    state["clip_project.bias"] = torch.zeros(3)


def spoil(state):
    state["clip_project.bias"][0] = torch.nan


@pytest.mark.parametrize("change, said", [(remove, "differs from"), (widen, "differs from"), (spoil, "is not finite")])
def test_a_file_that_does_not_belong_is_named(tmp_path, tiny_gpt2, capsys, change, said):
    paths = save_epochs(tmp_path, tiny_gpt2, 2)
    line = error_line(main, capsys, [*paths, broken(paths[0], change), "--out", tmp_path / "a.pt"])
    assert said in line
    assert "clip_project.bias" in line
    assert not (tmp_path / "a.pt").exists()


def test_what_cannot_be_averaged_is_one_line(tmp_path, tiny_gpt2, capsys):
    paths = save_epochs(tmp_path, tiny_gpt2, 2)
    (other,) = save_epochs(tmp_path, tiny_gpt2, 1, mapping_type="mlp", prefix="other")
    damaged, published = tmp_path / "damaged.pt", tmp_path / "published.pt"
    damaged.write_bytes(paths[0].read_bytes()[:500])
    torch.save(dict(torch.load(paths[0])), published)
    cases = [
        ([paths[0], paths[0]], "a.pt", "given twice"),
        (paths, paths[1].name, "is one of the checkpoints"),
        ([paths[0], other], "a.pt", "differs from"),
        ([paths[0], damaged], "a.pt", "cannot be read"),
        ([paths[0], published], "a.pt", "has no config"),
        ([paths[0], tmp_path / "none.pt"], "a.pt", "no checkpoint"),
    ]
    before = sorted(tmp_path.iterdir())
    for files, out, said in cases:
        assert said in error_line(main, capsys, [*files, "--out", tmp_path / out])
    assert sorted(tmp_path.iterdir()) == before
