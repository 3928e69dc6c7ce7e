"""The resume point: one file that holds all a stopped run needs to go on as if it had not been stopped."""

from pathlib import Path

from common import UserError


def state_path(out_dir, run_name):
    """Where a run keeps its resume point."""
    return Path(out_dir) / f"{run_name}_state.pt"


def random_states():
    """The state of every random generator that dropout draws from → dict of tensors."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states):
    """Set the generators back to what random_states gave."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_state(path, weights, optimizer, step, best, finished, identity):
    """Write the resume point: trained weights, optimiser, position, best validation loss, generators, and what run this is.

    weights: dict of trained tensors; step: optimiser steps done; best: BestSoFar.as_dict(); finished: whether the run has ended by itself;
    identity: a dict of plain values that a resumed run must share (data digest, options that shape the result).
    """
    from models.tensors import save_tensors

    save_tensors(
        {
            "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
            "optimizer": optimizer.state_dict(),
            "step": step,
            "best": best,
            "finished": finished,
            "random": random_states(),
            "identity": identity,
        },
        path,
    )


FIELDS = {"weights", "optimizer", "step", "best", "finished", "random", "identity"}


def load_state(path, identity):
    """Read a resume point → its dict. Raises UserError when it belongs to another run, naming what differs."""
    from models.tensors import read_tensors

    state = read_tensors(path)
    if not isinstance(state, dict) or set(state) != FIELDS:
        raise UserError(f"{path} is not a resume point of train.py. Remove it, or train without --resume.")
    differing = [name for name in identity if state["identity"].get(name) != identity[name]]
    if differing:
        was = ", ".join(f"{name} {state['identity'].get(name)!r} (now {identity[name]!r})" for name in differing)
        raise UserError(f"{path} is of another run: {was}. Give the same options, or another --out_dir or --prefix.")
    return state
