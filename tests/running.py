"""Runs of train.py on a small data set in the working directory."""

import shlex

import torch

import helpers
import tiny
import train

THINGS = ["dogs", "cats", "cars"] * 4
CAPTIONS = [[f"a picture of {thing} number {i}" for i in range(1 + number % 3)] for number, thing in enumerate(THINGS)]


def save_data(folder):
    """Write a published feature file of 12 images and 24 captions. Returns its path."""
    tiny.save_published_features(folder / "train.pkl", CAPTIONS, width=32)
    return folder / "train.pkl"


def run(tiny_gpt2, *more, data="train.pkl", code=0):
    words = ["--data", *shlex.split(data), "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), "--device", "cpu", "--prefix_length", "4"]
    words += ["--bs", "5", "--warmup_steps", "5", "--lr", "1e-3", "--log_every", "1", "--mixed_precision", "no", *map(str, more)]
    helpers.call(train.main, words, code)


def state_of(path):
    return torch.load(path, weights_only=True)


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
