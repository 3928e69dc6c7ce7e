"""Rows of a Hugging Face data set as Records whose pictures or sounds are read when they are encoded, not before.

lazy_records(data, ...)        of a Dataset: a picture stays in the data set's own files until a loader worker asks for it
fetched_records(data, ...)     of a streamed IterableDataset: one pass puts each picture into a file, where extract reads it

A cell is what the library gives undecoded (Image(decode=False)): a dict with bytes and path, bytes, or a path.
"""

import json
from pathlib import Path
from typing import NamedTuple

from common import UserError, remove_own_files
from features.pieces import file_stamp
from features.processes import current
from features.record_table import Record
from features.tables import texts_of


def content_of(cell, folder):
    """Return the bytes or the path in a cell; relative paths count from `folder`, unless that is None.

    Raises:
        ValueError: there is nothing in it.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return cell if folder is None or "://" in cell else str(Path(folder) / cell)
    if isinstance(cell, (bytes, bytearray)) and cell:
        return bytes(cell)
    raise ValueError("nothing in this row")


ROWS_VERSION = 2  # of the lines of rows.jsonl: [size, image_id, captions, state of the local file or ""]


class Column:
    """The pictures or sounds of a Dataset."""

    def __init__(self, data, name, folder):
        """Take the datasets.Dataset, the column's name, and the folder that relative paths count from, or None."""
        self.data, self.name, self.folder = data.select_columns([name]), name, folder
        self._key, self._paths = self.data._fingerprint, self._find_paths()

    def _find_paths(self):
        """Find the rows that hold a path in place of a picture's bytes. Returns dict of row to path; reads no picture."""
        import pyarrow
        import pyarrow.compute as pc

        paths, start = {}, 0
        for batch in self.data.with_format("arrow").iter(1000):
            cells = batch[self.name].combine_chunks()
            if pyarrow.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
                without = pc.is_null(pc.struct_field(cells, "bytes"))
                cells = pc.if_else(without, pc.struct_field(cells, "path"), None)
            if pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
                paths.update((start + row, path) for row, path in enumerate(cells.to_pylist()) if path)
            start += len(cells)
        return paths

    def key_of(self, row):
        """Return what stands for a row's content: of a file its size and time of change too."""
        key = f"{self._key} {row}"
        return f"{key} {file_stamp(content_of(self._paths[row], self.folder))}" if row in self._paths else key


class LazyItem(NamedTuple):
    """One picture or sound of a Column."""

    column: Column
    row: int

    @property
    def key(self):
        """What stands for the content."""
        return self.column.key_of(self.row)

    def read(self):
        """Return bytes or a path. Raises ValueError when the row holds neither."""
        content = content_of(self.column.data[self.row][self.column.name], self.column.folder)
        if isinstance(content, str) and "://" in content:
            raise ValueError(f"an address, {content}, not a picture: --streaming downloads it")
        return content


class FetchedItem(NamedTuple):
    """One picture or sound that fetched_records put into a file."""

    path: str
    size: int  # bytes; 0: there was nothing in the row

    @property
    def key(self):
        """What stands for the content."""
        return file_stamp(self.path)

    def read(self):
        """Return the path. Raises ValueError when there was nothing in the row."""
        if not self.size:
            raise ValueError("nothing in this row")
        return self.path


def lazy_records(data, column, captions, id_column, folder):
    """Make Records of a Dataset.

    Args:
        data: datasets.Dataset.
        column: name of the column of pictures or sounds.
        captions: names of the caption columns.
        id_column: name of the column that rows of one image share, or None.
        folder: folder that relative paths count from, or None.

    Returns:
        List of Record.

    Raises:
        UserError: a caption is not a text.
    """
    items = Column(data, column, folder)
    texts = data.select_columns([*captions, *([id_column] if id_column else [])])  # so that no picture is read here
    return _joined((LazyItem(items, number), *_id_and_texts(row, number, captions, id_column)) for number, row in enumerate(texts))


def fetched_records(data, column, captions, id_column, folder, place, run):
    """Make Records of an IterableDataset, with its pictures in files in `place`.

    Args:
        data, column, captions, id_column, folder: as those of lazy_records.
        place: folder of the files.
        run: dict of plain values that says which rows these are; what an interrupted run with the same values has downloaded is not
            downloaded again.

    Returns:
        List of Record.

    Raises:
        UserError: the stream breaks off, or a caption is not a text.
    """
    listed = current().first_does(_download_rows, data, column, captions, id_column, folder, place, run)
    return _joined(_fetched_items(listed, place))


def _download_rows(data, column, captions, id_column, folder, place, run):
    """Put the pictures of an IterableDataset into files, as fetched_records says. Returns the path of rows.jsonl as str."""
    import httpx2  # which huggingface_hub downloads with

    listed, run = place / "rows.jsonl", {**run, "version": ROWS_VERSION}
    lines = listed.read_text(encoding="utf-8").split("\n")[:-1] if listed.is_file() else []  # the last may be half-written
    if lines[:1] != [json.dumps(run)]:
        remove_rows(place)
        place.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(run)]
    lines = lines[: _first_changed(lines)]
    listed.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    finished = lines[-1] == "finished"
    done = len(lines) - 1 - finished
    with open(listed, "a", encoding="utf-8") as file:
        try:
            for row in () if finished else data.skip(done):
                described = _id_and_texts(row, done, captions, id_column)
                size = _item_path(place, done).write_bytes(_fetch(row[column], folder))
                file.write(json.dumps([size, *described, _stamp(row[column], folder)]) + "\n")
                file.flush()
                done += 1
        except (httpx2.HTTPError, OSError) as error:
            raise UserError(f"the stream broke off after {done} rows ({error}). Run the same command again to resume there.") from error
        file.write("" if finished else "finished\n")
    return str(listed)


def _item_path(place, number):
    return place / f"{number:09d}"


def remove_rows(place):
    """Remove what fetched_records wrote into a folder."""
    remove_own_files(place, [*(path for path in place.glob("[0-9]" * 9) if path.is_file()), place / "rows.jsonl"])


def _fetched_items(listed, place):
    """Yield (FetchedItem, image_id, texts) for each row in rows.jsonl."""
    with open(listed, encoding="utf-8") as file:
        for number, line in enumerate(file, -1):  # the first line says which run this is
            if number >= 0 and line != "finished\n":
                size, image_id, texts, _ = json.loads(line)
                yield FetchedItem(str(_item_path(place, number)), size), image_id, texts


def _stamp(cell, folder):
    """Return the state of the local file that a cell names; "" for anything else."""
    try:
        content = content_of(cell, folder)
    except ValueError:
        return ""
    return file_stamp(content) if isinstance(content, str) and "://" not in content else ""


def _first_changed(lines):
    """Return the number of the first line of rows.jsonl whose local file has changed since; that of all lines where none has."""
    for number, line in enumerate(lines):
        if number and line != "finished":
            stamp = json.loads(line)[3]
            if stamp and file_stamp(stamp.partition("\0")[0]) != stamp:
                return number
    return len(lines)


def _fetch(cell, folder):
    """Return the bytes of a streamed cell; b"" when there is nothing in it, or its file is missing."""
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
    """Return a row's image_id (an int or a str) and its list of captions."""
    try:
        texts = [text for name in captions for text in texts_of(row[name])]
    except ValueError as error:
        raise UserError(f"row {number} has a caption that is {error}; expected a text or a list of texts. Use another column.") from error
    image_id = row[id_column] if id_column else number
    if image_id is None:
        image_id = f"row {number}"
    return image_id if isinstance(image_id, int) else str(image_id), texts


def _joined(rows):
    """Make one Record per image_id of (item, image_id, texts) rows, with the item of its first row."""
    records = {}
    for item, image_id, texts in rows:
        records.setdefault(image_id, Record(image_id, item, [])).captions.extend({"caption": text} for text in texts)
    return list(records.values())
