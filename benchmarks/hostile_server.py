"""Run scripts for benchmarks.hostile, each in a process of its own, within hundredths of a second of being asked.

Importing torch takes seconds. So one process imports everything, runs nothing, and forks for each run. A child inherits no threads of its
parent, only their locks and half of their work. The parent must therefore stay a process of one thread, which is checked before every
fork: it is started as a new Python, and what prepares and checks the inputs is another process.

A run that crashes leaves its native stack and its Python stack on stderr.
"""

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.hostile_world import ROOT, SCRIPTS, has_script, load_script

SECONDS, LONGEST = 30, 300  # of processor time, and of the clock, since a busy machine is slow
SPACE = 8 * 2**30  # bytes that a run may map besides what it has at its start
FILE_SIZE = 2**28  # bytes of the largest file that a run may write
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
         "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg",
         "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # fmt: skip
SHARED = ("torch", "transformers.models.gpt2.modeling_gpt2", "accelerate", "pandas", "pyarrow.parquet")  # imported once, not by each run


class Server:
    """The process that forks; one for each job, since it waits for what it started."""

    def __init__(self, code=None):
        """Start it. code: folder of the project whose scripts are run (None: this one)."""
        command = [sys.executable, "-m", "benchmarks.hostile_server", *([os.path.abspath(code)] if code else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **QUIET}, text=True, **pipes)

    def run(self, case, numbers, interrupt=0.0, with_signal=signal.SIGTERM):
        """Run a case in the working folder, once for each number, all at the same time.

        Args:
            case: benchmarks.hostile_kinds.Case.
            numbers: what is printed goes to ../stdout{number} and ../stderr{number}.
            interrupt: seconds until `with_signal` is sent; 0 for no signal.

        Returns:
            List of exit codes (negative for a signal), "hang ..." or "out of memory".
        """
        more = {name: getattr(case, name) for name in ("encoding", "environment", "megabytes")}
        runs = [{"number": number, "argv": case.argv} for number in numbers]
        return self.run_all(case.script, runs, interrupt=interrupt, signal=int(with_signal), **more)

    def run_all(self, script, runs, *, encoding="utf-8", environment=None, megabytes=1000, interrupt=0.0, signal=0):
        """Run a script several times at once in the working folder.

        Args:
            runs: list of dicts with number and argv, and perhaps delay in seconds.
            encoding: of the terminal.
            environment: dict of variables to change.
            megabytes: what a run may take besides the libraries.
            interrupt: seconds until `signal` is sent; 0 for none.

        Returns:
            List of exit codes (negative for a signal), "hang ..." or "out of memory".
        """
        request = {"script": script, "runs": runs, "encoding": encoding, "environment": environment or {}, "megabytes": megabytes}
        request |= {"folder": os.getcwd(), "interrupt": interrupt, "signal": signal}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, list), answer
        return answer

    def close(self):
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def serve(code=None):
    """Answer requests, a line of JSON each, until there are no more."""
    if code:
        sys.path[:] = [code, *(path for path in sys.path if path not in ("", os.getcwd(), str(ROOT)))]
    for name in SHARED:
        __import__(name)
    for name in SCRIPTS:
        has_script(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = run_request(request)
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


def run_request(request):
    """Start what is asked for, and wait. Returns list of ends."""
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would leave all but one of them behind"
    children = [start(request, run) for run in request["runs"]]
    return [wait(child, request) for child in children]


def start(request, run):
    """Fork a process that runs the script. Returns its process id; what it prints goes to files."""
    child = os.fork()
    if child:
        return child
    code = 71
    try:
        os.setsid()
        os.chdir(request["folder"])
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        for limit, most in ((resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_AS, mapped + SPACE), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (most, most))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"../{stream}{run['number']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
            errors = "strict" if stream == "stdout" else "backslashreplace"
            setattr(sys, stream, open(descriptor, "w", encoding=request["encoding"], errors=errors))
        show_stacks_of_crashes()
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        sys.argv = [request["script"].split()[0], *run["argv"]]
        time.sleep(run.get("delay", 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_main(request["script"], run["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def show_stacks_of_crashes():
    """Write the native stack of every thread, and then Python's, to stderr when a signal ends the process."""
    import torch

    torch._C._set_print_stack_traces_on_fatal_signal(True)
    faulthandler.enable(2)


def run_main(script, argv):
    """Run the script's main. Returns its exit code, as Python would end with it."""
    try:
        return load_script(script).main(argv) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 70


def wait(child, request):
    """Wait for a process, and send it the signal asked for. Returns its exit code (negative for a signal), "hang" or "out of memory"."""
    began, sent, most = time.monotonic(), not request["interrupt"], resident(os.getpid()) + request["megabytes"] * 2**20
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - began
            hangs = passed > SECONDS and (passed > LONGEST or processor_time(child) > SECONDS)
            fault = f"hang: {passed:.0f} s" if hangs else "out of memory" if resident(child) > most else None
            if fault:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return fault
            if not sent and passed > request["interrupt"]:
                os.kill(child, request["signal"])
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


def processor_time(process):
    """Read how many seconds a process has run on a processor."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    serve(*sys.argv[1:])
