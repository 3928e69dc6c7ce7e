"""Runs of train.py that are interrupted at a chosen moment."""

import contextlib

import pytest


@contextlib.contextmanager
def dies_at_save(number):
    """Interrupt training, as a second Ctrl-C does, right after its resume point was written for the `number`-th time.

    Yields:
        List that receives the step of every resume point.
    """
    from training.state import Checkpoints

    steps, save = [], Checkpoints.save_resume_point

    def save_then_die(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        steps.append(step)
        if len(steps) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save_resume_point", save_then_die)
        yield steps
