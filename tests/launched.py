"""Scripts under a launcher: processes with the environment that torchrun and Slurm give them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count, script, words):
    """Start a script as `count` processes. Returns them, with their output to be read."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for number in range(count)
    ]


def finish(processes):
    """Wait for processes. Returns their exit codes, what they printed, and their lines of error."""
    said = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in said], [err.splitlines() for _, err in said]


def launch(count, script, *words):
    """Run a script as `count` processes, which must succeed. Returns what the first printed; the others must print nothing."""
    codes, printed, errors = finish(start(count, script, words))
    assert codes == [0] * count, errors
    assert printed[1:] == [""] * (count - 1)
    return printed[0]
