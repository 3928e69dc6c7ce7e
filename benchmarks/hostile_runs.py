"""Run one hostile input, and say how it ended; see benchmarks.hostile."""

import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.hostile_world import ROOT, place_of_output

GOOD = ("ok", "refused")


def judge(code, said, case):
    """Say how a run ended: "ok", "refused" or what is wrong with it."""
    lines = [line for line in said.splitlines() if line.strip()]
    if isinstance(code, str):
        return code
    if code < 0 or "Fatal Python error" in said:
        return f"crash: signal {-code}"
    if "Traceback (most recent call last)" in said:
        return f"traceback: {last_frame(said)}{lines[-1][:160]}"
    if code == 2:
        errors = sum(": error: " in line for line in lines)
        if errors == 1 and case.must_succeed:
            return f"refused, though it is proper: {lines[-1][:160]}"
        return "refused" if errors == 1 and ": error: " in lines[-1] else f"{errors} lines of error, or more behind them"
    return "ok" if code == 0 or code == 1 and case.script.startswith("check.py") else f"exit code {code}"


def last_frame(said):
    """Name the innermost place in the project that a traceback passes."""
    ours = os.path.join(os.path.realpath(sys.path[0] or ROOT), "")
    frames = [frame for frame in re.findall(r'File "(.+?)", line (\d+)', said) if os.path.realpath(frame[0]).startswith(ours)]
    frames = [frame for frame in frames if not {".venv", "benchmarks"} & set(Path(frame[0]).parts)]
    return f"{os.path.relpath(frames[-1][0], sys.path[0] or ROOT)}:{frames[-1][1]} " if frames else ""


def look_around(folder, work):
    """Map every file of a folder, named as seen from `work`, to what changes when it is written or replaced."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
            path = os.path.join(parent, name)
            of_file = os.lstat(path)
            written = (of_file.st_size, of_file.st_mtime_ns) if stat.S_ISREG(of_file.st_mode) else ()
            if not name.startswith(("stdout", "stderr")):
                found[os.path.relpath(path, work)] = (of_file.st_mode, of_file.st_ino, *written)
    return found


def find_damage(before, after, case, end):
    """Say which files a run lost, changed or left half-written; None where there are none."""
    named = [] if end == "refused" else [word.rstrip("/") for word in case.argv if word and "\0" not in word]
    named += [place_of_output(case.argv)] if named and place_of_output(case.argv) else []
    named += [os.path.relpath(os.path.realpath(word)) for word in named if os.path.islink(word)]
    changed = [path for path, state in before.items() if after.get(path) != state]
    for path in changed:
        # A file that the command line names may be an output; so may what lies beside it under its stem.
        if not any(path == word or path.startswith((word + "/", os.path.splitext(word)[0])) for word in named):
            return f"{'changed' if path in after else 'lost'}: {path}, though it ended {end}"
    new = sorted(after.keys() - before.keys())
    left = next((path for path in new if path.endswith(".tmp") or ".tmp/" in path or os.path.basename(path) == "owned"), None)
    if left:
        return f"left: {left}"
    outputs = [path for path in new if end == "refused" and path in ("new.pkl", "new_train.pkl", "said.json", "scores.json", "page.html")]
    return f"wrote {outputs[0]}, though it ended refused" if outputs else None


def run_case(case, world, draw, server):
    """Run one input in a folder of its own.

    Args:
        case: benchmarks.hostile_kinds.Case.
        world: folder of the valid inputs.
        draw: random.Random, for the signal of an interrupted run.
        server: benchmarks.hostile_server.Server.

    Returns:
        How it ended, and what it printed on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="hostile_") as folder:
        work = Path(folder, "a", "b")
        shutil.copytree(world, work, symlinks=True, ignore=shutil.ignore_patterns("gpt2", "weights"))
        (work / "data").mkdir(exist_ok=True)
        (work / "data" / "weights").symlink_to(world / "data" / "weights")
        (work / "gpt2").symlink_to(world / "gpt2")
        os.chdir(work)
        try:
            if case.prepare:
                case.prepare(case)
            texts, ends = [], []
            before = look_around(folder, work)
            if case.interrupt:
                sent = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
                code = server.run(case, [9], case.interrupt, sent)[0]
                texts.append(Path("../stderr9").read_text("utf-8", "replace"))
                ends.append("ok" if code in (-sent, 128 + sent) else judge(code, texts[0], case))
            codes = server.run(case, range(case.twins))
            texts += [Path(f"../stderr{number}").read_text("utf-8", "replace") for number in range(case.twins)]
            ends += [judge(code, text, case) for code, text in zip(codes, texts[-case.twins :])]
            end = next((end for end in ends if end not in GOOD), "ok" if "ok" in ends else "refused")
            after = look_around(folder, work)
            said = "\n".join(texts)
            if end in GOOD:
                end = find_damage(before, after, case, end) or end
            for wrong in (case.kept and case.kept(said), end == "ok" and case.check and case.check(said)):
                end = f"{'silent loss' if end == 'ok' else 'damage'}: {wrong}" if wrong and end in GOOD else end
            return end, said
        except Exception as error:  # of the preparation or of the check itself
            return f"the harness: {type(error).__name__}: {str(error)[:100]}", traceback.format_exc()
        finally:
            os.chdir(ROOT)
