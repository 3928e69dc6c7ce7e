"""Files of captions: what predict.py writes, evaluate.py reads, whatever the captions are made of."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evaluation.references import read_predictions
from prediction.captions import SUFFIXES, write_captions

texts = st.one_of(st.text(max_size=8), st.text("\0\r\n\t\",;|'\x0b\x0c\x1a\x1c\x85\u2028\u2029\ufeff a=", max_size=8))


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(texts, min_size=1, max_size=4), name=texts)
@example(captions=["a\0b"], name="one.jpg")
def test_captions_of_any_characters_are_read_again(workdir, suffix, captions, name):
    rows = [[(text, -1.0)] for text in captions]
    write_captions(f"captions{suffix}", list(range(len(rows))), [f"x{name}"] * len(rows), ["model"], [rows])
    found = [one.captions for one in read_predictions(f"captions{suffix}").values()]
    if suffix == ".csv":  # where space around a caption is no part of it
        found, captions = [[text.strip() for text in one] for one in found], [text.replace("\0", "\ufffd").strip() for text in captions]
    assert found == [[text] for text in captions]
