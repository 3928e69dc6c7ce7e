"""A short form of benchmarks.hostile: inputs of the quick kinds, each in a process of its own."""

import subprocess
import sys

import pytest
from waiting import PATIENCE

from benchmarks.hostile_kinds import KINDS, draw_case
from benchmarks.hostile_runs import judge


@pytest.mark.slow
def test_hostile_inputs_end_well_or_in_one_line(root):
    """In a process of its own: it forks, which the threads of other tests do not survive."""
    command = [sys.executable, "-m", "benchmarks.hostile", "--quick", "--inputs", "60", "--seed", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_seed_draws_the_same_inputs():
    for number in range(200):
        one, other = (draw_case(number, 3)[0] for _ in range(2))
        assert (one.kind, one.script, one.argv) == (other.kind, other.script, other.argv)
        assert one.kind in KINDS


def test_every_bad_end_is_seen():
    case, line = draw_case(0, 0)[0], "train.py: error: no file"
    case.script, case.must_succeed = "train.py", False
    traceback = "Traceback (most recent call last)\nKeyError: 1"
    assert [judge(code, said, case) for code, said in ((0, ""), (2, line))] == ["ok", "refused"]
    bad = [(-11, ""), (0, traceback), (2, line + "\n" + line), (2, line + "\nmore"), (2, ""), (1, ""), ("hang", "")]
    assert not {judge(code, said, case) for code, said in bad} & {"ok", "refused"}
