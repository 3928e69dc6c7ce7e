"""Compute hours and disk for data sets of several sizes on several numbers of GPUs, from rates of one GPU. Nothing is measured here.

  python -m benchmarks.scaling                                 the goals of one GPU (benchmarks/README.md), which no GPU has confirmed yet
  python -m benchmarks.scaling --features 46.6 --training 35.3 --decoding 10.6       what two CPU cores were measured at, in bf16

Work is split without loss, so these are lower bounds. docs/scaling.md shows both tables.
"""

import sys
from typing import NamedTuple

from benchmarks.run import GPU_FLOORS
from common import Parser, one_line_errors

GPUS = (1, 8, 64)
FLOAT32 = 4  # bytes
FLOORS = dict(zip(("features", "decoding", "training"), (floor for _, _, floor, _ in GPU_FLOORS)))


class DataSet(NamedTuple):
    """Size of a training set."""

    name: str
    images: int
    captions: int


DATA_SETS = (
    DataSet("COCO", 113_287, 566_747),
    DataSet("CC3M", 3_300_000, 3_300_000),
    DataSet("CC12M", 12_400_000, 12_400_000),
    DataSet("LAION-400M", 400_000_000, 400_000_000),
)


def format_hours(seconds):
    """Write a time in a unit that suits it."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}" if seconds >= 10 * length else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def format_bytes(size):
    """Write a size on disk in GB or TB."""
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"


def make_table(rates, width, caption_bytes, gpus=GPUS):
    """Return the lines of a Markdown table.

    Args:
        rates: dict with features (images/s), training and decoding (captions/s) of one GPU.
        width: numbers of an embedding.
        caption_bytes: bytes of a caption and its ids in a feature directory.
        gpus: numbers of GPUs.
    """
    columns = [f"{stage}, {count}" for stage in ("encode", "one epoch", "caption") for count in gpus]
    lines = ["| data | features on disk | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for data in DATA_SETS:
        work = (("features", data.images), ("training", data.captions), ("decoding", data.images))
        cells = [format_hours(amount / rates[rate] / count) for rate, amount in work for count in gpus]
        size = data.images * width * FLOAT32 + data.captions * caption_bytes
        lines.append(f"| {data.name} | {format_bytes(size)} | " + " | ".join(cells) + " |")
    return lines


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.scaling", description=__doc__)
    for name, about in (("features", "images/s"), ("training", "captions/s"), ("decoding", "captions/s")):
        parser.add_argument(f"--{name}", type=float, default=FLOORS[name], metavar="X",
                            help=f"rate of one GPU, in {about} (default {FLOORS[name]:,}, the floor of the benchmark)")  # fmt: skip
    parser.add_argument("--width", type=int, default=512, help="width of an embedding (default 512)")
    parser.add_argument("--caption_bytes", type=int, default=54,
                        help="bytes of a caption in a feature directory (default 54, as 20,000 rows of benchmarks.rows have)")  # fmt: skip
    options = parser.parse_args(argv)
    if min(options.features, options.training, options.decoding) <= 0:
        parser.error("rates are above 0")
    print("\n".join(make_table(vars(options), options.width, options.caption_bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
