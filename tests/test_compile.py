"""train.py --compile: the same losses, the same checkpoints; a machine without a compiler is told so."""

import json
from pathlib import Path

import pytest

import tiny
import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(workdir, tiny_gpt2):
    """A command line of train.py without dropout, without its --tune and --prefix."""
    tiny.save_published_features(workdir / "train.pkl", [[text] for text in tiny.CAPTIONS])
    words = ["--data", "train.pkl", "--val_data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), "--device", "cpu"]
    words += ["--epochs", "3", "--bs", "3", "--warmup_steps", "1", "--lr", "1e-3", "--prefix_length", "4", "--log_every", "1"]
    return [*words, "--gpt2_dropout", "0", "--mixed_precision", "no"]


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "mapper", "lora"])
def test_compiled_losses_are_the_plain_ones(words, tune, capsys):
    import torch

    torch._dynamo.reset()
    words += ["--tune", tune, *(["--lora_dropout", "0"] if tune == "lora" else [])]
    losses = []
    for prefix, more in (("plain", []), ("compiled", ["--compile"])):
        assert train.main([*words, "--prefix", prefix, *more]) == 0
        lines = [json.loads(line) for line in Path(f"out/{prefix}_metrics.jsonl").read_text().splitlines()]
        losses.append([line.get("loss", line.get("val_loss")) for line in lines])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][-1] < losses[0][0]
    plain, compiled = (torch.load(f"out/{prefix}-002.pt") for prefix in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    capsys.readouterr()
    assert train.main([*words, "--prefix", "compiled", "--resume"]) == 0
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("more, message", [([], "--compile needs a compiler: g++ or clang++ was not found"),
                                           (["--gradient_checkpointing"], "do not go together")])  # fmt: skip
def test_compiling_without_a_compiler_or_beside_checkpointing_is_a_mistake_in_one_line(words, more, message, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as end:
        train.main([*words, "--compile", *more])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert message in lines[-1]
    assert not Path("out").exists()
