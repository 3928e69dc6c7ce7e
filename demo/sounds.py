"""The demo world's sounds: two events one after the other, with five differently worded true captions each.

An event is a tone, a rising or falling sweep, clicks or noise; low, medium or high; single or repeated. Its captions are made from the
WORDINGS below, and the same wordings, read backwards, decide whether any caption is true of a sound. A world lies in a folder as Clotho
does: development/ and evaluation/ with the sounds, clotho_captions_development.csv and clotho_captions_evaluation.csv beside them.
"""

import csv
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from common import replace_file
from demo.scenes import wording_pattern

SAMPLE_RATE = 16_000  # Hz; parse_clotho.py resamples
PITCHES = {"low": 450, "medium": 1500, "high": 4500}  # Hz
KINDS = ("tone", "rising sweep", "falling sweep", "click", "noise")
TIMES = {"single": 1, "repeated": 3}
SLOT = 0.95  # seconds an event may last, so that two fit into one window of the spectrogram, 2.0 s
PIECE = {"single": (0.5, 0.75), "repeated": (0.15, 0.2)}  # seconds, shortest and longest
GAP = 0.09  # seconds between the pieces of a repeated event
CLICK = 0.006  # seconds in which a click dies away to 1/e
SWEEP = 1.5  # a sweep begins and ends this factor from its pitch
HISS = 0.003  # loudness of the background, of 1
SPLITS = {"development": "train", "evaluation": "heldout"}

# Each wording names the events in order and states kind, pitch and number of both.
WORDINGS = (
    "A {times1} {pitch1} {kind1} is followed by a {times2} {pitch2} {kind2}.",
    "First there is a {times1} {pitch1} {kind1}, then a {times2} {pitch2} {kind2}.",
    "A {times1} {pitch1} {kind1} and after it a {times2} {pitch2} {kind2}.",
    "Two sounds in a row: a {times1} {pitch1} {kind1}, then a {times2} {pitch2} {kind2}.",
    "The first sound, a {kind1}, is {pitch1} and {times1}, the second, a {kind2}, is {pitch2} and {times2}.",
)


class Event(NamedTuple):
    """One event of a sound: a key of TIMES, a key of PITCHES, one of KINDS."""

    times: str
    pitch: str
    kind: str


class Sound(NamedTuple):
    """Two events in order."""

    first: Event
    second: Event


def describe(sound):
    """Give the sound's five true captions, one for each wording."""
    words = {f"{name}{number}": value for number, event in enumerate(sound, 1) for name, value in event._asdict().items()}
    return [wording.format(**words) for wording in WORDINGS]


_PATTERNS = [wording_pattern(wording, {"times": TIMES, "pitch": PITCHES, "kind": KINDS}) for wording in WORDINGS]


def parse_caption(caption):
    """Read a caption back into the Sound it states; None when it is not in the demo's language."""
    for pattern in _PATTERNS:
        match = pattern.fullmatch(" ".join(caption.split()))
        if match:
            words = {name: word.lower() for name, word in match.groupdict().items()}
            return Sound(*(Event(words[f"times{number}"], words[f"pitch{number}"], words[f"kind{number}"]) for number in "12"))
    return None


def caption_is_true(caption, sound):
    """Whether the caption parses and everything it states (order, number, pitch, kind of both events) holds."""
    return parse_caption(caption) == sound


def make_sounds(pairs, count, seed=0):
    """Make `count` sounds that cycle through `pairs` of (pitch, kind), as demo.scenes.split_pairs gives them."""
    rng = random.Random(f"sounds {seed}")
    return [Sound(*(Event(rng.choice(tuple(TIMES)), *event) for event in pairs[number % len(pairs)])) for number in range(count)]


def _piece(event, seconds, rng):
    """The waveform of one piece of an event, at most 1 in loudness: float64 [N]."""
    import numpy as np

    pitch = PITCHES[event.pitch] * 1.08 ** rng.uniform(-1, 1)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    edges = np.clip(np.minimum(time, seconds - time) / 0.01, 0, 1)  # fade in and out over 10 ms, so that only clicks click
    if event.kind == "click":
        return np.exp(-time / CLICK) * np.sin(2 * math.pi * pitch * time)
    if event.kind == "noise":
        # A band of noise around the pitch: the spectrum of white noise, weighed by a bell over the logarithm of frequency.
        spectrum = np.fft.rfft(rng.normal(size=len(time)))
        frequency = np.maximum(np.fft.rfftfreq(len(time), 1 / SAMPLE_RATE), 1)
        wave = np.fft.irfft(spectrum * np.exp(-((np.log(frequency / pitch) / 0.3) ** 2)), len(time))
        return edges * wave / np.abs(wave).max()
    bend = {"tone": 0, "rising sweep": 1, "falling sweep": -1}[event.kind] * math.log(SWEEP)
    frequency = pitch * np.exp(bend * (2 * time / seconds - 1))
    return edges * np.sin(2 * math.pi * np.cumsum(frequency) / SAMPLE_RATE)


def play(sound, seed):
    """A sound's waveform: float32 [N] at SAMPLE_RATE, 1.9 s or less; loudness, pitch and lengths vary with the seed."""
    import numpy as np

    rng = np.random.default_rng(seed)
    parts = []
    for event in sound:
        seconds = rng.uniform(*PIECE[event.times])
        pieces = []
        for _ in range(TIMES[event.times]):
            pieces += [_piece(event, seconds, rng), np.zeros(round(GAP * SAMPLE_RATE))]
        wave = np.concatenate(pieces) * rng.uniform(0.3, 0.9)
        parts.append(wave[: round(SLOT * SAMPLE_RATE)])
    wave = np.concatenate(parts)
    return (wave + HISS * rng.normal(size=len(wave))).clip(-1, 1).astype(np.float32)


def captions_path(folder, split):
    """The CSV of a split, "development" or "evaluation", named as Clotho's."""
    return Path(folder) / f"clotho_captions_{split}.csv"


def write_split(folder, split, sounds, seed=0):
    """Write a split: its sounds, their ground truth truth_{split}.json, then its CSV. A split that has its CSV is complete."""
    import soundfile

    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    names = [f"{SPLITS[split]} {number:05d}.wav" for number in range(len(sounds))]
    for number, (name, sound) in enumerate(zip(names, sounds)):
        # Numbers and letters of the split make the seed, so that no two splits hold one recording twice.
        soundfile.write(folder / split / name, play(sound, [seed, number, *split.encode()]), SAMPLE_RATE)
    with replace_file(folder / f"truth_{split}.json") as temporary:
        temporary.write_text(json.dumps(dict(zip(names, sounds))))
    with replace_file(captions_path(folder, split)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *(f"caption_{number}" for number in range(1, len(WORDINGS) + 1))])
        writer.writerows([name, *describe(sound)] for name, sound in zip(names, sounds))


def read_sounds(folder, split):
    """Read a split's ground truth: dict from file name to Sound."""
    truth = json.loads((Path(folder) / f"truth_{split}.json").read_text())
    return {name: Sound(*(Event(*event) for event in events)) for name, events in truth.items()}
