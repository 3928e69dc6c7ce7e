"""Run the whole pipeline with nothing to download: draw a world, train tiny models, then parse, train, predict and score.

    python -m demo.run              about 190 s on two cores; fails when fewer than 0.9 of the captions are true
    python -m demo.run --quick      about a minute, with a smaller world and less training; the result is not judged

It writes into --folder: annotations/, train/ and heldout/ (pictures in COCO's layout), weights/demo_clip.pt and weights/demo_gpt2/,
train.pkl and heldout.pkl, checkpoints/, captions.json, scores.json, captions.png and metrics.json. A world and models made with the
same settings are reused.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import Parser, UserError, claim_output, one_line_errors, replace_file
from demo import scenes as world
from demo import tiny_models

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 0.9  # share of true captions below which the full demo has failed
SHOWN_LINES = 6  # printed of the hundreds of lines that predict.py writes about the held-out pictures
PLOTTED = 8  # held-out pictures shown in captions.png
FULL = {"scenes": 6000, "heldout": 500, "clip_steps": 600, "gpt2_steps": 400}
QUICK = {"scenes": 1200, "heldout": 60, "clip_steps": 160, "gpt2_steps": 160}
QUICK |= {"colours": ("red", "green", "blue"), "shapes": ("circle", "square", "triangle")}
TRAIN_OPTIONS = "--prefix_length 8 --bs 100 --epochs 3 --lr 1e-3 --warmup_steps 50"


def build(
    folder,
    scenes,
    heldout,
    clip_steps,
    gpt2_steps,
    seed=0,
    colours=tuple(world.COLOURS),
    shapes=world.SHAPES,
    in_process=False,
    clip_batch=128,
):
    """Draw the world into `folder` and train its tiny CLIP and GPT-2, unless they are there with the same settings.

    Args:
        folder: where everything goes.
        scenes, heldout: number of pictures of each split.
        clip_steps, gpt2_steps: optimizer steps.
        seed: seed of the world and of the training.
        colours, shapes: fewer make an easier world.
        in_process: train one model after the other in this process, which is faster for a few steps.
        clip_batch: pictures per step of CLIP, when trained in this process.

    Returns:
        dict of seconds by stage.
    """
    folder = Path(folder)
    settings = {"scenes": scenes, "heldout": heldout, "clip_steps": clip_steps, "gpt2_steps": gpt2_steps, "seed": seed}
    settings = json.dumps({**settings, "colours": colours, "shapes": shapes})
    written, seconds = folder / "world.json", {}
    if not written.exists() or written.read_text() != settings:
        for part in ("annotations", "train", "heldout", "weights"):
            shutil.rmtree(folder / part, ignore_errors=True)
        with replace_file(written) as temporary:
            temporary.write_text(settings)

    started = time.perf_counter()
    train_pairs, heldout_pairs = world.split_pairs(seed, colours, shapes)
    for split, pairs, count, first_id in (("train", train_pairs, scenes, 1), ("heldout", heldout_pairs, heldout, scenes + 1)):
        # The JSON is written last: a split that has it is complete.
        if not world.annotations_path(folder, split).exists():
            print(f"drawing {count:,} pictures into {folder / split}", flush=True)
            world.write_split(folder, split, world.make_scenes(pairs, count, f"{split} {seed}"), first_id)
    seconds["draw"] = time.perf_counter() - started

    started = time.perf_counter()
    if in_process:
        tiny_models.train_one("clip", folder, clip_steps, seed, batch_size=clip_batch)
        tiny_models.train_one("gpt2", folder, gpt2_steps, seed)
    elif not (tiny_models.clip_path(folder).exists() and tiny_models.gpt2_path(folder).exists()):
        print(f"training a tiny CLIP ({clip_steps} steps) and a tiny GPT-2 ({gpt2_steps} steps) into {folder / 'weights'}", flush=True)
        tiny_models.train_both(folder, clip_steps, gpt2_steps, seed)
    seconds["tiny models"] = time.perf_counter() - started
    return seconds


def command_lines(folder, train_options=TRAIN_OPTIONS):
    """List the commands that a user would type, in order: dict from stage to words, the script first."""
    clip_file, gpt2_folder = tiny_models.clip_path(folder), tiny_models.gpt2_path(folder)
    options = train_options.split()
    epochs = int(options[options.index("--epochs") + 1])
    checkpoint = f"{folder}/checkpoints/demo-{epochs - 1:03d}.pt"
    lines = {}
    for split in ("train", "heldout"):
        annotations = world.annotations_path(folder, split)
        lines[f"parse {split}"] = (
            f"parse_coco.py --annotations {annotations} --images {folder}/{split} --out {folder}/{split}.pkl --clip_model_type {clip_file}"
        )
    lines["train"] = (
        f"train.py --data {folder}/train.pkl --out_dir {folder}/checkpoints --prefix demo --gpt2_type {gpt2_folder} "
        f"--save_every {epochs} {train_options}"
    )
    lines["predict"] = f"predict.py --checkpoint {checkpoint} --data {folder}/heldout.pkl --out {folder}/captions.json"
    lines["evaluate"] = (
        f"evaluate.py --predictions {folder}/captions.json --data {folder}/heldout.pkl --train_data {folder}/train.pkl "
        f"--metrics bleu rouge cider --out {folder}/scores.json"
    )
    shown = sorted((Path(folder) / "heldout").glob("*.jpg"))[:PLOTTED]
    lines["plot"] = f"predict.py --checkpoint {checkpoint} --plot {folder}/captions.png {' '.join(map(str, shown))}"
    return {stage: line.split() for stage, line in lines.items()}


def run_script(words, brief=False):
    """Print a command as one would type it, then run it; `brief` shortens its output. Raises UserError when it fails."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    command = [sys.executable, os.path.relpath(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE if brief else None, encoding="utf-8")
    if brief:
        lines = done.stdout.splitlines()
        lines[SHOWN_LINES:-2] = [f"... ({max(0, len(lines) - SHOWN_LINES - 2):,} more lines)"]
        print("\n".join(lines), flush=True)
    if done.returncode:
        raise UserError(f"{words[0]} ended with exit code {done.returncode}; see its message above.")


def score(folder, seed=0):
    """Compare captions.json with the held-out scenes. Returns a dict with share_true, share_true_by_chance and counts."""
    truth = world.read_scenes(folder, "heldout")
    predicted = {int(row["image_id"]): row["caption"] for row in json.loads((Path(folder) / "captions.json").read_text())}
    if predicted.keys() != truth.keys():
        raise UserError(f"captions.json has {len(predicted)} pictures; expected the {len(truth)} held-out ones. Delete {folder} first.")
    captions = [predicted[image_id] for image_id in truth]
    heldout = list(truth.values())
    return {
        "share_true": world.share_true(captions, heldout),
        "share_true_by_chance": world.share_true_by_chance(heldout, seed),
        "share_parsed": sum(world.parse_caption(caption) is not None for caption in captions) / len(captions),
        "heldout_pictures": len(heldout),
        "heldout_pairs": len({(scene.first[1:], scene.second[1:]) for scene in heldout}),
        "train_pictures": len(world.read_scenes(folder, "train")),
    }


def _run_all(folder, options, settings, floor, build, command_lines, score):
    """Do what run_and_judge does, but for the last lines. Returns what metrics.json holds, and seconds by stage."""
    began = time.perf_counter()
    seconds = build(folder, **settings)
    for stage, words in command_lines(folder, options.train_options).items():
        started = time.perf_counter()
        run_script(words, brief=stage == "predict")
        seconds[stage] = time.perf_counter() - started
    metrics = {**score(folder, options.seed), "floor": floor}
    if (folder / "scores.json").exists():
        metrics["scores"] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["seconds_by_stage"] = {stage: round(took, 1) for stage, took in seconds.items()}
    metrics["settings"] = {**settings, "train_options": options.train_options}
    with replace_file(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics, seconds


def run_and_judge(prog, options, settings, floor, build, command_lines, score, things):
    """Build a small world, run the commands on it, write metrics.json and print the score.

    Args:
        prog: name for messages.
        options: folder, seed and train_options.
        settings: arguments of `build`.
        floor: least share of true captions; None for a run that is not judged.
        build, command_lines, score: functions of the world.
        things: "pictures" or "sounds".

    Returns:
        Exit code: 1 for a score below `floor`, else 0.

    Raises:
        UserError: a command fails, or another process is making a demo in the same folder.
    """
    folder = options.folder
    with claim_output(folder):
        metrics, seconds = _run_all(folder, options, settings, floor, build, command_lines, score)
    print("\n" + ", ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items()) + f"; {metrics['seconds']:.0f} s in total")
    print(f"{things} with their captions: {folder}/captions.png; figures: {folder}/metrics.json")
    print(
        f"share of true captions on {metrics[f'heldout_{things}']} {things} of {metrics['heldout_pairs']} pairs never seen together in "
        f"training: {metrics['share_true']:.3f} (by chance: {metrics['share_true_by_chance']:.3f})"
    )
    if floor is not None and metrics["share_true"] < floor:
        print(f"{prog}: error: {metrics['share_true']:.3f} of the captions are true; expected {floor} or more", file=sys.stderr)
        return 1
    return 0


@one_line_errors
def main(argv=None):
    parser = Parser(prog="demo.run", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="folder to write into (default data/demo)")
    parser.add_argument("--scenes", type=int, help=f"training pictures (default {FULL['scenes']}; with --quick {QUICK['scenes']})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the training (default 0)")
    parser.add_argument("--quick", action="store_true", help="use a smaller world and less training; the result is not judged")
    parser.add_argument("--train_options", default=TRAIN_OPTIONS, help="options for train.py (default %(default)s)")
    options = parser.parse_args(argv)
    settings = {**(QUICK if options.quick else FULL), "seed": options.seed}
    settings["scenes"] = options.scenes or settings["scenes"]

    judged = None if options.quick else FLOOR
    return run_and_judge("demo.run", options, settings, judged, build, command_lines, score, "pictures")


if __name__ == "__main__":
    sys.exit(main())
