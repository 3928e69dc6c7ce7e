"""Records by columns, and captions by image: what comes out is what was put in, in a few bytes per row."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from evaluation.by_image import ByImage, ImageIndex, OfEveryImage
from evaluation.truth import load_pictures
from features.image_ids import HALF_PAIR, id_key
from features.record_table import Record, RecordTable
from features.records import RecordCaptions, check_images, merge_records
from features.shards import TarPicture
from features.store import save_features

ROWS = 20_000
TEXT = st.text(st.characters(exclude_categories=()), max_size=9)
IMAGES = st.one_of(
    TEXT, TEXT.map(Path), st.binary(max_size=9), st.tuples(TEXT, st.integers()), st.integers(), st.just(()),
    st.builds(TarPicture, TEXT, st.integers(0, 2**70), st.integers(0, 2**40), TEXT),
)  # fmt: skip
CAPTIONS = st.fixed_dictionaries({"caption": TEXT}, optional={"id": st.integers(), "domain": TEXT})
RECORDS = st.builds(Record, st.one_of(TEXT, st.integers()), IMAGES, st.lists(CAPTIONS, max_size=3))


def make_record(number):
    return Record(f"{number:09d}", TarPicture("a.tar", number * 512, 500, "stamp"), [{"caption": f"picture {number} is one of many"}])


@given(st.lists(RECORDS, max_size=9))
def test_records_come_out_of_a_table_as_they_were_put_in(records):
    table = RecordTable(records)
    assert list(table) == records
    assert [type(record.image) for record in table] == [type(record.image) for record in records]
    assert list(table.image_ids) == [record.image_id for record in records]
    assert list(table.paths()) == [(n, one.image) for n, one in enumerate(records) if isinstance(one.image, (str, Path))]
    assert table.caption_counts().tolist() == [len(record.captions) for record in records]
    texts = [caption["caption"] for record in records for caption in record.captions]
    assert table.is_clean == all(text.strip() and not HALF_PAIR.search(text) for text in texts)


def test_a_table_is_merged_as_a_list_is():
    records = [make_record(number) for number in range(5)]
    assert merge_records(RecordTable(records)).records is not None
    odd = [*records, records[2]._replace(captions=[{"caption": "another"}, {"caption": " "}])]
    odd.append(records[4]._replace(image_id="x", captions=[]))
    one, other = merge_records(odd), merge_records(RecordTable(odd))
    assert list(one.records) == list(other.records) and one[1:] == other[1:] == (1, 1, 0)
    assert [caption["caption"] for caption in one.records[2].captions] == ["picture 2 is one of many", "another"]
    with pytest.raises(UserError, match="image_id 000000001 stands for two pictures"):
        merge_records(RecordTable([*records, records[3]._replace(image_id="000000001")]))


def test_captions_are_made_from_a_table_with_their_own_keys():
    first, last = Record(7, "d/a.jpg", [{"id": 3, "caption": "one"}]), Record(8, b"x", [{"caption": "z", "image_id": "own"}])
    table = RecordTable([first, make_record(1), last])
    captions = RecordCaptions(table, np.array([0, 2]))
    assert list(captions) == [
        {"image_id": 7, "file_name": "a.jpg", "id": 3, "caption": "one", "clip_embedding": 0},
        {"image_id": "own", "caption": "z", "clip_embedding": 1, "id": 1},
    ]
    assert list(captions.image_ids()) == [7, "own"]
    with pytest.raises(UserError, match=r"found 2 of 3; d/a\.jpg"):
        check_images(table, 0)


@given(st.lists(st.sampled_from(["a.jpg", "b.jpg", "coco_42", 42, "é", "\ud800", "x/y", "x\\y"])))
def test_an_index_finds_the_captions_that_a_dict_would(image_ids):
    expected = {}
    for number, image_id in enumerate(image_ids):
        expected.setdefault(id_key(image_id), []).append(number)
    index = ImageIndex(image_ids)
    found = OfEveryImage(index, list)
    assert dict(found) == expected and list(found) == list(expected) and len(found) == len(expected)
    assert "none" not in found and found.get("none") is None and found.get(None) is None
    some = ByImage(index, lambda numbers: numbers if len(numbers) > 1 else None)
    assert dict(some.items()) == {key: numbers for key, numbers in expected.items() if len(numbers) > 1}
    assert len(some) == len(dict(some)) and not any(key in some for key, numbers in expected.items() if len(numbers) == 1)


def traced(function):
    """Call a function. Returns what it returned, and the peak of traced bytes per row."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1] / ROWS
    finally:
        tracemalloc.stop()


def test_a_record_takes_200_bytes_and_an_image_that_is_not_scored_300(tmp_path):
    table, of_record = traced(lambda: RecordTable(map(make_record, range(ROWS))))
    assert of_record < 200, of_record  # 900 as Python objects
    merged, of_merging = traced(lambda: merge_records(table))
    assert merged.records is table and of_merging < 100, of_merging
    captions = [{"image_id": f"{row:09d}", "caption": f"picture {row}", "clip_embedding": row} for row in range(ROWS)]
    save_features(tmp_path / "folder", torch.zeros(ROWS, 2), captions, {"encoder": "ViT-B/32"})
    load_pictures(tmp_path / "folder")  # what is imported is not counted
    pictures, of_image = traced(lambda: load_pictures(tmp_path / "folder"))
    assert of_image < 300, of_image  # 1,200 as dicts
    assert all(f"{row:09d}" in pictures.rows for row in range(ROWS))
    assert pictures.references.captions["000000077"] == ["picture 77"] and pictures.rows["000000077"] == 77
    assert pictures.ids["000000077"] == "000000077" and "000000077" not in pictures.references.file_names
