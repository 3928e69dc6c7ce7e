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

CHECKPOINTS = "checkpoints/demo-*.pt"


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
    variable, usual, heldout, script, parse = (
        ("PREFIXCAP_DEMO_AUDIO", "data/demo_audio", "evaluation/*.wav", run_audio, "parse development")
        if sounds
        else ("PREFIXCAP_DEMO", "data/demo", "heldout/*.jpg", run, "parse train")
    )
    folder = Path(folder or os.environ.get(variable) or usual)
    found = _find(folder, heldout)
    if found is None:
        if folder.exists() and not (folder / "world.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is no demo of {'sounds' if sounds else 'pictures'}, and holds something else. Name another folder.")
        print(
            f"no finished demo in {folder}: making the quick one there, a minute or two on two cores. It errs often; "
            f"what `make {'demo-audio' if sounds else 'demo'}` makes errs seldom, and is used once it is there.",
            flush=True,
        )
        # A checkpoint of an earlier world does not fit the new encoder.
        for checkpoint in folder.glob(CHECKPOINTS):
            checkpoint.unlink()
        script.build(folder, **script.QUICK)
        lines = script.command_lines(folder)
        for stage in (parse, "train"):  # the rest of the demo captions and scores
            run.run_script(lines[stage])
        found = _find(folder, heldout)
        if found is None:
            raise UserError(f"{folder} holds a demo that is not whole, with nothing in {heldout}. Remove it, to have it made anew.")
    return found


def _find(folder, heldout):
    """The parts of the demo in `folder` → Ready, or None where one is missing. heldout: a pattern of file names."""
    checkpoints = sorted(folder.glob(CHECKPOINTS))
    heldout = sorted(folder.glob(heldout))
    encoder, gpt2 = tiny_models.clip_path(folder), tiny_models.gpt2_path(folder)
    if not (checkpoints and heldout and encoder.is_file() and gpt2.is_dir()):
        return None
    return Ready(checkpoints[-1], str(encoder), str(gpt2), heldout)
