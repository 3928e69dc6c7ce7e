"""Captions of a data set of any size: a sequence that makes its dicts only when one is asked for.

A feature file's captions are a list of dicts; three million of those would take gigabytes. A feature directory's stay in compact columns,
one Arrow array of texts a part, and look like that list. C captions.
"""

import collections.abc
import json
from typing import NamedTuple

import numpy as np

from common import UserError
from features.columns import AGAIN, is_text, read_columns

BLOCK = 20_000  # texts that are Python strings at one time


class NameColumns(NamedTuple):
    """Which columns of a metadata file name pictures, each None where there is none."""

    image_id: str | None  # image_id, else image_path, else key
    file_name: str | None
    details: str | None  # what else a caption holds, a JSON object per caption

    @classmethod
    def find(cls, kinds, details):
        """Choose among columns by name and Arrow type; columns of other types are other tools' own."""
        fitting = [name for name in ("image_id", "image_path", "key") if name in kinds and _is_id(kinds[name])]
        has_path = fitting[:1] == ["image_id"] and "image_path" in fitting and is_text(kinds["image_path"])
        return cls(fitting[0] if fitting else None, "image_path" if has_path else None, "details" if details else None)

    def read(self, path):
        """Read the columns. Returns a NameColumns of Arrow arrays."""
        columns = read_columns(path, sorted({name for name in self if name}))
        return NameColumns(*(columns.get(name) for name in self))


def _is_id(kind):
    import pyarrow as pa

    return pa.types.is_integer(kind) or is_text(kind) and not pa.types.is_null(kind)


def gather_texts(path, first, more):
    """Put the captions of a metadata file in the order of its rows.

    Args:
        path: the file, for errors.
        first: Arrow array of text or null, each image's first caption.
        more: Arrow array of lists of text, its other captions, or None.

    Returns:
        Arrow string array of C texts, and int64 [C] rows.
    """
    import pyarrow as pa

    try:
        first = first.cast(pa.string())
        rows, texts = np.flatnonzero(first.is_valid().to_numpy(zero_copy_only=False)), first.drop_null()
        if more is None:
            return texts, rows
        more = more.cast(pa.list_(pa.string()))
        others = more.flatten()
        counts = np.diff(more.offsets.to_numpy()) if len(more) else np.zeros(0, np.int64)
        if others.null_count or len(others) != counts.sum():
            raise UserError(f"{path} has nulls among its more_captions; expected lists of text. {AGAIN}")
        rows = np.concatenate([rows, np.repeat(np.arange(len(first)), counts)])
        order = np.argsort(rows, kind="stable")  # an image's first caption, then its others
        return pa.concat_arrays([texts, others]).take(order), rows[order]
    except pa.ArrowException as error:  # text that is not UTF-8, above all
        raise UserError(f"{path} has captions that are not text ({' '.join(str(error).split())[:120]}). {AGAIN}") from error


class PartCaptions(collections.abc.Sequence):
    """The captions of one part of a directory: texts in memory, everything else read from its parquet file when asked for."""

    def __init__(self, path, texts, rows, shared, names):
        """Take what was read.

        Args:
            path: the metadata file.
            texts: Arrow string array [C].
            rows: int64 [C], rows of the part, ascending.
            shared: a dict that the parts of a directory share.
            names: NameColumns, which columns name pictures.
        """
        self.path, self.texts, self.rows, self._shared, self._names = path, texts, rows, shared, names

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        """Return a dict of image_id, caption and what else was stored, without the row."""
        # Of all parts, only the one looked at last is kept.
        if self._shared.get("part") is not self:
            self._shared.update(part=self, names=self._names.read(self.path))
        names, row = self._shared["names"], int(self.rows[number])
        caption = {"image_id": self._image_id(names.image_id, row)}
        if names.file_name is not None and names.file_name[row].is_valid:
            caption["file_name"] = names.file_name[row].as_py()
        caption["caption"] = self.texts[number].as_py()
        if names.details is not None and names.details[row].is_valid:
            place = number - int(np.searchsorted(self.rows, row))
            caption |= self._details(names.details[row].as_py(), place)
        return caption

    def _image_id(self, ids, row):
        return ids[row].as_py() if ids is not None and ids[row].is_valid else f"{self.path.stem}:{row}"

    def _details(self, of_image, place):
        """Read what else one caption holds."""
        try:
            details = json.loads(of_image[place])
        except (IndexError, TypeError, ValueError, RecursionError):
            details = None
        if not isinstance(details, dict) or not isinstance(details.get("image_id", ""), (str, int)):
            raise UserError(f"{self.path} has details that are not an object per caption; expected JSON as --out writes it. {AGAIN}")
        return {key: value for key, value in details.items() if key not in ("caption", "clip_embedding")}

    def texts_at(self, numbers):
        """List the texts of these captions."""
        return self.texts.take(numbers).to_pylist()

    def image_ids(self):
        """List the image_id of every caption."""
        import pyarrow as pa
        import pyarrow.compute as pc

        names = self._names.read(self.path)
        details = None if names.details is None else names.details.flatten().cast(pa.string())
        if details is not None and pc.any(pc.match_substring(details, '"image_id"')).as_py():
            return [caption["image_id"] for caption in self]  # ids that the column cannot hold
        if names.image_id is None or names.image_id.null_count:
            return [self._image_id(names.image_id, int(row)) for row in self.rows]
        return names.image_id.take(self.rows).to_pylist()


class LazyCaptions(collections.abc.Sequence):
    """Captions over several sources, perhaps some of them only, perhaps with other rows; behaves as a list of dicts.

    rows: int64 [C], the row of each caption; texts: sequence of str.
    """

    def __init__(self, sources, rows, numbers=None):
        """sources: PartCaptions or lists of dicts; numbers: int64 [C], which captions of the sources these are (None: all)."""
        self.sources, self.rows, self._numbers = sources, rows, numbers
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # counts from the end, and raises IndexError, as a list does
        wanted = number if self._numbers is None else self._numbers[number]
        source = int(np.searchsorted(self._ends, wanted, side="right"))
        local = int(wanted) - int(self._ends[source]) + len(self.sources[source])
        return {**self.sources[source][local], "clip_embedding": int(self.rows[number])}

    @property
    def texts(self):
        """The texts alone: a sequence of str; slices are lists."""
        return _Texts(self)

    def texts_between(self, start, end):
        """List the texts of captions start to end-1."""
        wanted = np.arange(start, end) if self._numbers is None else self._numbers[start:end]
        source_of = np.searchsorted(self._ends, wanted, side="right")
        found = [None] * len(wanted)
        for number in np.unique(source_of):
            source, places = self.sources[number], np.flatnonzero(source_of == number)
            local = wanted[places] - (self._ends[number] - len(source))
            texts = [source[one]["caption"] for one in local] if isinstance(source, list) else source.texts_at(local)
            for place, text in zip(places, texts):
                found[place] = text
        return found

    def image_ids(self):
        """Iterate over the image_id of every caption; one source's ids are in memory at a time."""
        start = 0
        for source, end in zip(self.sources, self._ends):
            numbers = range(start, end) if self._numbers is None else self._numbers[(self._numbers >= start) & (self._numbers < end)]
            if len(numbers):
                ids = [caption["image_id"] for caption in source] if isinstance(source, list) else source.image_ids()
                for number in numbers:
                    yield ids[number - start]
            start = end

    def select(self, numbers):
        """Select captions by number (int64, ascending). Returns LazyCaptions."""
        return LazyCaptions(self.sources, self.rows[numbers], numbers if self._numbers is None else self._numbers[numbers])

    def with_rows(self, rows):
        """Put the same captions on other rows, int64 [C]. Returns LazyCaptions."""
        return LazyCaptions(self.sources, rows, self._numbers)

    @classmethod
    def join(cls, several, starts):
        """Join lists and LazyCaptions, the rows of each moved by its number in `starts`. Returns LazyCaptions."""
        sources, rows, numbers, before = [], [], [], 0
        for captions, start in zip(several, starts):
            if isinstance(captions, list):
                captions = cls([captions], np.array([caption["clip_embedding"] for caption in captions], np.int64))
            numbers.append(before + (np.arange(len(captions)) if captions._numbers is None else captions._numbers))
            rows.append(captions.rows + start)
            sources += captions.sources
            before += sum(len(source) for source in captions.sources)
        return cls(sources, np.concatenate(rows), np.concatenate(numbers))


class _Texts(collections.abc.Sequence):
    """The texts of LazyCaptions; holds none of them itself."""

    def __init__(self, captions):
        self._captions = captions

    def __len__(self):
        return len(self._captions)

    def __getitem__(self, number):
        if isinstance(number, slice):
            start, end, step = number.indices(len(self))
            return self._captions.texts_between(start, end)[:: step or 1] if step > 0 else [self[one] for one in range(start, end, step)]
        number = range(len(self))[number]
        return self._captions.texts_between(number, number + 1)[0]

    def __iter__(self):
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]


def rows_of(captions):
    """The row of each caption, of a list of dicts or LazyCaptions (or another sequence that knows its rows): int64 [C]."""
    if hasattr(captions, "rows"):
        return captions.rows
    return np.fromiter((caption["clip_embedding"] for caption in captions), np.int64, len(captions))
