"""What a parse script makes of its data set: a record per image. C captions, N images."""

import collections.abc
import csv
import math
import os
from typing import NamedTuple

import numpy as np

from common import UserError, replace_file
from features.image_ids import HALF_PAIR, printable_name
from features.options import number_or_share

LEAST_ALLOWED = 10  # images that may be skipped, at least, when the limit is a share
SKIPPED_COLUMNS = ("image_id", "path", "reason")


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


class Merged(NamedTuple):
    """What merge_records returns: one Record per image, and counts."""

    records: list
    blank: int  # captions left out because they are empty or blank
    captionless: int  # images left out because no caption was left
    replaced: int  # captions in which half of a surrogate pair became U+FFFD


def merge_records(records):
    """Make one Record per image, in order of first appearance.

    Args:
        records: iterable of Record, several of one image allowed.

    Returns:
        Merged.

    Raises:
        UserError: one image_id names two pictures.
    """
    images = {}
    for record in records:
        key = str(record.image_id)
        first = images.setdefault(key, record)
        if first.image != record.image:
            raise UserError(f"image_id {key} stands for two pictures, {shown(first)} and {shown(record)}. Give each picture its own id.")
        if first is not record:
            images[key] = first._replace(captions=[*first.captions, *record.captions])
    merged, blank, replaced = [], 0, 0
    for record in images.values():  # of millions, few need a change: the others stay the objects they are
        kept = [caption for caption in record.captions if caption["caption"].strip()]
        broken = sum(HALF_PAIR.search(caption["caption"]) is not None for caption in kept)
        blank += len(record.captions) - len(kept)
        replaced += broken
        if broken:
            kept = [{**caption, "caption": HALF_PAIR.sub("\ufffd", caption["caption"])} for caption in kept]
        if kept:
            merged.append(record if len(kept) == len(record.captions) and not broken else record._replace(captions=kept))
    return Merged(merged, blank, len(images) - len(merged), replaced)


def check_images(records, max_skipped="1%", things="images"):
    """Check, before minutes of loading weights, that the pictures exist.

    Args:
        records: list of Record.
        max_skipped: how many may be missing: a number, or a share such as "1%", which always allows 10.
        things: "images" or "sounds", for errors.

    Raises:
        UserError: there are no records, no pictures, or too many of them are missing.
    """
    if not records:
        raise UserError(f"no {things[:-1]} with a caption in this data set: nothing to encode. Check the annotations.")
    missing = [record for record in records if is_path(record.image) and not os.path.isfile(record.image)]
    if len(missing) > min(allowed_skips(max_skipped, len(records)), len(records) - 1):
        raise UserError(
            f"{things} are not where they should be: found {len(records) - len(missing)} of {len(records)}; "
            f"{shown(missing[0])}, for example, is missing. Put them there, or say where they are."
        )


def allowed_skips(max_skipped, images):
    """Return how many of `images` may be skipped: a number as it is, of a share at least 10."""
    max_skipped = number_or_share(max_skipped)
    return max_skipped if isinstance(max_skipped, int) else max(LEAST_ALLOWED, math.ceil(max_skipped * images))


def is_path(image):
    """Whether a record's image is a path."""
    return isinstance(image, (str, os.PathLike))


def place_of(image):
    """Say where a picture is; "" for one in memory."""
    return printable_name(image) if is_path(image) else getattr(image, "place", "")


def shown(record):
    """Name a record's picture in an error."""
    return place_of(record.image) or f"the picture of image_id {record.image_id}"


def skipped_file(out):
    """Return the path of the list of skipped images."""
    return out.with_name(out.name + ".skipped.csv")


def write_skipped(out, records, skipped, missing):
    """List the skipped images beside the feature file `out`; without any, remove an older list.

    Args:
        out: path of the feature file.
        records: list of Record.
        skipped: list of (number of a record, reason).
        missing: iterable of (image_id, path, reason).
    """
    path = skipped_file(out)
    if not skipped and not missing:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(SKIPPED_COLUMNS)
        writer.writerows((records[number].image_id, place_of(records[number].image), reason) for number, reason in skipped)
        writer.writerows(missing)


class RecordCaptions(collections.abc.Sequence):
    """The captions of a feature file, image by image, made from records when they are asked for.

    A caption is a dict of image_id, file_name where there is one, the record's own keys, an id, and the row of its embedding.

    Attributes:
        rows: int64 [C], the row of each caption.
    """

    def __init__(self, records, numbers):
        """Take a list of Record, and int [N] numbers of those behind the rows."""
        self._records, self._numbers = records, numbers
        counts = np.fromiter((len(records[number].captions) for number in numbers), np.int64, len(numbers))
        self.rows = np.repeat(np.arange(len(numbers)), counts)
        self._first = np.cumsum(counts) - counts

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        number = range(len(self))[number]  # raises IndexError, as a list does
        row = int(self.rows[number])
        record = self._records[self._numbers[row]]
        named = {"file_name": printable_name(os.path.basename(record.image))} if is_path(record.image) else {}
        caption = record.captions[number - int(self._first[row])]
        made = {"image_id": record.image_id, **named, **caption, "clip_embedding": row}
        made.setdefault("id", number)
        return made
