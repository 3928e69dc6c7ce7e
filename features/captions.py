"""Captions of a data set of any size: a sequence that makes its dicts only when one is asked for.

A feature file's captions are a list of dicts; three million of those would take gigabytes. A feature directory's stay in compact columns,
one Arrow array of texts a part, and look like that list. C captions.
"""

import collections.abc
import json

import numpy as np

BLOCK = 20_000  # texts that are Python strings at one time


class PartCaptions(collections.abc.Sequence):
    """The captions of one part of a directory: texts in memory, everything else read from its parquet file when asked for."""

    def __init__(self, path, texts, rows, shared):
        """texts: Arrow string array [c]; rows: int64 [c], rows of the part, ascending; shared: a dict the parts of a directory share."""
        self.path, self.texts, self.rows, self._shared = path, texts, rows, shared

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        """→ dict of image_id, caption and what else was stored, without the row."""
        # Of all parts, only the one looked at last is kept.
        if self._shared.get("part") is not self:
            self._shared.update(part=self, names=read_names(self.path))
        ids, paths, details = self._shared["names"]
        row = int(self.rows[number])
        caption = {"image_id": ids[row].as_py() if ids is not None else f"{self.path.stem}:{row}"}
        if paths is not None and paths[row].is_valid:
            caption["file_name"] = paths[row].as_py()
        caption["caption"] = self.texts[number].as_py()
        if details is not None and details[row].is_valid:
            place = number - int(np.searchsorted(self.rows, row))
            caption.update(json.loads(details[row].as_py()[place]))
        return caption

    def texts_at(self, numbers):
        """The texts of these captions: list of str."""
        return self.texts.take(numbers).to_pylist()

    def image_ids(self):
        """The image_id of every caption: list."""
        import pyarrow.compute as pc

        ids, _, details = read_names(self.path)
        if details is not None and pc.any(pc.match_substring(details.flatten(), '"image_id"')).as_py():
            return [caption["image_id"] for caption in self]  # ids that the column cannot hold
        return [f"{self.path.stem}:{row}" for row in self.rows] if ids is None else ids.take(self.rows).to_pylist()


def read_names(path):
    """The columns of a metadata file that name pictures → Arrow arrays of ids, paths and details, each None where there is none.

    The id is the column image_id, else image_path, else key.
    """
    import pyarrow.parquet as pq

    there = set(pq.read_schema(path).names)
    id_column = next((name for name in ("image_id", "image_path", "key") if name in there), None)
    wanted = {id_column, "image_path", "details"} & there
    table = pq.read_table(path, columns=sorted(wanted))

    def column(name):
        return table[name].combine_chunks() if name in wanted else None

    return column(id_column), column("image_path") if id_column == "image_id" else None, column("details")


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
        """The texts of captions start … end-1: list of str."""
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
        """The image_id of every caption, as they come: an iterator over one source's ids at a time."""
        start = 0
        for source, end in zip(self.sources, self._ends):
            numbers = range(start, end) if self._numbers is None else self._numbers[(self._numbers >= start) & (self._numbers < end)]
            if len(numbers):
                ids = [caption["image_id"] for caption in source] if isinstance(source, list) else source.image_ids()
                for number in numbers:
                    yield ids[number - start]
            start = end

    def select(self, numbers):
        """These captions only → LazyCaptions. numbers: int64, ascending."""
        return LazyCaptions(self.sources, self.rows[numbers], numbers if self._numbers is None else self._numbers[numbers])

    def with_rows(self, rows):
        """The same captions on other rows → LazyCaptions. rows: int64 [C]."""
        return LazyCaptions(self.sources, rows, self._numbers)

    @classmethod
    def join(cls, several, starts):
        """Put lists and LazyCaptions behind one another; starts: by how much the rows of each move → LazyCaptions."""
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
