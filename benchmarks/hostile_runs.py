"""Run one hostile input in a process of its own, and say how it ended; see benchmarks.hostile."""

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.hostile_kinds import load_script

ROOT = Path(__file__).resolve().parent.parent
SECONDS, GIGABYTES = 30, 2.0  # what an input may take beside the libraries


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
