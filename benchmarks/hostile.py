"""Run every script on hostile and odd inputs, and count what ends in anything but success or one line of error.

    python -m benchmarks.hostile                                  2,000 inputs, about 15 minutes on two cores
    python -m benchmarks.hostile --inputs 300 --seed 7            others of the same kinds
    python -m benchmarks.hostile --only checkpoints --out FILE    one kind; the table and every failure as JSON
    python -m benchmarks.hostile --case 1234                      one input again, with what it printed

Each input runs in a process of its own, in a temporary folder of its own. It fails when it ends in a traceback, a crash, a hang, too much
memory, several lines of error, half-written files, or with exit code 0 and a wrong or incomplete result.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks import hostile_cases as cases
from benchmarks.hostile_cases import SCRIPTS
from benchmarks.hostile_kinds import KINDS, draw_case, option_names
from benchmarks.hostile_runs import ROOT, run_case
from common import Parser, one_line_errors


def run_share(numbers, options, world, pipe):
    """Run some inputs, one after another, and write a line of JSON for each to a pipe."""
    with open(pipe, "w") as out:
        for number in numbers:
            case, draw = draw_case(number, options.seed, options.only)
            began = time.monotonic()
            end, said = run_case(case, world, draw)
            row = {"case": number, "kind": case.kind, "script": case.script.split()[0], "end": end, "argv": case.argv}
            row |= {"seconds": round(time.monotonic() - began, 2), "said": said[-2000:] if end not in ("ok", "refused") else ""}
            print(json.dumps(row), file=out, flush=True)


def run_inputs(numbers, options, world):
    """Run inputs on all jobs. Returns a list of results in the order of their numbers."""
    pipes = []
    for job in range(options.jobs):
        read, write = os.pipe()
        if not os.fork():
            try:
                os.close(read)
                run_share(numbers[job :: options.jobs], options, world, write)
            finally:
                os._exit(0)
        os.close(write)
        pipes.append(open(read))
    rows = [json.loads(line) for pipe in pipes for line in pipe]
    for _ in pipes:
        os.wait()
    return sorted(rows, key=lambda row: row["case"])


def table(rows):
    """Lay out results by kind: inputs, how many succeeded, were refused and failed, and the scripts that failed."""
    lines = ["| kind | inputs | ok | refused | failed | by script |", "|---|---|---|---|---|---|"]
    for kind in [*KINDS, "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        ends = Counter(row["end"] if row["end"] in ("ok", "refused") else "failed" for row in of_kind)
        scripts = Counter(row["script"] for row in of_kind if row["end"] not in ("ok", "refused"))
        named = ", ".join(f"{script} {count}" for script, count in scripts.most_common())
        if of_kind:
            lines.append(f"| {kind} | {len(of_kind)} | {ends['ok']} | {ends['refused']} | {ends['failed']} | {named} |")
    return "\n".join(lines)


def run(options):
    """Build the world, import everything once, and run the inputs. Returns the results."""
    os.environ |= dict.fromkeys(["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"], "1")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    for name in SCRIPTS:
        option_names(name)
    with tempfile.TemporaryDirectory(prefix="hostile_world_") as folder:
        world = Path(folder, "world")
        child = os.fork()  # what it starts, threads above all, must not be in the processes that are forked later
        if not child:
            try:
                with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
                    cases.build_world(world, ROOT)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "the valid inputs could not be made"
        numbers = list(range(options.inputs)) if options.case is None else [options.case]
        return run_inputs(numbers, options, world)


@one_line_errors
def main(argv=None):
    parser = Parser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, metavar="N", help="inputs to try (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--only", nargs="+", default=[], choices=list(KINDS), metavar="KIND", help=f"kinds to try: {', '.join(KINDS)}")
    parser.add_argument("--case", type=int, metavar="N", help="try this input only, and print what it said")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="inputs at the same time (default 2)")
    parser.add_argument("--out", metavar="FILE", help="write every result as JSON")
    options = parser.parse_args(argv)
    began = time.monotonic()
    rows = run(options)
    failures = [row for row in rows if row["end"] not in ("ok", "refused")]
    for row in failures if options.case is None else rows:
        print(f"{row['case']} {row['kind']}: {row['script']} {' '.join(map(ascii, row['argv']))[:200]}\n    {ascii(row['end'])[1:-1]}")
        if options.case is not None:
            print(row["said"])
    print(table(rows))
    print(f"{len(rows)} inputs, {len(failures)} failures, {time.monotonic() - began:.0f} s")
    if options.out:
        Path(options.out).write_text(json.dumps({"seed": options.seed, "inputs": len(rows), "rows": rows}, indent=0), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
