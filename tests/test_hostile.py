"""A short form of benchmarks.hostile: some inputs of every kind, each in a process of its own."""

from benchmarks import hostile
from benchmarks.hostile_kinds import KINDS, draw_case


def test_hostile_inputs_end_well_or_in_one_line(capfd):
    ended = hostile.main(["--inputs", "60", "--seed", "1", "--jobs", "2"])
    assert ended == 0, capfd.readouterr().out


def test_the_same_seed_draws_the_same_inputs():
    for number in range(200):
        one, other = (draw_case(number, 3)[0] for _ in range(2))
        assert (one.kind, one.script, one.argv) == (other.kind, other.script, other.argv)
        assert one.kind in KINDS
