"""Sounds become windows that cover every frame, whatever file they come in; the published picture stays as it was, bit for bit."""

import io
import json
import pickle
from pathlib import Path

import hypothesis.strategies as st
import librosa
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from PIL import Image

import tiny
from common import UserError
from features import audio
from features.audio import UnreadableSound, cut_windows, log_mel_picture, published_picture, read_sound, sound_encoder, window_starts
from features.extract import Record, extract
from features.loading import encode_views
from features.store import load_features
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = audio.SAMPLE_RATE


def chirp(seconds=1.0, rate=RATE, channels=1, seed=0):
    """A rising tone in faint noise: [N] or [N, channels] float32."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * (300 + 400 * time) * time) + np.random.default_rng(seed).normal(0, 0.003, len(time))
    wave = wave.astype(np.float32)
    return wave if channels == 1 else np.stack([wave, 0.2 * wave, 0 * wave][:channels], 1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(tiny.save_clip(tmp_path_factory.mktemp("weights") / "clip.pt", 512, "vit"))


class FakeEar:
    """An encoder of sounds, as clap: gives one: a waveform of 0.5 s at most goes in, two numbers come out."""

    name, width, device, modality, mixed_precision = "clap:fake", 2, torch.device("cpu"), "audio", "no"
    pooling, many_views, audio = "pooled", False, None
    preprocessing = {"sample_rate": 8000, "window_seconds": 0.5}

    def __init__(self):
        self.lengths, self.largest = [], 0

    def preprocess(self, samples):
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        self.lengths.append(len(samples))
        return torch.tensor([float(np.abs(samples).max()), len(samples) / 8000])

    def encode(self, batch):
        self.largest = max(self.largest, len(batch))
        return batch

    def digest(self):
        return "0123456789abcdef"


# -- reading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(44100, 1), (48000, 2), (16000, 1), (8000, 2)])
def test_every_format_rate_and_number_of_channels_gives_the_same_sound(tmp_path, suffix, rate, channels):
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, chirp(0.6, rate, channels), rate)
    read = read_sound(path)
    plain = librosa.to_mono(librosa.resample(chirp(0.6, rate, channels).T, orig_sr=rate, target_sr=RATE))
    assert read.dtype == np.float32
    assert read.ndim == 1
    assert abs(len(read) - len(plain)) <= 1
    middle = slice(len(plain) // 4, -len(plain) // 4)  # mp3 and ogg smear the ends
    assert np.corrcoef(read[: len(plain)][middle], plain[: len(read)][middle])[0, 1] > 0.98
    assert np.array_equal(read, read_sound(path.read_bytes())), "bytes of a file are read as the file is"


def test_samples_and_their_rate_are_a_sound_too(tmp_path):
    soundfile.write(tmp_path / "a.wav", chirp(0.3, 16000, 2), 16000, subtype="FLOAT")
    assert np.allclose(read_sound(tmp_path / "a.wav"), read_sound((chirp(0.3, 16000, 2).T, 16000)), atol=1e-6)


def bad_sounds(folder):
    """Files that are no sounds → {path: what the reason says}."""
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "zero.wav", np.zeros((0, 1)), 44100)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is not a sound " * 20)
    (folder / "picture.mp3").write_bytes(Path(tiny.save_picture(folder / "picture.jpg", 0)).read_bytes())
    whole = io.BytesIO()
    soundfile.write(whole, chirp(1), RATE, format="FLAC")
    (folder / "cut.flac").write_bytes(whole.getvalue()[:3000])
    soundfile.write(folder / "nan.wav", np.full(500, np.nan, np.float32), 44100, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.full(500, np.inf, np.float32), 8000, subtype="FLOAT")
    soundfile.write(folder / "hours.wav", np.zeros(4000, np.int16), 1)
    reasons = {"zero.wav": "zero length", "empty.wav": "zero bytes", "text.wav": "not a sound", "picture.mp3": "not a sound"}
    reasons |= {"cut.flac": "damaged FLAC", "nan.wav": "finite", "inf.wav": "finite", "hours.wav": "67 minutes", "none.wav": "no such file"}
    return {folder / name: reason for name, reason in reasons.items()}


def test_what_is_no_sound_is_refused_with_a_reason(tmp_path):
    for path, reason in bad_sounds(tmp_path / "bad").items():
        with pytest.raises(UnreadableSound, match=reason):
            read_sound(path)
    with pytest.raises(UnreadableSound, match="zero length"):
        read_sound((np.zeros(0), 44100))


# -- spectrograms ----------------------------------------------------------------------------------------------------------


def published_step_by_step(path):
    """The published array, one librosa call after another."""
    samples, rate = librosa.load(path, sr=44100, mono=True)
    mel = librosa.feature.melspectrogram(y=samples, sr=rate, n_fft=2560, hop_length=694, n_mels=128, fmin=20, fmax=22050)
    return librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=80).astype(np.int64).astype(np.uint8)


def check_published(path, encoder):
    expected = published_step_by_step(path)
    assert np.array_equal(published_picture(read_sound(path)), expected)
    assert (expected > 127).any(), "this clip has no negative decibels: it would not show whether they wrap"
    views = sound_encoder(encoder, "published").preprocess(path)
    assert torch.equal(views, encoder.preprocess(Image.fromarray(expected))[None])


def test_the_published_spectrogram_is_bit_for_bit_on_a_made_sound(tmp_path, encoder):
    for name, seconds, rate, channels in (("a.wav", 3.0, 44100, 1), ("b.flac", 0.1, 48000, 2), ("c.ogg", 0.7, 22050, 1)):
        soundfile.write(tmp_path / name, chirp(seconds, rate, channels), rate)
        check_published(tmp_path / name, encoder)


def test_the_published_spectrogram_is_bit_for_bit_on_real_clips(shared_data, encoder):
    clips = sorted((shared_data / "clotho").glob("*.wav"))
    assert len(clips) == 2
    for clip in clips:
        check_published(clip, encoder)


def test_the_default_picture_goes_from_80_decibels_below_the_loudest_point_to_it_without_wrap():
    samples = chirp(2.5)
    power = librosa.feature.melspectrogram(y=samples, sr=RATE, n_fft=2560, hop_length=694, n_mels=128, fmin=20, fmax=22050)
    decibels = librosa.power_to_db(power)
    expected = (decibels - (decibels.max() - 80)) / 80 * 255
    picture = log_mel_picture(samples)
    assert picture.dtype == np.uint8
    assert picture.shape == expected.shape
    assert np.abs(picture - expected).max() <= 0.51
    assert picture.max() == 255
    assert not log_mel_picture(np.zeros(RATE, np.float32)).any(), "digital silence is all floor"


def test_a_clip_transformed_in_blocks_has_the_picture_it_has_in_one(monkeypatch):
    samples = chirp(3.3)
    whole = log_mel_picture(samples).astype(int)
    monkeypatch.setattr(audio, "BLOCK_COLUMNS", 50)
    blocks = log_mel_picture(samples).astype(int)
    assert blocks.shape == whole.shape
    assert np.abs(blocks - whole).max() <= 1


@given(st.integers(1, 50_000), st.integers(1, 400), st.integers(1, 400))
def test_windows_cover_every_place_half_overlapping_and_end_with_the_clip(length, size, hop):
    hop = min(hop, size)
    starts = window_starts(length, size, hop)
    assert starts[0] == 0
    assert all(0 < after - before <= hop for before, after in zip(starts, starts[1:]))
    assert starts[-1] + size == max(length, size)
    assert starts[:-1] == [number * hop for number in range(len(starts) - 1)]


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_every_frame_is_in_a_window_and_a_short_clip_is_padded_with_the_floor(columns):
    picture = np.tile(np.arange(1, columns + 1) % 255 + 1, (128, 1)).astype(np.uint8)
    windows = cut_windows(picture)
    assert windows.shape[1:] == (128, 128)
    starts = window_starts(columns, 128, 64)
    seen = np.zeros(columns, bool)
    for start, window in zip(starts, windows, strict=True):
        part = picture[:, start : start + 128]
        assert np.array_equal(window[:, : part.shape[1]], part)
        assert not window[:, part.shape[1] :].any()
        seen[start : start + 128] = True
    assert seen.all()


@pytest.mark.parametrize(("seconds", "windows"), [(1e-4, 1), (0.1, 1), (2.0, 1), (2.2, 2), (30.0, 29)])
def test_clips_from_a_few_samples_to_long_ones_have_their_windows(seconds, windows):
    samples = chirp(seconds)
    picture = log_mel_picture(samples)
    assert picture.shape == (128, 1 + len(samples) // 694)
    assert len(cut_windows(picture)) == windows


def test_ten_minutes_are_windows_of_small_bytes_not_large_floats():
    columns = 1 + 600 * RATE // 694
    windows = cut_windows(np.zeros((128, columns), np.uint8))
    assert len(windows) == 595
    assert windows.nbytes < 10e6


def test_the_picture_for_people_has_low_tones_below(tmp_path):
    soundfile.write(tmp_path / "low.wav", np.sin(np.arange(RATE) * 2 * np.pi * 100 / RATE), RATE)
    picture = np.asarray(audio.spectrogram_picture(tmp_path / "low.wav"))
    assert picture.shape[0] == 256
    assert picture[200:].mean() > 4 * picture[:100].mean()


# -- encoders --------------------------------------------------------------------------------------------------------------


def test_a_clip_is_the_mean_over_its_windows_each_as_the_encoder_sees_a_picture(tmp_path, encoder):
    soundfile.write(tmp_path / "a.wav", chirp(5), RATE)
    hearing = sound_encoder(encoder)
    pictures = [Image.fromarray(window) for window in cut_windows(log_mel_picture(read_sound(tmp_path / "a.wav")))]
    assert len(pictures) == 4
    expected = encoder.encode(torch.stack([encoder.preprocess(picture) for picture in pictures])).mean(0)
    (row,) = encode_views(hearing, [hearing.preprocess(tmp_path / "a.wav")])
    assert row.dtype == torch.float32
    assert torch.allclose(row, expected, atol=1e-5)


def test_a_sound_encoder_hears_half_overlapping_windows_of_its_own_length():
    ear = FakeEar()
    hearing = sound_encoder(ear)
    views = hearing.preprocess((chirp(1.3, 8000), 8000))
    assert ear.lengths == [4000] * 5, "begins at 0, 0.25, 0.5, 0.75 s and 0.8 s"
    assert views.shape == (5, 2), "begins at 0, 0.25, 0.5, 0.75 s and 0.8 s"
    ear.lengths = []
    assert len(hearing.preprocess((chirp(0.1, 16000), 16000))) == 1
    assert ear.lengths == [800], "a short clip goes in as it is: padding is the encoder's"
    assert hearing.audio == {"sample_rate": 8000, "spectrogram": "waveform", "windows": {"samples": 4000, "hop": 2000}}


def test_views_pass_the_encoder_in_chunks_and_means_stay_with_their_clips():
    ear = FakeEar()
    clips = [torch.full((count, 2), float(count)) for count in (1, 50, 7, 16)]
    means = encode_views(ear, clips)
    assert torch.equal(means, torch.tensor([[1.0, 1], [50, 50], [7, 7], [16, 16]]))
    assert ear.largest == 16


def test_a_spectrogram_the_encoder_cannot_take_is_refused(encoder):
    with pytest.raises(UserError, match="takes pictures: --spectrogram waveform"):
        sound_encoder(encoder, "waveform")
    with pytest.raises(UserError, match="takes sounds: --spectrogram mel"):
        sound_encoder(FakeEar(), "mel")
    with pytest.raises(UserError, match="known are mel, published, waveform"):
        sound_encoder(encoder, "linear")


def test_the_digest_tells_spectrograms_apart_and_what_workers_get_holds_no_weights(encoder):
    digests = {encoder.digest(), sound_encoder(encoder).digest(), sound_encoder(encoder, "published").digest()}
    assert len(digests) == 3
    assert sound_encoder(encoder).digest() in digests
    assert len(pickle.dumps(sound_encoder(encoder).preprocess)) < 10_000
    json.dumps(sound_encoder(encoder).audio)


# -- extraction ------------------------------------------------------------------------------------------------------------


class Stopping:
    """An encoder of sounds that is interrupted after some chunks, and counts the views it encodes."""

    def __init__(self, encoder, chunks):
        self.inner, self.left, self.encoded = encoder, chunks, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, batch):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.encoded += len(batch)
        return self.inner.encode(batch)


def test_extraction_skips_bad_sounds_and_resumed_or_with_workers_gives_the_same_bytes(workdir, encoder, capsys):
    bad = list(bad_sounds(workdir / "bad"))[:3]
    for number in range(5):
        soundfile.write(workdir / f"{number}.wav", chirp(0.1 + 1.5 * number, seed=number), RATE)
    paths = [workdir / "0.wav", bad[0], *(workdir / f"{number}.wav" for number in range(1, 5)), *bad[1:]]
    records = [Record(path.name, str(path), [{"caption": f"Sound {path.stem}."}]) for path in paths]
    options = dict(source="here", batch_size=2)
    hearing = sound_encoder(encoder)
    extract(records, hearing, "whole.pkl", num_workers=0, **options)
    features = load_features("whole.pkl")
    assert [caption["image_id"] for caption in features.captions] == [f"{number}.wav" for number in range(5)]
    assert features.meta["audio"]["spectrogram"] == "mel"
    assert features.meta["skipped"] == 3
    assert "5 sounds, 5 captions" in capsys.readouterr().out
    listed = Path("whole.pkl.skipped.csv").read_text()
    assert all(str(path) in listed for path in bad)
    assert "zero length" in listed
    assert "zero bytes" in listed

    extract(records, hearing, "workers.pkl", num_workers=2, **options)
    assert Path("workers.pkl").read_bytes() == Path("whole.pkl").read_bytes()
    with pytest.raises(SystemExit):
        extract(records, Stopping(hearing, 2), "resumed.pkl", num_workers=0, **options)
    counting = Stopping(hearing, 100)
    extract(records, counting, "resumed.pkl", num_workers=0, **options)
    assert Path("resumed.pkl").read_bytes() == Path("whole.pkl").read_bytes()
    assert 0 < counting.encoded < 13, "what was done was kept"
