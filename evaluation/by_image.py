"""The captions of a feature file by image: dicts of millions of keys whose values are read when they are asked for.

N images, C captions. An index takes about 80 bytes per image, a dict of Python objects about 250, without its values.
"""

import collections.abc
import hashlib
from array import array

import numpy as np

from features.image_ids import id_key
from features.record_table import Texts

DIGEST = 16  # bytes of a key's digest; two keys of one digest do not occur


class ImageIndex:
    """Which captions belong to which image; images are numbered in order of first appearance."""

    def __init__(self, image_ids):
        """Take the image_id of each caption, an iterable."""
        keys, starts, digests, last, count = Texts(), array("q"), bytearray(), None, 0
        for image_id in image_ids:  # neighbours of one image are a run
            key = id_key(image_id)
            if key != last:
                last = key
                keys.append(key)
                starts.append(count)
                digests += _digest(key)
            count += 1
        self._keys, self._starts, self._count = keys, starts, count
        every = np.frombuffer(digests, f"S{DIGEST}")
        self._digests, first_run, which = np.unique(every, return_index=True, return_inverse=True)
        order = np.argsort(first_run)
        self._image_of_digest = np.empty(len(order), np.int64)
        self._image_of_digest[order] = np.arange(len(order))
        self._first_run = first_run[order]
        image_of_run = self._image_of_digest[which]
        self._runs = np.argsort(image_of_run, kind="stable")
        self._run_ends = np.cumsum(np.bincount(image_of_run, minlength=len(order)))

    def __len__(self):
        return len(self._first_run)

    def key(self, image):
        """Return the key (features.image_ids.id_key) of an image."""
        return self._keys[int(self._first_run[image])]

    def find(self, key):
        """Return the number of the image with this key, or None."""
        if not isinstance(key, str):
            return None
        digest = np.bytes_(_digest(key))
        place = int(np.searchsorted(self._digests, digest))
        found = place < len(self._digests) and self._digests[place] == digest
        return int(self._image_of_digest[place]) if found else None

    def captions_of(self, image):
        """List the numbers of an image's captions, ascending."""
        first = self._run_ends[image - 1] if image else 0
        numbers = []
        for run in self._runs[first : self._run_ends[image]].tolist():
            end = self._starts[run + 1] if run + 1 < len(self._starts) else self._count
            numbers += range(self._starts[run], end)
        return numbers


class ByImage(collections.abc.Mapping):
    """A dict from the keys of an ImageIndex to what a function reads from the image's captions; without the images where that is None."""

    def __init__(self, index, read):
        """Take an ImageIndex, and a function from a list of numbers of captions to a value."""
        self._index, self._read = index, read

    def __getitem__(self, key):
        image = self._index.find(key)
        value = None if image is None else self._read(self._index.captions_of(image))
        if value is None:
            raise KeyError(key)
        return value

    def items(self):
        """Iterate over (key, value) in order of first appearance."""
        for image in range(len(self._index)):
            value = self._read(self._index.captions_of(image))
            if value is not None:
                yield self._index.key(image), value

    def values(self):
        """Iterate over the values alone."""
        return (value for _, value in self.items())

    def __iter__(self):
        return (key for key, _ in self.items())

    def __len__(self):
        return sum(1 for _ in self.items())


class OfEveryImage(ByImage):
    """A ByImage whose function never returns None, so that its keys are known without reading."""

    def __contains__(self, key):
        return self._index.find(key) is not None

    def __iter__(self):
        return (self._index.key(image) for image in range(len(self._index)))

    def __len__(self):
        return len(self._index)


def _digest(key):
    # numpy's texts of bytes have no zeros at their end.
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST - 1).digest() + b"."
