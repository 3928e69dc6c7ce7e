"""Kill parse_coco.py and train.py at random moments, let each finish once, and compare with undisturbed runs byte by byte.

    python -m benchmarks.kill_and_resume                 20 SIGKILLs each on the demo world's pictures and tiny models (make demo first)
    python -m benchmarks.kill_and_resume --kills 3
    python -m benchmarks.kill_and_resume --processes 2   each script as two processes, of which one, drawn at random, is killed

When one of several processes is killed, the others must end: by themselves, or at SIGTERM where some were still starting. Features are
compared with those of one process.

It prints one line per kill, and ends with an error where a feature file or a checkpoint differs.
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Parser, UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS_PATIENCE = 10  # seconds after which SIGTERM is sent; launchers send it at once
PATIENCE = 60  # seconds


def start(command, count):
    """Start a command as `count` processes, with the environment that a launcher gives them. Returns list of Popen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    environments = [{**os.environ, **shared, "LOCAL_WORLD_SIZE": str(count), "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=one if count > 1 else None, **streams) for one in environments]


def wait(processes, seconds):
    """Wait until every process has ended. Returns whether they have within `seconds`."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.communicate(timeout=max(0.01, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def run_killed(command, kills, longest, draw, finish, count):
    """Start a command and kill it after up to `longest` seconds, until it was killed `kills` times; then let it finish.

    Of several processes one is killed, and the others must end within PATIENCE.

    finish: called whenever a run has finished; compares its files with the undisturbed ones and removes them.
    """
    killed = 0
    while killed < kills:
        processes, seconds, victim = start(command, count), draw.uniform(0.3, longest), draw.randrange(count)
        if wait(processes, seconds):
            finish()
            continue
        processes[victim].kill()
        began = time.monotonic()
        if not wait(processes, LAUNCHERS_PATIENCE):
            for process in processes:
                process.terminate()
        if not wait(processes, PATIENCE):
            for process in processes:
                process.kill()
            raise UserError(f"process {victim} of {count} was killed, and another still ran {PATIENCE} s later")
        killed += 1
        others = f", process {victim}; the others ended {time.monotonic() - began:.1f} s later" if count > 1 else ""
        print(f"  {killed}: killed after {seconds:.1f} s{others}", flush=True)
    run_whole(command, count)
    finish()


def run_whole(command, count=1):
    """Run a command to its end. Returns its seconds; raises UserError when it fails."""
    began = time.monotonic()
    for process in start(command, count):
        said = process.communicate()[1].strip()
        if process.returncode:
            last = (said.splitlines() or ["nothing said"])[-1]
            raise UserError(f"{' '.join(command[1:])} ended with exit code {process.returncode}: {last}")
    return time.monotonic() - began


def compare_and_remove(folder, names):
    """Compare the bytes of each killed_NAME with whole_NAME, and remove what was compared. Raises UserError for any difference."""
    left = {path.name for path in folder.iterdir() if not path.name.startswith("whole")}
    for name in names:
        if (folder / f"whole{name}").read_bytes() != (folder / f"killed{name}").read_bytes():
            raise UserError(f"killed{name} differs from whole{name}: a killed run does not end like an undisturbed one")
        print(f"  finished: killed{name} equals whole{name}, byte by byte")
    stray = [name for name in left if not name.startswith("killed") or name.endswith(".pieces")]
    if stray:
        raise UserError(f"left behind: {', '.join(stray)}")
    for name in left:
        (folder / name).unlink()


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.kill_and_resume", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills of each script (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--world", type=Path, default=Path("data/demo"), help="folder that make demo filled (default data/demo)")
    parser.add_argument("--processes", type=int, default=1, help="number of processes of each script (default 1)")
    parser.add_argument("--scripts", nargs="+", choices=("parse_coco.py", "train.py"), default=["parse_coco.py", "train.py"],
                        help="scripts to kill (default: both)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}; expected at least 1")
    world = options.world.resolve()
    if not (world / "weights").is_dir():
        raise UserError(f"{world} holds no demo world. Run make demo first, or name its folder with --world.")
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_and_resume."))
    try:

        def parse(name):
            words = ["--annotations", world / "annotations/captions_train.json", "--images", world / "train"]
            words += ["--out", folder / f"{name}.pkl", "--clip_model_type", world / "weights/demo_clip.pt"]
            words += ["--save_seconds", 0, "--batch_size", 16, "--device", "cpu"]
            return [sys.executable, "parse_coco.py", *map(str, words)]

        def train(name):
            words = ["--data", world / "heldout.pkl", "--out_dir", folder, "--prefix", name, "--gpt2_type", world / "weights/demo_gpt2"]
            words += ["--epochs", 3, "--bs", 40, "--warmup_steps", 20, "--lr", "1e-3", "--save_steps", 5, "--device", "cpu", "--resume"]
            words += ["--tracker", "none"]
            return [sys.executable, "train.py", *map(str, words)]

        checkpoints = [f"-{epoch:03d}.pt" for epoch in range(3)]
        for what, command, names in (("parse_coco.py", parse, [".pkl"]), ("train.py", train, checkpoints)):
            if what not in options.scripts:
                continue
            seconds = run_whole(command("whole"), 1 if command is parse else options.processes)
            print(f"{what}: undisturbed {seconds:.1f} s; {options.kills} kills", flush=True)
            run_killed(
                command("killed"), options.kills, seconds, draw, lambda names=names: compare_and_remove(folder, names), options.processes
            )
        print(f"all equal after {options.kills} kills each; nothing left behind")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
