"""Run every script on hostile and odd inputs, and count what ends in anything but success or one line of error.

    python -m benchmarks.hostile                                  2,000 inputs, about 15 minutes on two cores
    python -m benchmarks.hostile --inputs 300 --seed 7            others of the same kinds
    python -m benchmarks.hostile --only checkpoints --out FILE    one kind; the table and every failure as JSON
    python -m benchmarks.hostile --case 1234                      one input again, with what it printed

Each input runs in a process of its own, in a temporary folder of its own. It fails when it ends in a traceback, a crash, a hang, too much
memory, several lines of error, half-written files, or with exit code 0 and a wrong or incomplete result.
"""

import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks import hostile_cases as cases
from benchmarks.hostile_cases import SCRIPTS, Case
from common import Parser, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
SECONDS, GIGABYTES = 30, 2.0  # what an input may take beside the libraries
READERS = ["train.py", "predict.py --data", "evaluate.py --data", "check.py", "check.py describe"]
PARSERS = [name for name in SCRIPTS if name.startswith("parse_")]
ANNOTATIONS = {"parse_coco.py": "captions.json", "parse_flickr.py": "flickr.csv", "parse_clotho.py": "clotho.csv",
               "parse_conceptual.py --tsv": "cc.tsv", "parse_conceptual.py": "shard.tar", "parse_huggingface.py": "rows.parquet",
               "parse_folder.py": "own/metadata.csv", "parse_food.py": "own/Captions.csv"}  # fmt: skip


def complete(said):
    """What is missing from the output that a script wrote from the four valid items; None where nothing is."""
    if os.path.exists("said.json"):
        found = len(json.loads(Path("said.json").read_text(encoding="utf-8")))
    elif os.path.exists("new.pkl"):
        from features.store import load_features

        found = len(load_features("new.pkl").captions)
    elif os.path.exists("run"):
        found = 4 * bool(sorted(Path("run").glob("*-000.pt")))
    else:
        found = 0
    return None if found >= 4 else f"{found} of 4 items in the output"


def _features(draw, name):
    return Case("feature pickles", name, SCRIPTS[name], lambda: cases.change_pickle(draw))


def _directories(draw, name):
    argv = ["train" if word == "train.pkl" else word for word in SCRIPTS[name]]
    return Case("feature directories", name, argv, lambda: cases.change_directory(draw))


def _checkpoints(draw, name):
    argv = [*SCRIPTS[name], *(["--init_from", "out/model-000.pt"] if name == "train.py" else [])]
    return Case("checkpoints", name, argv, lambda: cases.change_checkpoint(draw))


def _annotations(draw, name):
    path = ANNOTATIONS[name]

    def prepare():
        if path.startswith("own/"):
            column = "file_name" if name == "parse_folder.py" else "Index"
            cases.write_table(path, [[column, "caption"], *([f"{number}.jpg", cases.TEXTS[number]] for number in range(4))])
        change = cases.change_json_file if path.endswith(".json") else cases.change_text_file
        (cases.change_bytes if path.endswith((".tar", ".parquet")) else change)(draw, path)

    return Case("annotations", name, SCRIPTS[name], prepare)


def _references(draw, name):
    path = draw.choice(["captions.json", "said_before.json"])
    return Case("references and results", name, SCRIPTS[name], lambda: cases.change_json_file(draw, path))


def _options(draw, name):
    argv = list(SCRIPTS[name])
    for _ in range(draw.randint(1, 3)):
        option, word = draw.choice(option_names(name)), draw.choice(cases.WORDS)
        argv += [option, *([word] if draw.random() < 0.85 else [])]
    return Case("option combinations", name, argv)


def _files(draw, name):
    folder = {"parse_folder.py": "own", "parse_food.py": "own", "parse_clotho.py": "sounds"}.get(name, "photos")
    argv = [*SCRIPTS[name], *(["--max_skipped", "50%"] if name.startswith("parse_") else [])]
    return Case("pictures and sounds", name, argv, lambda: cases.add_odd_files(draw, folder), complete)


def _outputs(draw, name):
    argv = SCRIPTS[name]
    place = argv[argv.index("--out_dir" if name == "train.py" else "--out") + 1]
    state = {}
    return Case("output places", name, argv, lambda: state.update(check=cases.place_output(draw, place)), lambda said: state["check"](said))


def _terminals(draw, name):
    return Case("terminals", name, SCRIPTS[name], None, complete, draw.choice(["cp1252", "ascii", "latin-1", "cp437"]))


def _twins(draw, name):
    return Case("simultaneous runs", name, SCRIPTS[name], None, complete, twins=2)


def _interrupted(draw, name):
    argv = [*SCRIPTS[name], *(["--resume"] if name == "train.py" else [])]
    return Case("interrupted runs", name, argv, None, complete, interrupt=draw.uniform(0.02, 1.0))


KINDS = {
    "feature pickles": (24, _features, READERS),
    "feature directories": (10, _directories, READERS),
    "checkpoints": (14, _checkpoints, ["train.py", "predict.py", "evaluate.py --data", "models.hub", "reports.run"]),
    "annotations": (16, _annotations, list(ANNOTATIONS)),
    "references and results": (8, _references, ["evaluate.py"]),
    "option combinations": (16, _options, list(SCRIPTS)),
    "pictures and sounds": (8, _files, ["predict.py", "parse_folder.py", "parse_food.py", "parse_clotho.py"]),
    "output places": (6, _outputs, ["train.py", "predict.py", "evaluate.py", "reports.run", *PARSERS]),
    "terminals": (4, _terminals, ["train.py", "predict.py", "parse_folder.py", "parse_coco.py", "parse_clotho.py"]),
    "simultaneous runs": (2, _twins, ["train.py", "predict.py", "parse_coco.py", "parse_folder.py"]),
    "interrupted runs": (2, _interrupted, ["train.py", "predict.py", "parse_coco.py", "parse_folder.py"]),
}


def draw_case(number, seed, only=()):
    """Draw one input; the same number and seed give the same one."""
    draw = random.Random(f"{seed}/{number}")
    kinds = only or list(KINDS)
    kind = draw.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    _, make, names = KINDS[kind]
    return make(draw, draw.choice(names)), draw


def load_script(name):
    """Import what runs under this name."""
    return importlib.import_module(name.split()[0].removesuffix(".py").replace("/", "."))


_option_names = {}


def option_names(name):
    """List the options that a script's --help names."""
    if name not in _option_names:
        text = io.StringIO()
        with redirect_stdout(text):
            try:
                load_script(name).main([*(["describe"] if name == "models.hub" else []), "--help"])
            except SystemExit:
                pass
        _option_names[name] = sorted(set(re.findall(r"(?<![\w-])--\w+", text.getvalue())) - {"--help"}) or ["--x"]
    return _option_names[name]


def start(case, number):
    """Fork a process that runs the script. Returns its process id; what it prints goes to files."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        for stream, name in (("stdout", f"../stdout{number}"), ("stderr", f"../stderr{number}")):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1 if stream == "stdout" else 2)
            errors = "strict" if stream == "stdout" else "backslashreplace"
            setattr(sys, stream, open(descriptor, "w", encoding=case.encoding, errors=errors))
        sys.argv = [case.script.split()[0], *case.argv]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = load_script(case.script).main(case.argv) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = 71
    os._exit(code)


def wait(child, seconds, interrupt=0.0, with_signal=signal.SIGTERM):
    """Wait for a process. Returns its exit code (negative for a signal), "hang" or "out of memory"."""
    began, sent = time.monotonic(), False
    base = resident(os.getpid())
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        fault = "hang" if passed > seconds else "out of memory" if resident(child) - base > GIGABYTES * 2**30 else None
        if fault:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return fault
        if interrupt and passed > interrupt and not sent:
            os.kill(child, with_signal)
            sent = True
        time.sleep(0.005)


def resident(process):
    """Read how many bytes of a process are in memory."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def judge(code, said, case):
    """Say how a run ended: "ok", "refused" or what is wrong with it."""
    lines = [line for line in said.splitlines() if line.strip()]
    if isinstance(code, str):
        return code
    if code < 0:
        return f"crash: signal {-code}"
    if "Traceback (most recent call last)" in said:
        return f"traceback: {lines[-1][:160]}"
    if code == 2:
        errors = sum(": error: " in line for line in lines)
        return "refused" if errors == 1 else f"{errors} lines of error"
    if code == 0 or (code == 1 and case.script.startswith("check.py")):
        return "ok"
    return f"exit code {code}"


def run_case(case, world, draw):
    """Run one input in a folder of its own. Returns how it ended, and what it printed on stderr."""
    with tempfile.TemporaryDirectory(prefix="hostile_") as folder:
        work = Path(folder, "a", "b")
        shutil.copytree(world, work, symlinks=True, ignore=shutil.ignore_patterns("gpt2", "weights"))
        (work / "data").mkdir(exist_ok=True)
        (work / "data" / "weights").symlink_to(world / "data" / "weights")
        (work / "gpt2").symlink_to(world / "gpt2")
        os.chdir(work)
        try:
            if case.prepare:
                case.prepare()
            if case.interrupt:
                wait(start(case, 9), SECONDS, case.interrupt, draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))
            children = [start(case, number) for number in range(case.twins)]
            codes = [wait(child, SECONDS) for child in children]
            texts = [Path(f"../stderr{number}").read_text("utf-8", "replace") for number in range(case.twins)]
            ends = [judge(code, text, case) for code, text in zip(codes, texts)]
            end = next((end for end in ends if end not in ("ok", "refused")), "ok" if "ok" in ends else "refused")
            if end == "ok" and case.check:
                wrong = case.check("".join(texts))
                end = f"silent loss: {wrong}" if wrong else end
            left = [path.name for path in work.rglob("*.tmp")]
            if left and end in ("ok", "refused"):
                end = f"half-written: {left[0]}"
            return end, "\n".join(texts)
        except Exception as error:  # of the preparation or of the check itself
            return f"silent loss: {type(error).__name__}: {str(error)[:100]}", ""
        finally:
            os.chdir(ROOT)


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
