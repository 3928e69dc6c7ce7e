"""Rows of a Hugging Face data set as Records whose pictures or sounds are read when they are encoded, not before.

lazy_records(data, …)        of a Dataset: a picture stays in the data set's own files until a loader worker asks for it
fetched_records(data, …)     of a streamed IterableDataset: one pass puts each picture into a file, from which extract goes on

A cell is what the library gives undecoded (Image(decode=False)): a dict with bytes and path, bytes, or a path.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from common import UserError
from features.extract import Record
from features.own_data import texts_of


def content_of(cell, folder):
    """A picture's or sound's cell → its bytes, or a path; relative paths count from `folder`, unless that is None.

    Raises ValueError when there is nothing in it.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return cell if folder is None or "://" in cell else str(Path(folder) / cell)
    if isinstance(cell, (bytes, bytearray)) and cell:
        return bytes(cell)
    raise ValueError("nothing in this row")


class Column:
    """The pictures or sounds of a Dataset."""

    def __init__(self, data, name, folder):
        """data: datasets.Dataset; name: of the column; folder: where relative paths count from, or None."""
        self.data, self.name, self.folder = data.select_columns([name]), name, folder
        self.key = self.data._fingerprint


class LazyItem(NamedTuple):
    """One picture or sound of a Column."""

    column: Column
    row: int

    @property
    def key(self):
        """Stands for the content."""
        return f"{self.column.key} {self.row}"

    def read(self):
        """→ bytes or path. Raises ValueError when the row holds neither."""
        content = content_of(self.column.data[self.row][self.column.name], self.column.folder)
        if isinstance(content, str) and "://" in content:
            raise ValueError(f"an address, {content}, not a picture: --streaming fetches it")
        return content


class FetchedItem(NamedTuple):
    """One picture or sound that fetched_records put into a file."""

    path: str
    size: int  # bytes; 0: there was nothing in the row

    @property
    def key(self):
        """Stands for the content."""
        return f"{self.path} {self.size}"

    def read(self):
        """→ the path. Raises ValueError when there was nothing in the row."""
        if not self.size:
            raise ValueError("nothing in this row")
        return self.path


def lazy_records(data, column, captions, id_column, folder):
    """Dataset → list of Records. column: pictures or sounds; captions: names of columns; id_column: what rows of one image share, or None.

    Raises UserError when a caption is no text.
    """
    items = Column(data, column, folder)
    texts = data.select_columns([*captions, *([id_column] if id_column else [])])  # so that no picture is read here
    return _joined((LazyItem(items, number), *_id_and_texts(row, number, captions, id_column)) for number, row in enumerate(texts))


def fetched_records(data, column, captions, id_column, folder, place, run):
    """IterableDataset → list of Records, its pictures in files in `place`; other arguments as those of lazy_records.

    run: dict of plain values that says which rows these are; what a stopped run with the same has fetched is not fetched again.
    Raises UserError when the stream breaks off, and when a caption is no text.
    """
    import httpx

    listed = place / "rows.jsonl"
    lines = listed.read_text(encoding="utf-8").split("\n")[:-1] if listed.is_file() else []  # the last may be half-written
    if lines[:1] != [json.dumps(run)]:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        lines = [json.dumps(run)]
    listed.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    finished = lines[-1] == "finished"
    done = len(lines) - 1 - finished
    with open(listed, "a", encoding="utf-8") as file:
        try:
            for row in () if finished else data.skip(done):
                described = _id_and_texts(row, done, captions, id_column)
                size = _item_path(place, done).write_bytes(_fetch(row[column], folder))
                file.write(json.dumps([size, *described]) + "\n")
                file.flush()
                done += 1
        except (httpx.HTTPError, OSError) as error:
            raise UserError(f"the stream broke off after {done} rows ({error}). Run the same command again: it goes on there.") from error
        file.write("" if finished else "finished\n")
    return _joined(_fetched_items(listed, place))


def _item_path(place, number):
    return place / f"{number:09d}"


def _fetched_items(listed, place):
    """rows.jsonl → (FetchedItem, image_id, texts) a row."""
    with open(listed, encoding="utf-8") as file:
        for number, line in enumerate(file, -1):  # the first line says which run this is
            if number >= 0 and line != "finished\n":
                size, image_id, texts = json.loads(line)
                yield FetchedItem(str(_item_path(place, number)), size), image_id, texts


def _fetch(cell, folder):
    """A streamed cell → bytes; none when there is nothing in it, or its file is missing."""
    from datasets.utils.file_utils import xopen

    try:
        content = content_of(cell, folder)
        if isinstance(content, str):
            with xopen(content, "rb") as file:
                content = file.read()
    except (ValueError, FileNotFoundError):
        return b""
    return content


def _id_and_texts(row, number, captions, id_column):
    """A row → image_id (an int or a str) and its list of captions."""
    try:
        texts = [text for name in captions for text in texts_of(row[name])]
    except ValueError as error:
        raise UserError(f"row {number} has a caption that is {error}; expected a text or a list of texts. Take another column.") from error
    image_id = row[id_column] if id_column else number
    if image_id is None:
        image_id = f"row {number}"
    return image_id if isinstance(image_id, int) else str(image_id), texts


def _joined(rows):
    """(item, image_id, texts) a row → list of Records, one an image_id, with the item of its first row."""
    records = {}
    for item, image_id, texts in rows:
        records.setdefault(image_id, Record(image_id, item, [])).captions.extend({"caption": text} for text in texts)
    return list(records.values())
