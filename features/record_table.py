"""Millions of records in little memory: a list of Record, kept by columns. N records, C captions.

A Record of Python objects takes about 900 bytes: a dict per caption, a list of them, an object per text and number. Here the same takes
the bytes of its texts and about 60 more. Records come out as they were put in.
"""

import collections.abc
import os
from array import array
from typing import NamedTuple

import numpy as np

from features.image_ids import HALF_PAIR

TEXT, WHOLE, OTHER = range(3)  # how an id is kept; from TUPLE on, pictures by the class of their tuple
TUPLE = 3
MOST_CLASSES = 100  # of tuples; more are no records of one data set
MOST = 2**63  # numbers below it, and not below its negative, go into a column


class Record(NamedTuple):
    """An image or sound and its captions.

    Attributes:
        image_id: int or str.
        image: path; bytes of a file; or an object whose read() gives one of these when it is needed, and whose `key` (str) stands for its
            content.
        captions: list of dicts with caption; other keys are kept.
    """

    image_id: object
    image: object
    captions: list


class RecordTable(collections.abc.Sequence):
    """A list of Record, to which records can be appended."""

    def __init__(self, records=()):
        """Take an iterable of Record."""
        self._ids, self._images = _Column(), _Column()
        self._texts, self._details = Texts(), {}  # captions that are more than a text are kept as they are
        self._caption_ends = array("q")
        self.is_clean = True  # whether every caption has text, and none half of a surrogate pair
        for record in records:
            self.append(record)

    def append(self, record):
        """Add a Record."""
        self._ids.append(record.image_id)
        self._images.append(record.image)
        for caption in record.captions:
            text = caption["caption"]
            if not text.strip() or not text.isascii() and HALF_PAIR.search(text):
                self.is_clean = False
            if len(caption) > 1 or type(text) is not str:
                self._details[len(self._texts)] = caption
                text = ""
            self._texts.append(text)
        self._caption_ends.append(len(self._texts))

    def __len__(self):
        return len(self._caption_ends)

    def __getitem__(self, number):
        number = range(len(self))[number]  # raises IndexError, as a list does
        return Record(self._ids[number], self._images[number], self.captions_of(number))

    @property
    def images(self):
        """The images alone, a sequence."""
        return self._images

    @property
    def image_ids(self):
        """The ids alone, a sequence."""
        return self._ids

    def path_of(self, number):
        """Return a record's image where it is a path, else None."""
        image = self._images[number] if self._images.kind_of(number) in (TEXT, OTHER) else None
        return image if isinstance(image, (str, os.PathLike)) else None

    def paths(self):
        """Iterate over (number, path) of the images that are paths."""
        paths = ((number, self.path_of(number)) for number in range(len(self)))
        return ((number, path) for number, path in paths if path is not None)

    def captions_of(self, number):
        """List the captions of a record."""
        first = self._caption_ends[number - 1] if number else 0
        return [self._caption(place) for place in range(first, self._caption_ends[number])]

    def caption_of(self, number, place):
        """Return one of the captions of a record."""
        return self._caption(place + (self._caption_ends[number - 1] if number else 0))

    def _caption(self, place):
        return self._details[place] if place in self._details else {"caption": self._texts[place]}

    def caption_counts(self):
        """Count the captions of each record: int64 [N]."""
        return np.diff(np.frombuffer(self._caption_ends, np.int64), prepend=0) if len(self) else np.zeros(0, np.int64)


class Texts:
    """A list of str in one buffer, to which texts can be appended."""

    def __init__(self):
        self._bytes, self._ends = bytearray(), array("q")

    def __len__(self):
        return len(self._ends)

    def append(self, text):
        """Add a text; half of a surrogate pair is kept."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __getitem__(self, number):
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].decode("utf-8", "surrogatepass")


class _Column(collections.abc.Sequence):
    """A list of texts, whole numbers, tuples of them, and other objects, which alone stay objects."""

    def __init__(self):
        self._kinds, self._places = array("b"), array("q")
        self._texts, self._others = Texts(), []
        self._classes, self._tuples = {}, []  # (class, types of its fields) -> kind; for each such kind (class, columns)
        self._words, self._known = [], {}  # texts in tuples, which many share

    def __len__(self):
        return len(self._kinds)

    def append(self, value):
        """Add an item."""
        if type(value) is str:
            kind, place = TEXT, len(self._texts)
            self._texts.append(value)
        elif _is_whole(value):
            kind, place = WHOLE, value
        else:
            kind, place = self._append_tuple(value) if isinstance(value, tuple) else (OTHER, -1)
        if kind == OTHER:
            place = len(self._others)
            self._others.append(value)
        self._kinds.append(kind)
        self._places.append(place)

    def _append_tuple(self, value):
        """Put the fields of a tuple into columns. Returns its kind and its place there; OTHER for one of other things than texts."""
        types = (type(value), *map(type, value))
        kind = self._classes.get(types)
        if kind is None:
            if not value or not set(types[1:]) <= {str, int} or len(self._classes) == MOST_CLASSES:
                return OTHER, -1
            kind = self._classes[types] = TUPLE + len(self._tuples)
            self._tuples.append((types, [array("q") for _ in value]))
        known, words = self._known, self._words
        numbers = []
        for field in value:
            if type(field) is str:
                number = known.setdefault(field, len(words))
                if number == len(words):
                    words.append(field)
            elif -MOST <= field < MOST:
                number = field
            else:
                return OTHER, -1
            numbers.append(number)
        columns = self._tuples[kind - TUPLE][1]
        for column, number in zip(columns, numbers):
            column.append(number)
        return kind, len(columns[0]) - 1

    def __getitem__(self, number):
        number = range(len(self))[number]
        kind, place = self._kinds[number], self._places[number]
        if kind == TEXT:
            return self._texts[place]
        if kind == WHOLE:
            return place
        if kind == OTHER:
            return self._others[place]
        (of_tuple, *types), columns = self._tuples[kind - TUPLE]
        fields = [self._words[column[place]] if one is str else column[place] for one, column in zip(types, columns)]
        return tuple.__new__(of_tuple, fields)

    def kind_of(self, number):
        """Return how an item is kept: TEXT, WHOLE, OTHER, or a number from TUPLE on."""
        return self._kinds[number]


def _is_whole(value):
    return type(value) is int and -MOST <= value < MOST
