"""Measure what pictures cost in memory while they are made into a feature directory: the real extract() with an encoder that does nothing.

  python -m benchmarks.extract_rows                    3,300,000 pictures x 512 (float32, 6.9 GB on disk, twice that while it is joined)
  python -m benchmarks.extract_rows --rows 400000

A record is a place in a tar shard with one caption of COCO's mean length, as parse_conceptual.py --shards makes them; its picture is not
read. Pieces are saved every second, since this encoder makes in one what a GPU makes in fifteen. Memory is the peak of RssAnon; mapped
files do not count. The same run on 100 pictures gives the memory of the libraries.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import FEW_ROWS, ROOT, ROWS, WIDTH, anonymous_memory
from common import Parser, UserError, one_line_errors
from features.shards import TarPicture

LIMIT = 2e9  # bytes


class UnreadPicture(TarPicture):
    """A picture in a tar that is not there."""

    def read(self):
        """Return what NoEncoder.preprocess takes."""
        return b""


class NoEncoder:
    """An encoder whose embeddings are zeros."""

    name, width, preprocessing, mixed_precision, pooling = "none", WIDTH, "none", "no", "pooled"
    modality, audio, many_views = "image", None, False

    def __init__(self):
        import torch

        self.device = torch.device("cpu")

    def digest(self):
        """Return what stands for the weights."""
        return "none"

    def preprocess(self, image):
        """Return one number."""
        import torch

        return torch.zeros(1)

    def encode(self, batch):
        """Return zeros [B, WIDTH]."""
        import torch

        return torch.zeros(len(batch), WIDTH)


def make_records(rows):
    """Yield records of `rows` pictures, ten thousand to a shard."""
    from features.record_table import Record

    for row in range(rows):
        if row % 10_000 == 0:
            shard = f"/data/cc3m/{row // 10_000:05d}.tar"
        picture = UnreadPicture(shard, row % 10_000 * 20_480, 20_000, "204800000 1700000000000000000")
        yield Record(f"{row:09d}", picture, [{"caption": f"a caption of picture {row:09d}, as long as those of COCO are."}])


def watch(words):
    """Run a command. Returns its peak of RssAnon in bytes, and seconds. Raises UserError when it fails."""
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.02)
        said.seek(0)
        output = said.read().strip().splitlines() or ["nothing said"]
    if process.returncode:
        raise UserError(f"{words[0]} ended with exit code {process.returncode}: {output[-1]}")
    return peak, time.monotonic() - began


def watch_extraction(rows, out):
    """Extract `rows` pictures into the directory `out` in a process of its own. Returns its peak of RssAnon in bytes, and seconds."""
    code = """
import sys
from pathlib import Path
from benchmarks.extract_rows import NoEncoder, make_records
from features.extract import extract
from features.record_table import RecordTable

records = RecordTable(make_records(int(sys.argv[1])))
extract(records, NoEncoder(), Path(sys.argv[2]), source="made", num_workers=0, batch_size=256, save_seconds=1)
"""
    return watch(["-c", code, rows, out])


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.extract_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="number of pictures (default 3300000)")
    parser.add_argument("--folder", type=Path, help="folder for temporary data (default: the system's)")
    options = parser.parse_args(argv)
    if options.rows < FEW_ROWS:
        parser.error(f"--rows {options.rows}: expected at least {FEW_ROWS}")
    folder = Path(tempfile.mkdtemp(prefix="extract_rows.", dir=options.folder))
    try:
        few, _ = watch_extraction(FEW_ROWS, folder / "few")
        peak, seconds = watch_extraction(options.rows, folder / "many")
    finally:
        shutil.rmtree(folder)
    result = {
        "rows": options.rows,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1e6),
        "beyond_libraries_mb": round((peak - few) / 1e6),
    }
    print(json.dumps({**result, "below_2_gb": peak < LIMIT}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
