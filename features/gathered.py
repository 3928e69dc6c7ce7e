"""What an extraction hands on without holding it all: embeddings that stay in their pieces, captions whose dicts are made when asked for.

N images, D width, C captions.
"""

import collections.abc
import os

import numpy as np


class CaptionRows(collections.abc.Sequence):
    """The captions of a feature file, image by image: dicts of image_id, the caller's keys, an id, and the number of their embedding."""

    def __init__(self, records, numbers):
        """records: features.extract.Records; numbers: int [N], the record behind each row."""
        self._records, self._numbers = records, numbers
        counts = np.fromiter((len(records[number].captions) for number in numbers), np.int64, len(numbers))
        self.rows = np.repeat(np.arange(len(numbers)), counts)  # int64 [C]
        self._first = np.cumsum(counts) - counts

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        number = range(len(self))[number]  # raises IndexError, as a list does
        row = int(self.rows[number])
        record = self._records[self._numbers[row]]
        named = {"file_name": os.path.basename(record.image)} if isinstance(record.image, (str, os.PathLike)) else {}
        caption = record.captions[number - int(self._first[row])]
        made = {"image_id": record.image_id, **named, **caption, "clip_embedding": row}
        made.setdefault("id", number)
        return made


def pad_vectors(rows, most):
    """[n, L, D] → [n, most, D]: zeros stand where an image has fewer vectors than others."""
    return np.pad(rows, ((0, 0), (0, most - rows.shape[1]), (0, 0)))


class PieceRows:
    """The embeddings of one piece, [n, D] or [n, L, D] float32, read from its file whenever some are asked for."""

    def __init__(self, path, rows, read):
        """rows: the array that the file holds, for its shape; read: path → the same array again."""
        self.path, self.shape, self.dtype, self._read = path, rows.shape, rows.dtype, read

    def padded(self, most):
        """The same with `most` vectors an image → PieceRows."""
        read = self._read
        self._read = lambda path: pad_vectors(read(path), most)
        self.shape = (self.shape[0], most, self.shape[2])
        return self

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return self._read(self.path)[index]
