"""Find a finished demo for a notebook or a program: its checkpoint, encoder, language model, and held-out pictures.

    demo = ready_demo()                  pictures: the folder PREFIXCAP_DEMO names, else data/demo
    demo = ready_demo(sounds=True)       sounds: the folder PREFIXCAP_DEMO_AUDIO names, else data/demo_audio
    model = load_checkpoint(demo.checkpoint, demo.gpt2_type)

Where there is no finished demo, the quick one is made.
"""

import os
from pathlib import Path
from typing import NamedTuple

from common import UserError
from demo import run, run_audio, tiny_models

CHECKPOINTS = "checkpoints/demo-*.pt"
HELDOUT = {False: "heldout/*.jpg", True: "evaluation/*.wav"}  # pictures, sounds


class Ready(NamedTuple):
    """The paths of a finished demo."""

    checkpoint: Path
    encoder: str  # what load_encoder takes
    gpt2_type: str  # what load_checkpoint takes; the checkpoint's own config does not know it once the folder was moved
    heldout: list  # paths of the held-out pictures or sounds, in order


def ready_demo(folder=None, sounds=False):
    """Find a finished demo, or make the quick one.

    Args:
        folder: where to look; None for the folder that the environment variable names, else where `make demo` writes.
        sounds: whether to look for the demo of sounds.

    Returns:
        Ready.

    Raises:
        UserError: the folder holds something else, or making the demo fails.
    """
    script, parse = (run_audio, "parse development") if sounds else (run, "parse train")
    folder, found = demo_folder(folder, sounds), find_demo(folder, sounds)
    if found is None:
        if folder.exists() and not (folder / "world.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} holds other files than a demo of {'sounds' if sounds else 'pictures'}. Name another folder.")
        print(
            f"no finished demo in {folder}: making the quick one, which takes a minute or two on two cores. Its captions are often wrong; "
            f"run `make {'demo-audio' if sounds else 'demo'}` for a better one.",
            flush=True,
        )
        # A checkpoint of an earlier world does not fit the new encoder.
        for checkpoint in folder.glob(CHECKPOINTS):
            checkpoint.unlink()
        script.build(folder, **script.QUICK)
        lines = script.command_lines(folder)
        for stage in (parse, "train"):  # the rest of the demo captions and scores
            run.run_script(lines[stage])
        found = find_demo(folder, sounds)
        if found is None:
            raise UserError(f"{folder} holds an incomplete demo, with nothing in {HELDOUT[sounds]}. Remove it, and run this again.")
    return found


def demo_folder(folder=None, sounds=False):
    """Say in which folder a demo is looked for; arguments as for ready_demo. Returns a Path."""
    variable, usual = ("PREFIXCAP_DEMO_AUDIO", "data/demo_audio") if sounds else ("PREFIXCAP_DEMO", "data/demo")
    return Path(folder or os.environ.get(variable) or usual)


def find_demo(folder=None, sounds=False):
    """Find a finished demo; arguments as for ready_demo. Returns Ready, or None where a part is missing."""
    folder = demo_folder(folder, sounds)
    checkpoints = sorted(folder.glob(CHECKPOINTS))
    heldout = sorted(folder.glob(HELDOUT[sounds]))
    encoder, gpt2 = tiny_models.clip_path(folder), tiny_models.gpt2_path(folder)
    if not (checkpoints and heldout and encoder.is_file() and gpt2.is_dir()):
        return None
    return Ready(checkpoints[-1], str(encoder), str(gpt2), heldout)
