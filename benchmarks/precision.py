"""Does bf16 learn what float32 learns? The demo's captioner trained twice with the demo's settings, and its captions judged.

    make demo                                    once: the world, its tiny models and its features
    python -m benchmarks.precision               = --folder data/demo; about three minutes on two cores

Both runs see the same batches from the same start. Prints a line of JSON: for each precision the loss at the end (nats a token, over the
last logging interval) and share_true (share of true captions of the held-out pictures, decoded in float32); exit code 1 where they
lie further apart than LOSS_SHARE or TRUE_SHARE.
"""

import json
import sys
import tempfile
from pathlib import Path

from common import Parser, UserError, one_line_errors
from demo import run as demo
from demo import scenes as world

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # and how train.py calls them
LOSS_SHARE = 0.01  # of float32's loss
TRUE_SHARE = 0.02


def train_and_judge(folder, out, precision, train_options):
    """Train the demo in `folder` under this precision, writing into `out`, and caption the held-out pictures → loss and share_true."""
    captions, places = out / "captions.json", {f"{folder}/checkpoints": str(out), f"{folder}/captions.json": str(out / "captions.json")}
    lines = demo.command_lines(folder, f"{train_options} --mixed_precision {PRECISIONS[precision]}")
    for stage in ("train", "predict"):
        words = [next((word.replace(old, new) for old, new in places.items() if old in word), word) for word in lines[stage]]
        demo.run_script(words, brief=stage == "predict")
    logged = [json.loads(line) for line in (out / "demo_metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    truth = world.read_scenes(folder, "heldout")
    predicted = {int(row["image_id"]): row["caption"] for row in json.loads(captions.read_text(encoding="utf-8"))}
    if predicted.keys() != truth.keys():
        raise UserError(f"{folder}/heldout.pkl is not of the {len(truth)} pictures in {folder}/heldout. Run make demo again.")
    share_true = world.share_true([predicted[image_id] for image_id in truth], list(truth.values()))
    return {"loss": logged[-1]["loss"], "share_true": share_true}


def compare(found):
    """{"fp32": {loss, share_true}, "bf16": …} → the same with how far they lie apart, and whether that is near enough."""
    fp32, bf16 = found["fp32"], found["bf16"]
    loss, share = abs(bf16["loss"] / fp32["loss"] - 1), abs(bf16["share_true"] - fp32["share_true"])
    return {**found, "loss_apart": loss, "share_true_apart": share, "meets": loss <= LOSS_SHARE and share <= TRUE_SHARE}


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.precision", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="where make demo wrote (default data/demo)")
    parser.add_argument("--train_options", default=demo.TRAIN_OPTIONS, help="options handed on to train.py (default %(default)s)")
    options = parser.parse_args(argv)
    if not (options.folder / "heldout.pkl").is_file():
        raise UserError(f"{options.folder} holds no demo; expected train.pkl, heldout.pkl and weights in it. Run make demo first.")
    with tempfile.TemporaryDirectory(prefix="precision.") as out:
        found = {name: train_and_judge(options.folder, Path(out) / name, name, options.train_options) for name in PRECISIONS}
    found = compare(found)
    print(json.dumps(found))
    return 0 if found["meets"] else 1


if __name__ == "__main__":
    sys.exit(main())
