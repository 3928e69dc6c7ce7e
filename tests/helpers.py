"""What tests of several scripts share: running a script, the one line of an error, captioners of random weights."""

import pytest
import torch

import train
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig
from models.weights import load_language_model, load_tokenizer


def call(main, words, code=0):
    """Run a script's main with `words`, each as text; it must end with exit code `code`."""
    words = [str(word) for word in words]
    if not code:
        assert main(words) == 0
        return
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code


def error_line(main, capsys, words):
    """Run a script's main, which must end with exit code 2 and one line on stderr. Returns the line."""
    capsys.readouterr()
    call(main, words, code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    script = f"{main.__module__.rpartition('.')[2]}.py: error: "
    assert lines[0].startswith(script) and not lines[0].endswith(".."), lines
    return lines[0]


def train_tiny(folder, *more, code=0):
    """Run train.py for tests of options: train.pkl, the language model in `folder`, a log line per step, results in out/."""
    words = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", folder, "--device", "cpu", "--prefix_length", 4]
    words += ["--bs", 6, "--lr", "1e-3", "--log_every", 1, "--mixed_precision", "no", *more]
    call(train.main, words if "--warmup_ratio" in more else [*words, "--warmup_steps", 0], code)


def captioner(folder, model_class=ClipCaptionModel, seed=1, **fields):
    """Make a captioner of random weights over the language model in `folder`; fields: of its CaptionConfig, some with defaults here."""
    gpt = load_language_model(str(folder))
    defaults = {"encoder": "ViT-B/32", "clip_width": 32, "prefix_length": 4, "gpt2_type": str(folder)}
    if fields.get("tune") == "lora":
        defaults["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}
    config = CaptionConfig(**defaults | {"gpt_config": gpt.config.to_diff_dict()} | fields)
    torch.manual_seed(seed)
    return model_class(config, gpt, load_tokenizer(str(folder)))
