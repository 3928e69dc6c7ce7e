"""Measure what rows cost in memory: the real train.py on a feature directory of random embeddings, watched from outside.

  python -m benchmarks.rows                     3,300,000 rows x 512 (float16, 3.4 GB on disk): about ten minutes on a CPU
  python -m benchmarks.rows --rows 300000

Captions have COCO's lengths, one per image. The language model is a tiny GPT-2, so that the data dominates. The same run on 100 rows gives
the memory of libraries, model and optimizer, which is subtracted. Memory is RssAnon: mapped files do not count.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import work
from common import Parser, UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
ROWS, FEW_ROWS, WIDTH, PART_ROWS = 3_300_000, 100, 512, 250_000
FLOOR, AIM = 2e9, 1e9  # bytes beyond the model
SIZES = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
FIGURES = ("peak", "steps")


def save_directory(folder, rows, words, width=WIDTH, part_rows=PART_ROWS, seed=0):
    """Write random features in clip-retrieval's layout, one part at a time; each row has one caption made of `words`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    starts = range(0, rows, part_rows)
    digits = len(str(len(starts) - 1))
    for number, start in enumerate(starts):
        draw, count = np.random.default_rng([seed, number]), min(part_rows, rows - start)
        np.save(folder / "img_emb" / f"img_emb_{number:0{digits}}.npy", draw.standard_normal((count, width), np.float32).astype(np.float16))
        lengths = work.draw_lengths(count, seed + number)
        chosen, ends = draw.integers(0, len(words), lengths.sum()), np.cumsum(lengths)
        texts = [" ".join(words[word] for word in chosen[end - length : end]) for end, length in zip(ends, lengths)]
        paths = [f"{row:012d}.jpg" for row in range(start, start + count)]
        file = folder / "metadata" / f"metadata_{number:0{digits}}.parquet"
        pq.write_table(pa.table({"image_path": paths, "caption": texts}), file)


def save_language_model(folder):
    """Write a tiny GPT-2 with random weights and a word tokenizer into `folder`. Returns words about as long as English ones."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = work.word_tokenizer(5000)  # "t1" … "t4998": 4 to 5 letters, as COCO's words have
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    work.build_gpt2(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **SIZES).save_pretrained(folder)
    return [f"t{number}" for number in range(1, 4999)]


def watch_training(data, language_model, out, steps, *more):
    """Run train.py on `data` for some steps. Returns bytes of RssAnon, "peak" over the run and "steps" while training; "seconds"."""
    words = [sys.executable, "train.py", "--data", str(data), "--gpt2_type", str(language_model), "--out_dir", str(out), "--device", "cpu"]
    words += ["--max_steps", str(steps), "--log_every", "1", "--mixed_precision", "no", "--prefix", "run", *more]
    metrics, began, seen = out / "run_metrics.jsonl", time.monotonic(), dict.fromkeys(FIGURES, 0)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            held = anonymous_memory(process.pid)
            seen["peak"] = max(seen["peak"], held)
            if metrics.is_file() and metrics.stat().st_size:
                seen["steps"] = max(seen["steps"], held)
            time.sleep(0.02)
        said.seek(0)
        output = said.read().strip().splitlines() or ["nothing said"]
    if process.returncode:
        raise UserError(f"train.py ended with exit code {process.returncode}: {output[-1]}")
    return {**seen, "seconds": time.monotonic() - began}


def anonymous_memory(process):
    """Return RssAnon of a process in bytes, 0 once it has ended. Raises UserError where the system does not say."""
    if not Path("/proc/self/status").is_file():
        raise UserError("this system has no /proc, from which memory is read. Measure on Linux.")
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="number of rows (default 3300000)")
    parser.add_argument("--width", type=int, default=WIDTH, help="width of an embedding (default 512)")
    parser.add_argument("--steps", type=int, default=200, help="number of optimizer steps of 40 captions (default 200)")
    parser.add_argument("--folder", type=Path, help="folder for temporary data (default: the system's)")
    options = parser.parse_args(argv)
    if options.rows < FEW_ROWS or options.steps < 1:
        parser.error(f"--rows {options.rows}, --steps {options.steps}: expected at least {FEW_ROWS} rows and 1 step")
    folder = Path(tempfile.mkdtemp(prefix="rows.", dir=options.folder))
    try:
        words = save_language_model(folder / "gpt2")
        found = {}
        for rows in (FEW_ROWS, options.rows):
            save_directory(folder / f"ViT-B_32_{rows}", rows, words, options.width)
            found[rows] = watch_training(folder / f"ViT-B_32_{rows}", folder / "gpt2", folder / f"out_{rows}", options.steps)
    finally:
        shutil.rmtree(folder)
    few, many = found[FEW_ROWS], found[options.rows]
    result = {"rows": options.rows, "width": options.width, "steps": options.steps, "seconds": round(many["seconds"], 1)}
    for name in FIGURES:
        result |= {f"{name}_mb": round(many[name] / 1e6), f"{name}_beyond_model_mb": round((many[name] - few[name]) / 1e6)}
    beyond = many["peak"] - few["peak"]
    result["meets"] = "aim" if beyond <= AIM else "floor" if beyond <= FLOOR else "neither"
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
