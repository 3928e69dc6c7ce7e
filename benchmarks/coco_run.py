"""Measure how long 10 epochs of COCO take: the real train.py on 113,287 random embeddings and 566,747 captions of real lengths.

    python -m benchmarks.coco_run                                    MLP + tuned GPT-2, on the best device there is
    python -m benchmarks.coco_run --only_prefix --mapping_type transformer --prefix_length 40 --prefix_length_clip 40
    python -m benchmarks.coco_run --max_steps 300 --bs 400 --lr 2e-4 --device cuda

Unknown options are passed to train.py. A part of the run is timed, and the whole is extrapolated from it. Captions are made of words of
GPT-2's BPE where --data holds its vocab.json and merges.txt (see benchmarks/README.md), else of numbers. All files are removed at the end.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import work
from common import Parser, UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
IMAGES, CAPTIONS, EPOCHS = 113_287, 566_747, 10  # Karpathy's train and restval splits of COCO 2014
GOAL_TO_FIRST_STEP = 60  # seconds on two cores


def save_language_model(folder, data, **sizes):
    """Write a GPT-2 with random weights and a tokenizer into `folder`. Returns words that are one token each after a space."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = Path(data) / "gpt2"
    if (source / "vocab.json").is_file():
        from transformers import GPT2TokenizerFast

        vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
        lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
        tokenizer = GPT2TokenizerFast(vocab=vocabulary, merges=[tuple(line.split()) for line in lines if line and line[0] != "#"])
        words = [token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token)]
    else:
        tokenizer = work.word_tokenizer(work.GPT2_VOCABULARY)
        words = [f"t{number}" for number in range(1, work.GPT2_VOCABULARY - 1)]
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    work.build_gpt2(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes).save_pretrained(folder)
    return words


def save_data(path, words, images=IMAGES, captions=CAPTIONS, width=512, seed=0):
    """Write a feature file of random embeddings and captions: five per image, and a sixth while captions are left."""
    import torch

    from features.store import save_features

    draw = np.random.default_rng(seed)
    lengths = work.draw_lengths(captions, seed)
    chosen = draw.integers(0, len(words), lengths.sum())
    ends = np.cumsum(lengths)
    # A space before each word, also the first: GPT-2's BPE may split a word at the beginning of a text.
    texts = ("".join(f" {words[word]}" for word in chosen[end - length : end]) for end, length in zip(ends, lengths))
    rows = np.sort(np.arange(captions) % images)
    records = [
        {"image_id": str(row), "caption": text, "id": number, "clip_embedding": row}
        for number, (row, text) in enumerate(zip(rows.tolist(), texts))
    ]
    embedding = torch.randn(images, width, generator=torch.Generator().manual_seed(seed))
    save_features(path, embedding, records, {"encoder": "ViT-B/32", "source": "random numbers of benchmarks/coco_run.py", "split": None})


def time_run(command, metrics):
    """Run train.py and follow its metrics file. Returns seconds until the first step's line, all lines, and what train.py printed."""
    began, first = time.monotonic(), None
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and metrics.is_file() and metrics.stat().st_size:
                first = time.monotonic() - began
            time.sleep(0.1)
        said.seek(0)
        output = said.read()
    if process.returncode or not metrics.is_file():
        raise UserError(f"train.py ended with exit code {process.returncode}: {(output.strip().splitlines() or ['nothing said'])[-1]}")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return first, lines, output


def steady_rate(lines):
    """Return captions per second: median, lowest and highest of the logging intervals after the first quarter, a warm-up."""
    rates = [line["captions_per_s"] for line in lines if "captions_per_s" in line]
    kept = rates[len(rates) // 4 :]
    return statistics.median(kept), min(kept), max(kept)


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.coco_run", description=__doc__)
    parser.add_argument("--max_steps", type=int, default=30, help="number of optimizer steps to time (default 30)")
    parser.add_argument("--log_every", type=int, default=1, help="steps between lines of the metrics file; use more on a GPU (default 1)")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"number of images (default {IMAGES})")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"number of captions (default {CAPTIONS})")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=os.environ.get("PREFIXCAP_DATA", "../shared/data"),
                        help="where gpt2/vocab.json and merges.txt are (default $PREFIXCAP_DATA)")  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and model in this folder, and reuse what is there")
    options, passed_on = parser.parse_known_args(argv)
    if not 1 <= options.images <= options.captions:
        parser.error(f"--images {options.images} and --captions {options.captions}: expected at least one caption per image")
    if options.max_steps < 4:
        parser.error(f"--max_steps is {options.max_steps}; expected at least 4; the first ones are a warm-up")

    folder = options.keep or Path(tempfile.mkdtemp(prefix="coco_run."))
    try:
        features, language_model = folder / "train.pkl", folder / "gpt2"
        if not (features.is_file() and language_model.is_dir()):
            began = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            words = save_language_model(language_model, options.data)
            save_data(features, words, options.images, options.captions)
            print(f"made {options.images:,} embeddings, {options.captions:,} captions: {time.monotonic() - began:.0f} s", flush=True)
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "train.py", "--data", features.resolve(), "--gpt2_type", language_model.resolve()]
        command += ["--out_dir", out.resolve(), "--prefix", "run", "--max_steps", options.max_steps, "--log_every", options.log_every]
        command += passed_on
        watch = work.OthersWatch()
        first, lines, output = time_run([str(word) for word in command], out / "run_metrics.jsonl")
        others = watch.share()
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    rate, lowest, highest = steady_rate(lines)
    seconds = EPOCHS * options.captions / rate
    print("\n".join(line for line in output.splitlines() if line.startswith(("device", "data", "parameters"))))
    what = "the first optimizer step" if options.log_every == 1 else f"optimizer step {options.log_every}"
    print(f"time to {what}: {first:.0f} s (goal for the first, on two cores: under {GOAL_TO_FIRST_STEP} s)")
    print(f"{rate:,.1f} captions/s ({lowest:,.1f} to {highest:,.1f} over {len(lines)} logged intervals)")
    print(f"{EPOCHS} epochs of {options.captions:,} captions: {describe(seconds)}, extrapolated from {options.max_steps:,} steps")
    if others is not None:
        print(f"other programs took {others:.0%} of the cores meanwhile")
    return 0


def describe(seconds):
    """Format seconds in a convenient unit: "4.2 minutes", "3.1 hours", "2.4 days"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    sys.exit(main())
