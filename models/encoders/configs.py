"""Config files of encoders' folders, which may come from strangers: read and checked before a library acts on them."""

import json
import re
import stat
from pathlib import Path

from common import UserError

MOST_BYTES = 10_000_000
MOST_NESTED = 40
# Largest number by what its key says; sizes of weights are checked against the weight files (models.weights.refuse_oversized).
LIMITS = (
    (re.compile(r"layer|depth|blocks|stages|experts|types"), 1024),
    (re.compile(r"fft|max_num_patches|max_length_s|chunk_length"), 2**15),
    (re.compile(r"size|height|width|edge|patch|window|mel|hop"), 2**20),
    (re.compile(r""), 2**40),
)
FEATURE_SIZE = 2**10  # mel bands of a sound
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def read_config(path):
    """Read a config file of an encoder as a dict. Raises UserError as read_object and check_numbers do."""
    config = read_object(path, "the JSON that save_pretrained writes")
    check_numbers(config, path)
    return config


def read_object(path, expected):
    """Read a small file of JSON as a dict.

    Raises:
        UserError: it is no regular file, no JSON object in UTF-8, or nested deeply; the message says what was `expected`.
    """
    path = Path(path)
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
            raise ValueError("no regular file of a few kilobytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Expected {expected}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}; expected {expected}.")
    return config


def check_folder(source):
    """Check the config files of a folder as read_config does; a name of the hub is left to the library."""
    for path in sorted(Path(source).glob("*config.json")) if Path(source).is_dir() else ():
        config = {} if path.name.startswith("tokenizer") else read_config(path)
        bands = config.get("feature_size", 1)
        if not isinstance(bands, int) or not 0 < bands <= FEATURE_SIZE:
            raise UserError(f"{path} says feature_size {bands}; expected an integer from 1 to {FEATURE_SIZE}.")


def weights_size(source):
    """Add up the sizes of the weight files in a folder, in bytes; None for a name of the hub."""
    if not Path(source).is_dir():
        return None
    return sum(path.stat().st_size for path in Path(source).iterdir() if path.suffix in WEIGHT_SUFFIXES)


def check_numbers(config, path):
    """Raise UserError where a config is nested deeply, or holds a number beyond any model's."""
    waiting = [(config, "", 0)]
    while waiting:
        value, key, nested = waiting.pop()
        if nested > MOST_NESTED:
            raise UserError(f"{path} is nested more than {MOST_NESTED} deep; expected the JSON that save_pretrained writes.")
        if isinstance(value, dict):
            waiting += [(inner, name, nested + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, key, nested + 1) for inner in value]
        elif isinstance(value, (int, float)):
            most = next(most for pattern, most in LIMITS if pattern.search(key))
            if not abs(value) <= most:
                raise UserError(f"{path} says {key} {str(value)[:30]}; expected at most {most:,}. Take the config of the model itself.")
