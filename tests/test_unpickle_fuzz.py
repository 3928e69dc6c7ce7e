"""Pickles made up from the admitted names, and real ones with changed bytes, never crash the reader."""

import pickle
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.errors import NonInteractiveExampleWarning
from test_unpickle import ROW, SMALL, attack, bytes_of, call, dtype, in_child, name, number, storage, text

from features.inert import ADMITTED

pytestmark = pytest.mark.filterwarnings("ignore")


@st.composite
def streams(draw):
    """Opcodes that call the admitted names with arguments of every kind, mostly in a valid order."""
    names = [name(module, what) for module, names in ADMITTED.items() for what in names]
    kinds = ["f4", "O8", "V8", "U3", "S2", "b1", "f9", "i4"]
    leaf = st.one_of(
        st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", SMALL and storage(SMALL), b"G" + struct.pack(">d", 1e300)]),
        st.sampled_from([-1, 0, 1, 2, 8, 2**31, 2**62]).map(number),
        st.sampled_from(["<", "|", "O", "latin1", "_mgr", "data", "_pa_array", "large_string", "start", "C", *kinds]).map(text),
        st.binary(max_size=20).map(bytes_of), st.sampled_from(names), st.sampled_from(kinds).map(dtype),
        st.integers(0, 5).map(lambda entry: b"h" + bytes([entry])),
    )  # fmt: skip

    def grow(inner):
        parts = st.lists(inner, max_size=6).map(b"".join)
        return st.one_of(
            st.tuples(st.sampled_from(names), st.lists(inner, max_size=5)).map(lambda pair: call(pair[0], *pair[1]) + b"\x94"),
            st.tuples(st.sampled_from(names), inner).map(lambda pair: pair[0] + b")\x81" + pair[1] + b"b"),
            parts.map(lambda content: b"(" + content + b"t"), parts.map(lambda content: b"](" + content + b"e"),
            st.lists(st.tuples(leaf, inner), max_size=4).map(lambda pairs: b"}(" + b"".join(map(b"".join, pairs)) + b"u\x94"),
            st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1] + b"b"),
        )  # fmt: skip

    return b"\x80\x04" + draw(st.recursive(leaf, grow, max_leaves=25)) + b"."


def real_files():
    rows = [{"image_id": i, "caption": "a dog", "id": i, "clip_embedding": i % 2} for i in range(3)]
    numbers = np.ones((2, 4), "f4")
    frame = pd.DataFrame({"file_name": ["a", "b"], "caption_1": ["x", "y"]})
    contents = [
        {"clip_embedding": torch.ones(2, 4), "captions": rows}, {"clip_embedding": numbers, "captions": [frame.iloc[0], frame.iloc[1]]},
        [("a.jpg", numbers[0], "x"), ("b.jpg", numbers[1], "y")], {"clip_embedding": numbers, "captions": [pd.Series(ROW)]},
    ]  # fmt: skip
    return [pickle.dumps(content, protocol) for content in contents for protocol in (2, 4, 5)]


def mutated(count, seed=0):
    """Real files with a few bytes changed, inserted or cut out."""
    draw = np.random.default_rng(seed)
    files = real_files()
    for which in range(count):
        content = bytearray(files[which % len(files)])
        for _ in range(draw.integers(1, 5)):
            place, width = int(draw.integers(len(content))), int(draw.integers(0, 3))
            content[place : place + width] = draw.integers(0, 256, int(draw.integers(0, 3)), dtype=np.uint8).tobytes()
        yield bytes(content)


def generated(count):
    import warnings

    strategy = streams()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonInteractiveExampleWarning)
        return [strategy.example() for _ in range(count)]


def test_made_up_and_mutated_pickles_never_crash_the_reader():
    cases = [*generated(100), *mutated(400)]
    lines = in_child(attack, cases, seconds=60)
    assert max(float(line.split()[0]) for line in lines) < 1
    assert max(float(line.split()[1]) for line in lines) < 200
    assert not [line for line in lines if "several lines" in line]
