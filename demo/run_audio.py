"""Run the whole pipeline on sounds with nothing to download: play a world, train tiny models, then parse, train, predict and score.

    python -m demo.run_audio              about three minutes on two cores; fails when fewer than FLOOR of the captions are true
    python -m demo.run_audio --quick      less than a minute, with a smaller world and less training; the result is not judged

It writes into --folder what parse_clotho.py reads (development/, evaluation/ and their CSVs), windows/ (what the tiny CLIP learns from),
weights/demo_clip.pt and weights/demo_gpt2/, development.pkl and evaluation.pkl, checkpoints/, captions.json, captions.png and
metrics.json. A world and models made with the same settings are reused.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file
from demo import scenes, tiny_models
from demo import sounds as world
from demo.run import TRAIN_OPTIONS, run_and_judge

FLOOR = 0.8  # share of true captions below which the full demo has failed
PLOTTED = 8  # held-out sounds shown in captions.png
PICTURE_SIZE = 64  # pixels of a window as the tiny CLIP sees it
FULL = {"sounds": 3500, "heldout": 300, "clip_steps": 500, "gpt2_steps": 400}
QUICK = {"sounds": 1000, "heldout": 60, "clip_steps": 160, "gpt2_steps": 160, "kinds": ("tone", "rising sweep", "click", "noise")}


def build(folder, sounds, heldout, clip_steps, gpt2_steps, seed=0, kinds=world.KINDS, in_process=False):
    """Play the world into `folder` and train its tiny CLIP and GPT-2, unless they are there with the same settings.

    Args:
        folder: where everything goes.
        sounds, heldout: number of clips of each split.
        clip_steps, gpt2_steps: optimizer steps.
        seed: seed of the world and of the training.
        kinds: kinds of events; fewer make an easier world.
        in_process: train one model after the other in this process.

    Returns:
        dict of seconds by stage.
    """
    folder = Path(folder)
    settings = {"sounds": sounds, "heldout": heldout, "clip_steps": clip_steps, "gpt2_steps": gpt2_steps, "seed": seed, "kinds": kinds}
    settings, written, seconds = json.dumps(settings), folder / "world.json", {}
    if not written.exists() or written.read_text() != settings:
        for part in ("development", "evaluation", "windows", "weights"):
            shutil.rmtree(folder / part, ignore_errors=True)
        for split in world.SPLITS:
            world.captions_path(folder, split).unlink(missing_ok=True)
        tiny_models.lessons_path(folder).unlink(missing_ok=True)
        with replace_file(written) as temporary:
            temporary.write_text(settings)

    started = time.perf_counter()
    parts = scenes.split_pairs(seed, tuple(world.PITCHES), kinds)
    for split, pairs, count in zip(world.SPLITS, parts, (sounds, heldout)):
        if not world.captions_path(folder, split).exists():
            print(f"playing {count:,} sounds into {folder / split}", flush=True)
            world.write_split(folder, split, world.make_sounds(pairs, count, f"{split} {seed}"), seed)
    if not tiny_models.lessons_path(folder).exists():
        write_lessons(folder)
    seconds["play"] = time.perf_counter() - started

    started = time.perf_counter()
    if in_process:
        tiny_models.train_one("clip", folder, clip_steps, seed)
        tiny_models.train_one("gpt2", folder, gpt2_steps, seed)
    elif not (tiny_models.clip_path(folder).exists() and tiny_models.gpt2_path(folder).exists()):
        print(f"training a tiny CLIP ({clip_steps} steps) and a tiny GPT-2 ({gpt2_steps} steps) into {folder / 'weights'}", flush=True)
        tiny_models.train_both(folder, clip_steps, gpt2_steps, seed)
    seconds["tiny models"] = time.perf_counter() - started
    return seconds


def write_lessons(folder):
    """Write the windows of the development sounds as small pictures with their captions; the tiny CLIP learns from them."""
    from PIL import Image

    from features.audio import cut_windows, log_mel_picture, read_sound

    lessons = []
    (Path(folder) / "windows").mkdir(exist_ok=True)
    for number, (name, sound) in enumerate(world.read_sounds(folder, "development").items()):
        for place, window in enumerate(cut_windows(log_mel_picture(read_sound(Path(folder) / "development" / name)))):
            picture = f"windows/{number:05d}-{place}.png"
            Image.fromarray(window).resize((PICTURE_SIZE,) * 2, Image.Resampling.BICUBIC).save(Path(folder) / picture)
            lessons.append([picture, world.describe(sound)])
    with replace_file(tiny_models.lessons_path(folder)) as temporary:
        temporary.write_text(json.dumps(lessons))


def command_lines(folder, train_options=TRAIN_OPTIONS):
    """List the commands that a user would type, in order: dict from stage to words, the script first."""
    options = train_options.split()
    epochs = int(options[options.index("--epochs") + 1])
    checkpoint = f"{folder}/checkpoints/demo-{epochs - 1:03d}.pt"
    lines = {}
    for split in world.SPLITS:
        lines[f"parse {split}"] = [
            *f"parse_clotho.py --clip_model_type {tiny_models.clip_path(folder)} --captions_path".split(),
            *f"{world.captions_path(folder, split)} --audio_path {folder}/{split} --out {folder}/{split}.pkl".split(),
        ]
    lines["train"] = [
        *f"train.py --data {folder}/development.pkl --out_dir {folder}/checkpoints --prefix demo".split(),
        *f"--gpt2_type {tiny_models.gpt2_path(folder)} --save_every {epochs}".split(), *options,
    ]  # fmt: skip
    lines["predict"] = f"predict.py --checkpoint {checkpoint} --data {folder}/evaluation.pkl --out {folder}/captions.json".split()
    shown = [str(Path(folder) / "evaluation" / name) for name in world.read_sounds(folder, "evaluation")][:PLOTTED]
    lines["plot"] = [*f"predict.py --checkpoint {checkpoint} --plot {folder}/captions.png".split(), *shown]
    return lines


def score(folder, seed=0):
    """Compare captions.json with the held-out sounds. Returns a dict with share_true, share_true_by_chance and counts."""
    truth = world.read_sounds(folder, "evaluation")
    predicted = {row["image_id"]: row["caption"] for row in json.loads((Path(folder) / "captions.json").read_text())}
    if predicted.keys() != truth.keys():
        raise UserError(f"captions.json has {len(predicted)} sounds; expected the {len(truth)} held-out ones. Delete {folder} first.")
    captions, heldout = [predicted[name] for name in truth], list(truth.values())
    return {
        "share_true": scenes.share_true(captions, heldout, world.caption_is_true),
        "share_true_by_chance": scenes.share_true_by_chance(heldout, seed, world.describe, world.caption_is_true),
        "share_parsed": sum(world.parse_caption(caption) is not None for caption in captions) / len(captions),
        "heldout_sounds": len(heldout),
        "heldout_pairs": len({(sound.first[1:], sound.second[1:]) for sound in heldout}),
    }


@one_line_errors
def main(argv=None):
    parser = Parser(prog="demo.run_audio", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/demo_audio"), help="folder to write into (default data/demo_audio)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the training (default 0)")
    parser.add_argument("--quick", action="store_true", help="use a smaller world and less training; the result is not judged")
    parser.add_argument("--train_options", default=TRAIN_OPTIONS, help="options for train.py (default %(default)s)")
    options = parser.parse_args(argv)
    settings = {**(QUICK if options.quick else FULL), "seed": options.seed}

    judged = None if options.quick else FLOOR
    return run_and_judge("demo.run_audio", options, settings, judged, build, command_lines, score, "sounds")


if __name__ == "__main__":
    sys.exit(main())
