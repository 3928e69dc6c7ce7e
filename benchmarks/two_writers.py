"""Start two runs on one output at nearly the same time, again and again: one must write it, the other must end in one line.

    python -m benchmarks.two_writers                  50 pairs of parse_coco.py and train.py
    python -m benchmarks.two_writers --pairs 6 --seed 7

The two runs of a pair differ: other annotations, or another seed. So an output that mixes them is seen. It must have the bytes of one of
both when it runs alone. Nothing else may be left in the folder. Where the second run began when the first had ended, both succeed; such a
pair is no contest, and another one is drawn.
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.hostile_server import Server
from benchmarks.hostile_world import ROOT, write_json
from common import Parser, UserError, one_line_errors

PICTURES, LATEST = 40, 0.5  # pictures; seconds by which the second run starts later
PARSE = ["--images", "photos", "--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--save_seconds", "0"]
TRAIN = ["--data", "train.pkl", "--prefix", "run", "--gpt2_type", "gpt2", "--device", "cpu", "--epochs", "2", "--bs", "8",
         "--warmup_steps", "1", "--prefix_length", "2", "--tracker", "none", "--mixed_precision", "no"]  # fmt: skip
OUTPUTS = {
    "file": ("parse_coco.py", "new.pkl", [[*PARSE, "--annotations", f"{name}.json"] for name in "ab"]),
    "directory": ("parse_coco.py", "new", [[*PARSE, "--annotations", f"{name}.json"] for name in "ab"]),
    "checkpoints": ("train.py", "run", [[*TRAIN, "--seed", str(seed)] for seed in (1, 2)]),
}
REFUSED, IN_TURN = "is being written by process", "one after the other"


def build_inputs(folder):
    """Write pictures, two files of annotations, and tiny models."""
    sys.path.append(str(ROOT / "tests"))
    import tiny

    os.chdir(folder)
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    tiny.save_gpt2("gpt2")
    for number in range(PICTURES):
        tiny.save_picture(f"photos/{number}.jpg", number)
    for name, numbers in (("a", range(0, 24)), ("b", range(16, PICTURES))):
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
        rows = [{"id": number, "image_id": number, "caption": f"Picture {number} of {name}."} for number in numbers]
        write_json(f"{name}.json", {"images": images, "annotations": rows})


def read_output(place):
    """Return what was written: dict of file name to bytes. Of a training, the checkpoints."""
    place = Path(place)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return {file.name: file.read_bytes() for file in files if place.name != "run" or re.fullmatch(r"run-\d+\.pt", file.name)}


def command(script, place, argv):
    return [*argv, "--out_dir" if script == "train.py" else "--out", place]


def run_alone(server, kind):
    """Run both commands of a kind by themselves. Returns their outputs."""
    script, place, argvs = OUTPUTS[kind]
    outputs = []
    for argv in argvs:
        code = server.run_all(script, [{"number": 0, "argv": command(script, place, argv)}])[0]
        if code:
            raise UserError(f"{script} alone ended with {code}: {Path('../stderr0').read_text()[-300:]}")
        outputs.append(read_output(place))
        remove(place)
    if outputs[0] == outputs[1]:
        raise UserError(f"both runs of {kind} write the same: a mixture could not be seen")
    return outputs


def remove(place):
    shutil.rmtree(place) if os.path.isdir(place) else os.unlink(place)


def run_pair(server, kind, alone, delays, before):
    """Run both commands at once. Returns "one refused", "one after the other", or what is wrong."""
    script, place, argvs = OUTPUTS[kind]
    runs = [{"number": n, "argv": command(script, place, argv), "delay": delays[n]} for n, argv in enumerate(argvs)]
    codes = server.run_all(script, runs)
    said = [Path(f"../stderr{number}").read_text(encoding="utf-8").strip() for number in range(2)]
    written = read_output(place)
    remove(place)
    left = sorted(set(os.listdir()) - before)
    if left:
        return f"left behind: {', '.join(left)}"
    if codes == [0, 0]:
        return IN_TURN if written in alone else "both succeeded, and the output is neither one's"
    if sorted(codes, key=str) != [0, 2]:
        return f"exit codes {codes}: {said}"
    winner, loser = codes.index(0), codes.index(2)
    errors = [line for line in said[loser].splitlines() if ": error: " in line]
    if len(errors) != 1 or REFUSED not in errors[0] or said[loser].splitlines()[-1] != errors[0]:
        return f"the loser said: {said[loser]}"
    return "one refused" if written == alone[winner] else "the output is not the winner's"


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.two_writers", description=__doc__)
    parser.add_argument("--pairs", type=int, default=50, metavar="N", help="pairs in which both ran at the same time (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kinds and moments (default 0)")
    options = parser.parse_args(argv)
    draw, ends = random.Random(options.seed), Counter()
    server = Server()
    with tempfile.TemporaryDirectory(prefix="two_writers.") as folder:
        work = Path(folder, "work")
        work.mkdir()
        build_inputs(work)
        try:
            code = server.run_all("parse_coco.py", [{"number": 0, "argv": command("parse_coco.py", "train.pkl", OUTPUTS["file"][2][0])}])[0]
            if code:
                raise UserError(f"the features could not be made: {Path('../stderr0').read_text()[-300:]}")
            alone = {kind: run_alone(server, kind) for kind in OUTPUTS}
            before = set(os.listdir())
            met = 0
            while met < options.pairs:
                kind = draw.choice(list(OUTPUTS))
                delays = draw.sample([0.0, draw.uniform(0, LATEST)], 2)
                end = run_pair(server, kind, alone[kind], delays, before)
                ends[kind, end] += 1
                met += end != IN_TURN
                print(f"  {met}: {kind}, {max(delays):.2f} s apart: {end}", flush=True)
        finally:
            os.chdir(ROOT)
            server.close()
    print(json.dumps({f"{kind}: {end}": count for (kind, end), count in sorted(ends.items())}))
    wrong = sum(count for (_, end), count in ends.items() if not end.startswith("one "))
    print(f"{met} pairs at the same time, {sum(ends.values()) - met} one after the other, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
