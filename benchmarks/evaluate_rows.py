"""Measure what rows cost in memory in evaluate.py: the real script on a feature directory of random embeddings, watched from outside.

  python -m benchmarks.evaluate_rows                       3,300,000 rows x 512 (float16, 3.4 GB on disk), of which 5,000 are scored
  python -m benchmarks.evaluate_rows --rows 400000 --scored 20000

The predictions are captions of other images. The directory gives the references and stays on disk. Memory is the peak of RssAnon of
evaluate.py itself; mapped files and Java's processes do not count. Two runs on fewer rows and fewer predictions tell what each costs.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.extract_rows import LIMIT, watch
from benchmarks.rows import FEW_ROWS, ROWS, WIDTH, save_directory
from common import Parser, one_line_errors

SCORED = 5000


def save_predictions(file, images, words):
    """Write a caption for each of the first `images` images of save_directory."""
    rows = [{"image_id": f"{row:012d}.jpg", "caption": " ".join(words[row % 1000 : row % 1000 + 10])} for row in range(images)]
    file.write_text(json.dumps(rows), encoding="utf-8")


def watch_evaluation(data, predictions, metrics):
    """Run evaluate.py without intervals. Returns its peak of RssAnon in bytes, and seconds."""
    return watch(["evaluate.py", "--data", data, "--predictions", predictions, "--metrics", *metrics, "--bootstrap", 0])


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.evaluate_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="number of rows (default 3300000)")
    parser.add_argument("--scored", type=int, default=SCORED, metavar="N", help="number of images that have a prediction (default 5000)")
    parser.add_argument("--metrics", nargs="+", default=["bleu", "cider"], help="metrics (default bleu cider)")
    parser.add_argument("--folder", type=Path, help="folder for temporary data (default: the system's)")
    options = parser.parse_args(argv)
    if not FEW_ROWS <= options.scored <= options.rows:
        parser.error(f"--rows {options.rows}, --scored {options.scored}: expected at least {FEW_ROWS} scored, and as many rows")
    folder = Path(tempfile.mkdtemp(prefix="evaluate_rows.", dir=options.folder))
    words = [f"t{number}" for number in range(1, 4999)]
    try:
        save_directory(folder / "ViT-B_32", options.rows, words, WIDTH)
        save_directory(folder / "few", FEW_ROWS, words, WIDTH)
        for count in (FEW_ROWS, options.scored):
            save_predictions(folder / f"{count}.json", count, words)
        libraries, _ = watch_evaluation(folder / "few", folder / f"{FEW_ROWS}.json", options.metrics)
        of_rows, _ = watch_evaluation(folder / "ViT-B_32", folder / f"{FEW_ROWS}.json", options.metrics)
        peak, seconds = watch_evaluation(folder / "ViT-B_32", folder / f"{options.scored}.json", options.metrics)
    finally:
        shutil.rmtree(folder)
    result = {"rows": options.rows, "scored": options.scored, "seconds": round(seconds, 1), "peak_mb": round(peak / 1e6)}
    result |= {"bytes_per_row": round((of_rows - libraries) / options.rows), "beyond_libraries_mb": round((peak - libraries) / 1e6)}
    result |= {"bytes_per_scored_image": round((peak - of_rows) / (options.scored - FEW_ROWS or 1))}
    print(json.dumps({**result, "below_2_gb": peak < LIMIT}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
