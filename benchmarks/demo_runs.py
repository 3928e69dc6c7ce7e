"""Train the demo's captioner several times on the same data and judge its captions: precisions, and ways of tuning.

    make demo                                    first: the world, its tiny models and its features
    python -m benchmarks.demo_runs precision     compare bf16 with float32; about three minutes on two cores
    python -m benchmarks.demo_runs tuning        compare full, mapper, ends, head and lora, each with its own settings; about five minutes

All runs of a comparison see the same batches in the same order. The result is a table and a line of JSON. For each run it shows the number
of trained parameters, the seconds of training, the final loss (nats per token, over the last logging interval) and share_true (the share
of true captions on held-out pictures, decoded in float32). The exit code is 1 where the precisions differ by more than LOSS_SHARE or
TRUE_SHARE.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

from common import Parser, UserError, one_line_errors
from demo import run as demo
from demo import scenes as world

COMPARISONS = {
    "precision": {"fp32": "--mixed_precision no", "bf16": "--mixed_precision bf16"},
    # A frozen language model needs a longer prefix and a higher learning rate of the mapper.
    "tuning": {
        "full": "--tune full",
        "mapper": "--tune mapper --prefix_length 16 --lr 3e-3",
        "ends": "--tune ends",
        "head": "--tune head --prefix_length 16 --lr 3e-3",
        "lora": "--tune lora --lora_rank 16 --lr 2e-3",
    },
}
LOSS_SHARE = 0.01  # of float32's loss
TRUE_SHARE = 0.02


def train_and_judge(folder, out, train_options):
    """Train the demo in `folder` with these options, write into `out`, and caption the held-out pictures. Returns a dict of figures."""
    captions, places = out / "captions.json", {f"{folder}/checkpoints": str(out), f"{folder}/captions.json": str(out / "captions.json")}
    lines = demo.command_lines(folder, train_options)
    seconds = {}
    for stage in ("train", "predict"):
        words = [next((word.replace(old, new) for old, new in places.items() if old in word), word) for word in lines[stage]]
        started = time.perf_counter()
        demo.run_script(words, brief=stage == "predict")
        seconds[stage] = time.perf_counter() - started
    logged = [json.loads(line) for line in (out / "demo_metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    truth = world.read_scenes(folder, "heldout")
    predicted = {int(row["image_id"]): row["caption"] for row in json.loads(captions.read_text(encoding="utf-8"))}
    if predicted.keys() != truth.keys():
        raise UserError(f"{folder}/heldout.pkl does not match the {len(truth)} pictures in {folder}/heldout. Run make demo again.")
    share_true = world.share_true([predicted[image_id] for image_id in truth], list(truth.values()))
    return {"trained": count_trained(out), "seconds": round(seconds["train"], 1), "loss": logged[-1]["loss"], "share_true": share_true}


def count_trained(out):
    """Count the parameters in the optimizer of the run in `out`."""
    from models.tensors import read_tensors

    return sum(tensor.numel() for tensor in read_tensors(out / "demo_state.pt")["weights"].values())


def compare_precisions(found):
    """Return how far the two precisions differ, and whether that is within the limits."""
    fp32, bf16 = found["fp32"], found["bf16"]
    loss, share = abs(bf16["loss"] / fp32["loss"] - 1), abs(bf16["share_true"] - fp32["share_true"])
    return {"loss_apart": loss, "share_true_apart": share, "meets": loss <= LOSS_SHARE and share <= TRUE_SHARE}


def options_of(more, common):
    """Replace some of the demo's train options by those of a run. Returns one text."""
    for name in re.findall(r"--\w+", more):
        common = re.sub(rf"{name} \S+ ?", "", common)
    return f"{common.strip()} {more}"


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.demo_runs", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="folder that make demo wrote (default data/demo)")
    parser.add_argument("--train_options", default=demo.TRAIN_OPTIONS, help="options for train.py (default %(default)s)")
    options = parser.parse_args(argv)
    if not (options.folder / "heldout.pkl").is_file():
        raise UserError(f"{options.folder} holds no demo; expected train.pkl, heldout.pkl and weights in it. Run make demo first.")
    runs = COMPARISONS[options.comparison]
    with tempfile.TemporaryDirectory(prefix="demo_runs.") as out:
        found = {
            name: train_and_judge(options.folder, Path(out) / name, options_of(more, options.train_options)) for name, more in runs.items()
        }
    print("\nrun        trained   seconds    loss  share_true  options")
    for name, figures in found.items():
        shown = f"{figures['trained']:>9,} {figures['seconds']:>9.0f} {figures['loss']:>7.4f} {figures['share_true']:>11.3f}"
        print(f"{name:8} {shown}  {runs[name]}")
    summary = {"runs": found, "options": runs, **(compare_precisions(found) if options.comparison == "precision" else {})}
    print(json.dumps(summary))
    return 0 if summary.get("meets", True) else 1


if __name__ == "__main__":
    sys.exit(main())
