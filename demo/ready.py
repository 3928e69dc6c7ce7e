"""A finished demo to hand to a notebook or a program: its checkpoint, its encoder, its language model, and what it has never seen.

    demo = ready_demo()                  pictures: the folder PREFIXCAP_DEMO names, else data/demo
    demo = ready_demo(sounds=True)       sounds: the folder PREFIXCAP_DEMO_AUDIO names, else data/demo_audio
    model = load_checkpoint(demo.checkpoint, demo.gpt2_type)

Where no finished demo lies there, the quick one is made.
"""

import os
from pathlib import Path
from typing import NamedTuple

from common import UserError
from demo import run, run_audio, tiny_models


class Ready(NamedTuple):
    """Where the parts of a finished demo lie."""

    checkpoint: Path
    encoder: str  # what load_encoder takes
    gpt2_type: str  # what load_checkpoint takes; where the folder was moved, the checkpoint's own config does not know it
    heldout: list  # paths of the held-out pictures or sounds, in order


def ready_demo(folder=None, sounds=False):
    """Find a finished demo in `folder`, or make the quick one there → Ready.

    folder: None for what the environment variable names, else the place `make demo` (or demo-audio) writes to. sounds: the demo of sounds.
    Raises UserError when the folder holds something else, and when making the demo fails.
    """
    variable, usual, heldout, script, takes = (
        ("PREFIXCAP_DEMO_AUDIO", "data/demo_audio", "evaluation/*.wav", run_audio, "under a minute on two cores")
        if sounds
        else ("PREFIXCAP_DEMO", "data/demo", "heldout/*.jpg", run, "about a minute on two cores")
    )
    folder = Path(folder or os.environ.get(variable) or usual)
    found = _find(folder, heldout)
    if found is None:
        if folder.exists() and not (folder / "world.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is no demo of {'sounds' if sounds else 'pictures'}, and holds something else. Name another folder.")
        print(f"no finished demo in {folder}: making the quick one there, {takes}", flush=True)
        try:
            failed = script.main(["--quick", "--folder", str(folder)])
        except SystemExit as end:
            failed = end.code
        found = None if failed else _find(folder, heldout)
        if found is None:
            raise UserError(f"the demo in {folder} did not come to its end; the reason stands above.")
    return found


def _find(folder, heldout):
    """The parts of the demo in `folder` → Ready, or None where one is missing. heldout: a pattern of file names."""
    checkpoints = sorted(folder.glob("checkpoints/demo-*.pt"))
    heldout = sorted(folder.glob(heldout))
    encoder, gpt2 = tiny_models.clip_path(folder), tiny_models.gpt2_path(folder)
    if not (checkpoints and heldout and encoder.is_file() and gpt2.is_dir()):
        return None
    return Ready(checkpoints[-1], str(encoder), str(gpt2), heldout)
