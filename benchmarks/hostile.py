"""Run every script on hostile and odd inputs, and count what ends in anything but success or one line of error.

    python -m benchmarks.hostile                                  2,000 inputs, 29 minutes on two busy cores
    python -m benchmarks.hostile --inputs 300 --seed 7            others of the same kinds
    python -m benchmarks.hostile --only checkpoints --out FILE    one kind; the table and every failure as JSON
    python -m benchmarks.hostile --case 1234                      one input again, with what it printed
    python -m benchmarks.hostile --code ../other                  the same inputs, run by another copy of the project

Each input runs in a process of its own, in a temporary folder of its own. It fails when it ends in a traceback, a crash, a hang, too much
memory, several lines of error, another exit code, or half-written, changed or lost files; or with exit code 0 and a wrong or incomplete
result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

from benchmarks import hostile_world
from benchmarks.hostile_kinds import KINDS, draw_case
from benchmarks.hostile_runs import GOOD, run_case
from benchmarks.hostile_server import QUIET, Server
from benchmarks.hostile_world import ROOT, SCRIPTS, build_world, has_script, option_names

LIST_OPTIONS = "import json; from benchmarks.hostile_world import *; print(json.dumps({name: option_names(name) for name in SCRIPTS}))"


def run_share(numbers, options, world, path):
    """Run some inputs, one after another, and write a line of JSON for each to a file."""
    warnings.simplefilter("ignore")
    server = Server(options.code)
    with open(path, "w") as out, closing(server):
        for number in numbers:
            case, draw = draw_case(number, options.seed, options.only, options.quick)
            began = time.monotonic()
            end, said = run_case(case, world, draw, server) if has_script(case.script) else ("absent", "")
            row = {"case": number, "kind": case.kind, "script": case.script.split()[0], "end": end, "argv": case.argv}
            row |= {"seconds": round(time.monotonic() - began, 2)}
            row |= {"said": said[-4000:] if end not in GOOD or options.case is not None else ""}
            print(json.dumps(row), file=out, flush=True)


def run_inputs(numbers, options, world):
    """Run inputs on all jobs. Returns a list of results in the order of their numbers."""
    paths = [world.parent / f"results{job}" for job in range(options.jobs)]
    for job, path in enumerate(paths):
        if not os.fork():
            try:
                run_share(numbers[job :: options.jobs], options, world, path)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    for _ in paths:
        os.wait()
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert len(rows) == len(numbers), f"{len(numbers) - len(rows)} inputs have no result"
    return sorted(rows, key=lambda row: row["case"])


def count_failures(rows):
    return [row for row in rows if row["end"] not in (*GOOD, "absent")]


def table(rows):
    """Lay out results by kind: inputs, how many succeeded, were refused and failed, and the scripts that failed."""
    lines = ["| kind | inputs | ok | refused | failed | by script |", "|---|---|---|---|---|---|"]
    for kind in [*KINDS, "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all") and row["end"] != "absent"]
        ends, failed = Counter(row["end"] for row in of_kind), count_failures(of_kind)
        named = ", ".join(f"{script} {count}" for script, count in Counter(row["script"] for row in failed).most_common())
        if of_kind:
            lines.append(f"| {kind} | {len(of_kind)} | {ends['ok']} | {ends['refused']} | {len(failed)} | {named} |")
    return "\n".join(lines)


def run(options):
    """Build the world and run the inputs. Returns the results."""
    os.environ |= QUIET
    if options.code:
        # The options of this copy's scripts, so that both copies get the same inputs.
        listed = subprocess.run([sys.executable, "-c", LIST_OPTIONS], cwd=ROOT, capture_output=True, check=True)
        hostile_world._option_names.update(json.loads(listed.stdout))
        sys.path[:] = [os.path.abspath(options.code), *(path for path in sys.path if path not in ("", os.getcwd(), str(ROOT)))]
    for name in filter(has_script, SCRIPTS):
        option_names(name)
    with tempfile.TemporaryDirectory(prefix="hostile_world_") as folder:
        world = Path(folder, "world")
        child = os.fork()  # the libraries that it imports would only slow the jobs down
        if not child:
            try:
                with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                    build_world(world)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "the valid inputs could not be made"
        return run_inputs(list(range(options.inputs)) if options.case is None else [options.case], options, world)


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--inputs", type=int, default=2000, metavar="N", help="inputs to try (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--only", nargs="+", default=[], choices=list(KINDS), metavar="KIND", help=f"kinds to try: {', '.join(KINDS)}")
    parser.add_argument("--quick", action="store_true", help="leave out kinds and scripts of which an input takes a second and more")
    parser.add_argument("--case", type=int, metavar="N", help="try this input only, and print what it said")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="inputs at the same time (default 2)")
    parser.add_argument("--out", metavar="FILE", help="write every result as JSON")
    parser.add_argument("--code", metavar="FOLDER", help="folder of the project whose scripts are run (default: this one)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    rows = run(options)
    failures = count_failures(rows)
    for row in failures if options.case is None else rows:
        print(f"{row['case']} {row['kind']}: {row['script']} {' '.join(map(ascii, row['argv']))[:200]}\n    {ascii(row['end'])[1:-1]}")
        if options.case is not None:
            print(ascii(row["said"])[1:-1].replace("\\n", "\n"))
    print(table(rows))
    absent = sum(row["end"] == "absent" for row in rows)
    print(f"{len(rows)} inputs, {len(failures)} failures, {absent} of absent scripts, {time.monotonic() - began:.0f} s")
    if options.out:
        Path(options.out).write_text(json.dumps({"seed": options.seed, "inputs": len(rows), "rows": rows}, indent=0), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
