"""Run one hostile input in a process of its own, and say how it ended; see benchmarks.hostile."""

import faulthandler
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.hostile_world import ROOT, load_script, place_of_output

SECONDS = 30
SPACE = 8 * 2**30  # what a process may map besides what it has at its start; torch aborts where it cannot start a thread
GOOD = ("ok", "refused")


def start(case, number):
    """Fork a process that runs the script. Returns its process id; what it prints goes to files."""
    child = os.fork()
    if child:
        return child
    code = 71
    try:
        os.setsid()
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        for limit, most in ((resource.RLIMIT_FSIZE, 2**28), (resource.RLIMIT_AS, mapped + SPACE), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (most, most))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"../{stream}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
            errors = "strict" if stream == "stdout" else "backslashreplace"
            setattr(sys, stream, open(descriptor, "w", encoding=case.encoding, errors=errors))
        faulthandler.enable(2)
        os.environ.update(case.environment)
        tempfile.tempdir = None
        sys.argv = [case.script.split()[0], *case.argv]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_main(case)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_main(case):
    """Run the script's main. Returns its exit code, as Python would end with it."""
    try:
        return load_script(case.script).main(case.argv) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 70


def wait(child, case, interrupt=0.0, with_signal=signal.SIGTERM):
    """Wait for a process. Returns its exit code (negative for a signal), "hang" or "out of memory"."""
    began, sent, most = time.monotonic(), False, resident(os.getpid()) + case.megabytes * 2**20
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - began
            fault = f"hang: {SECONDS} s" if passed > SECONDS else "out of memory" if resident(child) > most else None
            if fault:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return fault
            if interrupt and passed > interrupt and not sent:
                os.kill(child, with_signal)
                sent = True
            time.sleep(0.003)
    finally:
        try:
            os.killpg(child, signal.SIGKILL)  # workers that it left
        except ProcessLookupError:
            pass


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
                case.prepare(case)
            texts, ends = [], []
            before = look_around(folder, work)
            if case.interrupt:
                sent = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
                code = wait(start(case, 9), case, case.interrupt, sent)
                texts.append(Path("../stderr9").read_text("utf-8", "replace"))
                ends.append("ok" if code in (-sent, 128 + sent) else judge(code, texts[0], case))
            children = [start(case, number) for number in range(case.twins)]
            codes = [wait(child, case) for child in children]
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
