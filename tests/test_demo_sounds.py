"""The demo's sounds: their captions are true, the parser is strict, what is held out is new, and the scripts take what is written."""

import itertools
import json

import numpy as np
import pytest

import parse_clotho
import predict
import train
from demo import run_audio, scenes
from demo import sounds as world
from demo.sounds import KINDS, PITCHES, TIMES, Event, Sound, caption_is_true, describe, parse_caption
from features.annotation_tables import read_clotho
from features.audio import cut_windows, log_mel_picture, read_sound

pytestmark = pytest.mark.usefixtures("one_thread")
SOUND = Sound(Event("single", "low", "tone"), Event("repeated", "high", "click"))
FEW = {"sounds": 24, "heldout": 4, "clip_steps": 2, "gpt2_steps": 2, "kinds": ("tone", "click"), "in_process": True}


@pytest.fixture(scope="module")
def played():
    """300 training sounds."""
    return world.make_sounds(scenes.split_pairs(0, tuple(PITCHES), KINDS)[0], 300, seed=1)


def changed_sounds(sound):
    """Every sound that differs from `sound` in one attribute of one event, or in the order of the two."""
    kinds = {"times": TIMES, "pitch": PITCHES, "kind": KINDS}
    for place, kind in itertools.product(("first", "second"), kinds):
        event = getattr(sound, place)
        for value in kinds[kind]:
            if value != getattr(event, kind):
                yield sound._replace(**{place: event._replace(**{kind: value})})
    if sound.first != sound.second:
        yield Sound(sound.second, sound.first)


def test_every_caption_is_true_no_two_are_worded_alike_and_any_one_change_makes_it_false(played):
    for sound in played:
        captions = describe(sound)
        assert len(set(captions)) == 5
        assert all(caption_is_true(caption, sound) for caption in captions)
    for sound in played[:40]:
        for other in changed_sounds(sound):
            assert not any(caption_is_true(caption, sound) for caption in describe(other)), (sound, other)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "A single low tone.",
        "A low tone is followed by a repeated high click.",
        "A single low tone is followed by a repeated click.",
        "A single low tone is followed by a repeated high click and a single low noise.",
        "A single low tone is followed by a repeated high click. A single low tone is followed by a repeated high click.",
        "A single low low tone is followed by a repeated high click.",
        "A single low tone follows a repeated high click.",
        "A single low bell is followed by a repeated high click.",
        "It is not so that a single low tone is followed by a repeated high click.",
    ],
)
def test_a_caption_that_leaves_something_out_or_does_not_parse_is_false(caption):
    assert parse_caption(caption) is None
    assert not caption_is_true(caption, SOUND)


def test_letter_case_spaces_and_the_final_full_stop_do_not_matter():
    assert caption_is_true(" a single LOW tone  is followed by a repeated high click\n", SOUND)


def test_heldout_pairs_are_never_heard_together_in_training_and_every_event_is():
    training, heldout = scenes.split_pairs(0, tuple(PITCHES), KINDS)
    together = {frozenset(pair) for pair in training}
    assert heldout
    assert not any(frozenset(pair) in together for pair in heldout)
    sounds = world.make_sounds(training, len(training))
    assert {event[1:] for sound in sounds for event in sound} == set(itertools.product(PITCHES, KINDS))


def test_a_sound_has_its_events_pitches_and_fits_one_window():
    def loudest_hertz(wave):
        return np.abs(np.fft.rfft(wave)).argmax() * world.SAMPLE_RATE / len(wave)

    for number, kind in enumerate(KINDS):
        low_high = ("low", "high") if number % 2 else ("high", "medium")
        sound = Sound(*(Event("single", pitch, kind) for pitch in low_high))
        wave = world.play(sound, number)
        assert wave.dtype == np.float32
        assert np.abs(wave).max() <= 1
        assert len(cut_windows(log_mel_picture(read_sound((wave, world.SAMPLE_RATE))))) == 1
        # The second event begins where the first has ended and its gap is over: 0.59 s at the earliest, 0.84 s at the latest.
        first, second = (loudest_hertz(part) for part in (wave[: round(0.5 * world.SAMPLE_RATE)], wave[round(0.84 * world.SAMPLE_RATE) :]))
        if kind != "click":  # whose gap may hold it all
            reach = 2.0 if kind != "tone" else 1.1
            for found, pitch in ((first, low_high[0]), (second, low_high[1])):
                assert 1 / reach <= found / PITCHES[pitch] <= reach, (kind, low_high, found)


def test_a_repeated_event_is_heard_three_times():
    wave = np.abs(world.play(Sound(Event("repeated", "medium", "tone"), Event("single", "low", "click")), 3))
    loud = np.convolve(wave, np.ones(400) / 400, "same") > 0.1
    starts = np.flatnonzero(loud[1:] & ~loud[:-1])
    assert len(starts[starts < 0.9 * world.SAMPLE_RATE]) >= 3


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory, one_thread):
    """A folder with a world of 24 sounds and models trained for two steps."""
    folder = tmp_path_factory.mktemp("demo_audio")
    run_audio.build(folder, **FEW)
    return folder


def test_the_printed_commands_run_from_csv_to_score(tiny_world, capsys):
    truth = world.read_sounds(tiny_world, "evaluation")
    assert [sound.image_id for sound in read_clotho(world.captions_path(tiny_world, "evaluation")).images] == list(truth)
    lines = run_audio.command_lines(tiny_world, "--prefix_length 2 --bs 20 --epochs 1 --lr 1e-3 --warmup_steps 1")
    scripts = {"parse_clotho.py": parse_clotho, "train.py": train, "predict.py": predict}
    for stage, words in lines.items():
        more = ["--entry_length", "5"] if words[0] == "predict.py" else []
        assert scripts[words[0]].main([*words[1:], *more, "--device", "cpu"]) == 0, stage
    assert (tiny_world / "captions.png").stat().st_size > 10_000
    figures = run_audio.score(tiny_world)
    assert figures["heldout_sounds"] == 4
    assert 0 <= figures["share_true"] <= 1
    rows = [{"image_id": name, "caption": describe(sound)[0]} for name, sound in truth.items()]
    rows[0]["caption"] = "Rain."
    (tiny_world / "captions.json").write_text(json.dumps(rows))
    assert run_audio.score(tiny_world)["share_true"] == 0.75


def test_what_is_there_is_used_again_and_other_settings_make_it_anew(tiny_world, capsys):
    model = tiny_world / "weights" / "demo_clip.pt"
    before = model.stat().st_mtime_ns
    capsys.readouterr()
    run_audio.build(tiny_world, **FEW)
    assert model.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""
    run_audio.build(tiny_world, **{**FEW, "sounds": 25})
    assert model.stat().st_mtime_ns > before
    assert len(list((tiny_world / "development").iterdir())) == 25
