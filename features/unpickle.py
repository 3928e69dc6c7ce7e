"""Read a pickle without running anything in it.

Feature files come from strangers, and a pickle may name any function for its reader to call, with any arguments. Here every name stands for
an inert record, which only keeps what it was given. When the whole pickle is read, the records are checked once. Only then are tensors,
arrays and rows made from their bytes. No constructor of a library ever sees what the file holds.

opcodes.py checks the pickle before it is read, inert.py reads it, and rebuild.py makes the values that records stand for.
"""

import io
import mmap
from itertools import chain

from features.inert import DTYPES, Record, read_records
from features.opcodes import RefusedPickle, check_opcodes
from features.rebuild import REBUILD

__all__ = ["RefusedPickle", "read_pickle"]
MAX_DEPTH = 50  # containers inside one another
ATOMS = {str, int, float, bool, type(None), bytes}
# Content may be this many times the file's size when what is referred to several times counts several times. Texts count per 64 bytes.
REPEATS, SPARE = 16, 100_000


def read_pickle(file):
    """Read one pickle. Nothing in it is run, and memory stays in proportion to the file's size.

    Args:
        file: open binary file, at the start of the pickle.

    Returns:
        Plain containers, texts, numbers, tensors and numpy arrays. Rows of pandas become dicts, arrays of objects become lists.

    Raises:
        RefusedPickle: the pickle asks for something a feature file has no use for; the message names it.
        pickle.UnpicklingError, EOFError and others: it is damaged.
    """
    try:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (io.UnsupportedOperation, ValueError):  # not a file of the system, or an empty one
        data = file.read()
        file = io.BytesIO(data)
    _, longest = check_opcodes(data)
    builder = _Builder(len(data), longest)
    if isinstance(data, mmap.mmap):
        data.close()
    return builder.build(read_records(file))


class _Builder:
    """Turns what was read into plain values, each object once."""

    def __init__(self, size, longest):
        self.budget = REPEATS * size + SPARE
        self.long_texts = longest > 1000
        self.depth = self.height = 0  # containers around the current value, and inside the last one made
        self.done = {}  # id of an object -> (its plain value, its share of the budget, its height); None while it is being made

    def spend(self, amount):
        """Count content, so that a small file cannot refer to the same content again and again."""
        self.budget -= amount
        if self.budget < 0:
            raise RefusedPickle("far more content than its size can hold")

    def build(self, value):
        """Make a plain value of what was read."""
        kind = type(value)
        if kind in ATOMS or kind is bytearray:
            self.spend(1 + (len(value) >> 6) if kind in (str, bytes, bytearray) else 1)
            self.height = 0
            return value
        key = id(value)
        if key not in self.done:
            if self.depth > MAX_DEPTH:
                raise RefusedPickle(f"more than {MAX_DEPTH} containers inside one another")
            self.done[key] = None
            before = self.budget
            self.spend(1)
            self.depth += 1
            result, height = self._build_new(value, kind)
            self.depth -= 1
            self.height = height
            self.done[key] = result, before - self.budget, height
            return result
        if self.done[key] is None:
            raise RefusedPickle("a container inside itself")
        result, amount, self.height = self.done[key]
        self.spend(amount)
        if self.depth + self.height > MAX_DEPTH:
            raise RefusedPickle(f"more than {MAX_DEPTH} containers inside one another")
        return result

    def _build_new(self, value, kind):
        """Make a plain value of a container or a record. Returns it, and how many containers it holds inside one another."""
        names_a_class = kind is type
        if isinstance(value, Record):
            self.height = 0
            return REBUILD[value.name](self, value), self.height + 1
        if kind in (list, tuple):
            if kind is list and self._is_plain(value):
                return value, 2
            items, height = self._build_all(value)
            return kind(items), height
        if kind is dict and self.are_atoms(value):
            items, height = self._build_all(value.values())
            return dict(zip(value, items)), height
        if kind is set and self.are_atoms(value):
            return value, 1
        if names_a_class and value.module == "torch" and value.name in DTYPES:
            import torch

            return getattr(torch, value.name), 0
        if names_a_class and value.name == "NA":  # a missing value of pandas
            return None, 0
        raise RefusedPickle(f"{value.origin} where a value belongs" if names_a_class else f"a {kind.__name__} with keys of other types")

    def _build_all(self, values):
        height, built = 0, []
        for value in values:
            built.append(self.build(value))
            height = max(height, self.height)
        return built, height + 1

    def are_atoms(self, values):
        """Say whether all values (of a dict: its keys) are texts, numbers, bytes or None, and count them."""
        self.spend(len(values))
        if not set(map(type, values)) <= ATOMS:
            return False
        self._spend_texts(values)
        return True

    def _spend_texts(self, values):
        if self.long_texts:
            self.spend(sum(len(value) >> 6 for value in values if isinstance(value, (str, bytes))))

    def _is_plain(self, items):
        """Say whether a list holds atoms only, or dicts of atoms. Nearly every list of captions does, and stays as it is."""
        kinds = set(map(type, items))
        if kinds != {dict}:
            return self.are_atoms(items) if kinds <= ATOMS else False
        self.spend(len(items) + 2 * sum(map(len, items)))
        kinds = set(map(type, set().union(*items))) | set(map(type, chain.from_iterable(map(dict.values, items))))
        if not kinds <= ATOMS:
            return False
        self._spend_texts(chain.from_iterable(chain(item, item.values()) for item in items) if self.long_texts else ())
        return True
