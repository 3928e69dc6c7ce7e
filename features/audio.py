"""From sounds to what an encoder takes: log-mel windows as grey pictures, the published picture, or stretches of the waveform.

    encoder = sound_encoder(load_encoder("ViT-B/32"))                       log-mel windows, the default of a picture encoder
    encoder = sound_encoder(load_encoder("ViT-B/32"), "published")          the published picture, bit for bit
    encoder = sound_encoder(load_encoder("clap:data/weights/clap"))         windows of the waveform, the default of a sound encoder

The result goes to features.extract.extract in place of an encoder: a clip's embedding is the mean over its windows. The encoder is
passed in; nothing here knows its kind except by `modality`. Letters: N samples, T columns (frames) of a spectrogram, W windows of a
clip, B windows encoded together, D width of an embedding.
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np

from common import UserError
from features.image_ids import SOUND_SUFFIXES

SAMPLE_RATE = 44_100  # Hz; this and the next five as the published Clotho recipe has them
MEL = {"n_fft": 2560, "hop_length": 694, "n_mels": 128, "fmin": 20, "fmax": 22_050}  # samples, samples, bands, Hz, Hz
DECIBELS = 80  # range below the loudest point that a picture shows; power_to_db's own default
FAINTEST = -100  # dB, what power_to_db makes of digital silence
WINDOW_COLUMNS, WINDOW_HOP = 128, 64  # 2.0 s per window, half overlapping
BLOCK_COLUMNS = 2048  # of a long clip, transformed together: 33 s
LONGEST = 3600  # seconds; a longer recording is not a clip
SPECTROGRAMS = ("mel", "published", "waveform")


class UnreadableSound(ValueError):
    """A sound that cannot be read. The message is the reason, without the path."""


def read_sound(source, sample_rate=SAMPLE_RATE):
    """Read a sound.

    Channels are averaged, rates converted by soxr (librosa's defaults, as published). What libsndfile cannot read (m4a) goes to the
    system's own decoders, where it has any.

    Args:
        source: path, the bytes of a file, or a pair of samples ([N] or [channels, N] floats) and their rate.
        sample_rate: of the result, in Hz.

    Returns:
        Mono float32 [N].

    Raises:
        UnreadableSound: the file is missing, empty, damaged, not a sound, longer than LONGEST, or has no samples or samples that are not
            finite.
    """
    import librosa

    try:
        if isinstance(source, tuple):
            samples, rate = source
            _check_length(np.shape(samples)[-1], rate)
            samples = librosa.resample(librosa.to_mono(np.asarray(samples, np.float32)), orig_sr=rate, target_sr=sample_rate)
        else:
            samples = _decode(source, sample_rate)
    except librosa.ParameterError as error:  # its error for infinities and NaN
        raise UnreadableSound(f"damaged samples: {error}") from error
    if not len(samples):
        raise UnreadableSound("zero length: no samples in it")
    return samples


def _check_length(frames, rate):
    if frames == 0:
        raise UnreadableSound("zero length: no samples in it")
    if frames > LONGEST * rate:
        raise UnreadableSound(f"{frames / rate / 60:.0f} minutes long; expected at most {LONGEST // 60}. Cut it into clips")


def _decode(source, sample_rate):
    """Decode a path or the bytes of a file. Returns mono float32 [N]."""
    import audioread
    import librosa
    import soundfile

    in_memory = isinstance(source, (bytes, bytearray, memoryview))
    if not in_memory and not os.path.isfile(source):
        raise UnreadableSound("no such file")
    if not (len(source) if in_memory else os.path.getsize(source)):
        raise UnreadableSound("empty: zero bytes")

    def opened():
        return io.BytesIO(source) if in_memory else str(source)

    reason = "not a sound in a known format"
    try:
        with contextlib.suppress(soundfile.LibsndfileError):  # the other decoders may know it
            about = soundfile.info(opened())
            reason = f"a damaged {about.format} file"
            _check_length(about.frames, about.samplerate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other decoders follow where libsndfile fails
            return librosa.load(opened(), sr=sample_rate)[0]
    except (soundfile.SoundFileError, audioread.DecodeError, EOFError, OSError, RuntimeError, MemoryError) as error:
        detail = " ".join(str(error).split())
        raise UnreadableSound(reason + (f" ({detail})" if detail and isinstance(error, (OSError, MemoryError)) else "")) from error


# -- Spectrograms ----------------------------------------------------------------------------------------------------------


def published_picture(samples):
    """Make the published picture: decibels cast to bytes, where negative ones wrap.

    The cast goes by way of int64, so that every machine gives the bytes that a cast of float to uint8 gave the authors.

    Args:
        samples: mono float32 [N] at SAMPLE_RATE.

    Returns:
        uint8 [128, T].
    """
    import librosa

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_fft=.* is too large")  # a clip of a few milliseconds
        power = librosa.feature.melspectrogram(y=samples, sr=SAMPLE_RATE, **MEL)
    return librosa.power_to_db(power).astype(np.int64).astype(np.uint8)


def log_mel_picture(samples):
    """Make a log-mel picture: 255 is the loudest point, 0 is DECIBELS below it. Digital silence is all 0.

    A long clip is transformed in blocks, so that ten minutes take some 300 MB and not three times that.

    Args:
        samples: mono float32 [N] at SAMPLE_RATE.

    Returns:
        uint8 [128, T] with T = 1 + N // 694; lowest band first, as published.
    """
    import librosa

    hop, half = MEL["hop_length"], MEL["n_fft"] // 2
    columns = 1 + len(samples) // hop
    padded = np.pad(samples, half)  # zeros on both sides, so that column t is about sample t * hop
    power = np.empty((MEL["n_mels"], columns), np.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        block = padded[start * hop : (end - 1) * hop + 2 * half]
        power[:, start:end] = librosa.feature.melspectrogram(y=block, sr=SAMPLE_RATE, center=False, **MEL)
    decibels = librosa.power_to_db(power, top_db=None)
    loudest = decibels.max()
    if loudest <= FAINTEST:
        return np.zeros(decibels.shape, np.uint8)
    return np.rint((decibels - (loudest - DECIBELS)).clip(0) * (255 / DECIBELS)).astype(np.uint8)


def window_starts(length, size, hop):
    """Return where windows of `size` start that cover `length` >= 1 places: every `hop`, the last one right-aligned."""
    if length <= size:
        return [0]
    return [*range(0, length - size, hop), length - size]


def cut_windows(picture):
    """Cut uint8 [128, T] into windows that cover it; a short clip is padded with 0. Returns uint8 [W, 128, WINDOW_COLUMNS]."""
    columns = picture.shape[1]
    picture = np.pad(picture, ((0, 0), (0, max(0, WINDOW_COLUMNS - columns))))
    starts = window_starts(columns, WINDOW_COLUMNS, WINDOW_HOP)
    return np.stack([picture[:, start : start + WINDOW_COLUMNS] for start in starts])


def spectrogram_picture(source, height=256, widest=4.0):
    """Draw a sound's log-mel spectrogram for people: a PIL picture, low tones below, `height` pixels, at most `widest` times as wide."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(log_mel_picture(read_sound(source))[::-1]))
    width = min(max(picture.width * height // picture.height, height // 4), int(widest * height))
    return picture.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


# -- Encoders --------------------------------------------------------------------------------------------------------------


class _Views:
    """Turns a sound into its views. Holds no weights: loader workers get a copy of it."""

    short_side = None  # no JPEGs here that could be read scaled down

    def __init__(self, spectrogram, preprocess, preprocessing):
        self.spectrogram = spectrogram
        self.preprocess = preprocess  # of the encoder within
        self.rate = preprocessing["sample_rate"] if spectrogram == "waveform" else SAMPLE_RATE
        if spectrogram == "waveform":
            self.size = round(preprocessing["window_seconds"] * self.rate)

    def __call__(self, source):
        """Return a [W, ...] tensor; uint8 for log-mel windows, which the encoder turns into its own pictures a few at a time."""
        import torch
        from PIL import Image

        samples = read_sound(source, self.rate)
        if self.spectrogram == "mel":
            return torch.from_numpy(cut_windows(log_mel_picture(samples)))
        if self.spectrogram == "published":
            return self.preprocess(Image.fromarray(published_picture(samples)))[None]
        starts = window_starts(len(samples), self.size, self.size // 2)
        return torch.stack([self.preprocess(samples[start : start + self.size]) for start in starts])


class SoundEncoder:
    """An encoder for sounds, made of one for pictures or for waveforms; features.extract takes it as any other.

    Attributes:
        audio: what sound_encoder needs to make the same again, as plain values for the feature file.
    """

    many_views = True  # `preprocess` gives several views of a record; its embedding is the mean over them, unless they are kept apart
    modality = "audio"

    def __init__(self, encoder, spectrogram, pooling):
        self.encoder, self.pooling = encoder, pooling
        self.name, self.width, self.device = encoder.name, encoder.width, encoder.device
        self.preprocessing = encoder.preprocessing
        self.mixed_precision = encoder.mixed_precision
        self.preprocess = _Views(spectrogram, encoder.preprocess, encoder.preprocessing)
        self.audio = {"sample_rate": self.preprocess.rate, "spectrogram": spectrogram}
        if spectrogram == "waveform":
            size = self.preprocess.size
            self.audio["windows"] = {"samples": size, "hop": size // 2}
        else:
            windows = {"columns": WINDOW_COLUMNS, "hop": WINDOW_HOP} if spectrogram == "mel" else None  # published: one, cropped
            self.audio |= {**MEL, "decibels": DECIBELS, "windows": windows}

    @property
    def module(self):
        """The torch.nn.Module of the encoder within."""
        return self.encoder.module

    def encode(self, views):
        """Encode views [B, ...] of `preprocess`. Returns [B, D] float32 on the encoder's device."""
        import torch
        from PIL import Image

        if self.audio["spectrogram"] == "mel":
            views = torch.stack([self.encoder.preprocess(Image.fromarray(view)) for view in views.cpu().numpy()])
        return self.encoder.encode(views)

    def digest(self):
        """Return a short name for the weights and what is done to a sound before them, 16 hexadecimal digits."""
        content = self.encoder.digest() + json.dumps(self.audio, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def sound_encoder(encoder, spectrogram=None, pooling="pooled"):
    """Make an encoder for sounds of another encoder.

    Args:
        encoder: what load_encoder returns.
        spectrogram: "mel" for windows of a log-mel spectrogram as grey pictures; "published" for the published picture; "waveform" for
            windows of the waveform, half overlapping and the last one right-aligned, of the length the encoder takes (it pads a shorter
            clip itself). None: waveform for an encoder of sounds, mel for one of pictures.
        pooling: "pooled" for the mean over a clip's windows, "none" to keep them apart (features.loading.encode_views).

    Returns:
        SoundEncoder.

    Raises:
        UserError: the encoder does not take that.
    """
    hears = encoder.modality == "audio"
    spectrogram = spectrogram or ("waveform" if hears else "mel")
    if spectrogram not in SPECTROGRAMS:
        raise UserError(f"no spectrogram {spectrogram}; known are {', '.join(SPECTROGRAMS)}.")
    if hears != (spectrogram == "waveform"):
        takes, fits = ("sounds", "waveform") if hears else ("pictures", "mel or published")
        raise UserError(f"{encoder.name} takes {takes}: --spectrogram {spectrogram} is not for it. Use {fits}, or another encoder.")
    return SoundEncoder(encoder, spectrogram, pooling)


def is_sound(path):
    """Whether a file is named like a sound."""
    return Path(path).suffix.lower() in SOUND_SUFFIXES
