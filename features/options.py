"""Options that all parse scripts have, and the types of numbers and shares on command lines. Imports nothing heavy."""

import argparse
import math
from pathlib import Path


def add_options(parser, encoder_help="encoder; see docs/encoders.md"):
    """Add the options that all parse scripts have.

    Args:
        parser: of the script.
        encoder_help: what --clip_model_type takes: models.encoders.ENCODER_HELP.
    """
    group = parser.add_argument_group("features")
    group.add_argument("--clip_model_type", default="ViT-B/32", metavar="NAME", help=f"{encoder_help} (default ViT-B/32)")
    group.add_argument("--out", type=Path, metavar="FILE",
                       help="feature file to write (.pkl), or a name without suffix for a folder (default: as above)")  # fmt: skip
    group.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default auto)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no",
                       help="precision of the encoder's matrix products (default no: float32)")  # fmt: skip
    group.add_argument("--pooling", choices=("pooled", "none"), default="pooled",
                       help="none keeps every patch token of a picture, or every window of a sound, for the transformer mapper "
                            "(default pooled: one embedding per image)")  # fmt: skip
    group.add_argument("--batch_size", type=positive, metavar="N", help="images encoded together (default 64; 16 on a CPU)")
    group.add_argument("--num_workers", type=whole_number, metavar="N",
                       help="processes that read pictures; 0 reads them in threads (default: by the number of cores)")  # fmt: skip
    group.add_argument("--fast_decode", action="store_true",
                       help="read JPEGs at the smallest scale the encoder can use: faster, slightly different embeddings")  # fmt: skip
    group.add_argument("--max_skipped", type=number_or_share, default="1%", metavar="N|X%",
                       help="stop when more images than this cannot be read; a share always allows 10 (default 1%%)")  # fmt: skip
    group.add_argument("--save_seconds", type=float, default=15, metavar="S",
                       help="save finished work every S seconds, so that an interrupted job loses no more (default 15)")  # fmt: skip


def extract_options(args):
    """Return what add_options read, as keyword arguments of features.extract.extract."""
    return {name: getattr(args, name) for name in ("batch_size", "num_workers", "max_skipped", "save_seconds", "fast_decode")}


def share(text):
    """Read a share from 0 to below 1: "0.13" or "13%"."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1, such as 0.1 or 10%")
    return value


def share_above_0(text):
    """Read a share above 0, up to 1: "0.9" or "90%"."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0, up to 1, such as 0.9 or 90%")
    return value


def number_or_share(text):
    """Read a number of images, "50" (int), or a share of them, "1%" or "0.01" (float)."""
    text = str(text).strip()
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of images or a share of them")
    return value if text.endswith("%") or value % 1 else int(value)


def whole_number(text):
    """Read a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


def positive(text):
    """Read a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _number(text):
    """Read a number or a percentage; NaN where it is neither."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return math.nan
