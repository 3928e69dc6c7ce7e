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
from features.record_table import RecordTable

LEAST_ALLOWED = 10  # images that may be skipped, at least, when the limit is a share
BLOCK = 20_000  # numbers that are Python objects at one time
SKIPPED_COLUMNS = ("image_id", "path", "reason")


class Merged(NamedTuple):
    """What merge_records returns: one Record per image, and counts."""

    records: RecordTable
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
    blank = replaced = 0
    if isinstance(records, RecordTable) and records.is_clean:
        table = records  # millions of records are not copied
    else:
        table = RecordTable()
        for record in records:
            kept = [caption for caption in record.captions if caption["caption"].strip()]
            broken = [HALF_PAIR.search(caption["caption"]) is not None for caption in kept]
            blank += len(record.captions) - len(kept)
            replaced += sum(broken)
            if any(broken):
                kept = [{**caption, "caption": HALF_PAIR.sub("\ufffd", caption["caption"])} for caption in kept]
            table.append(record._replace(captions=kept))
    same = _numbers_of_images(table)
    images, repeated = len(table) - sum(len(numbers) - 1 for numbers in same.values()), set()
    for first, numbers in same.items():
        other = next((number for number in numbers if table.images[number] != table.images[first]), None)
        if other is not None:
            found = f"{shown(table[first])} and {shown(table[other])}"
            raise UserError(f"image_id {table.image_ids[first]} stands for two pictures, {found}. Give each picture its own id.")
        repeated.update(numbers[1:])
    if repeated or not table.caption_counts().all():
        several, merged = table, RecordTable()
        for number in range(len(several)):
            captions = [caption for one in same.get(number, [number]) for caption in several.captions_of(one)]
            if captions and number not in repeated:
                merged.append(several[number]._replace(captions=captions))
        table = merged
    return Merged(table, blank, images - len(table), replaced)


def _numbers_of_images(table):
    """Find the images that have several records: dict of the number of an image's first record to those of all."""
    # Hashes first: of millions of ids, only those that seem to occur twice are compared.
    hashes = np.fromiter((hash(str(image_id)) for image_id in table.image_ids), np.int64, len(table))
    _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
    groups = {}
    for number in np.flatnonzero(times[which] > 1).tolist():
        groups.setdefault(str(table.image_ids[number]), []).append(number)
    return {numbers[0]: numbers for numbers in groups.values() if len(numbers) > 1}


def check_images(records, max_skipped="1%", things="images"):
    """Check, before minutes of loading weights, that the pictures exist.

    Args:
        records: list of Record, or RecordTable.
        max_skipped: how many may be missing: a number, or a share such as "1%", which always allows 10.
        things: "images" or "sounds", for errors.

    Raises:
        UserError: there are no records, no pictures, or too many of them are missing.
    """
    if not records:
        raise UserError(f"no {things[:-1]} with a caption in this data set: nothing to encode. Check the annotations.")
    if isinstance(records, RecordTable):
        paths = records.paths()
    else:
        paths = ((number, record.image) for number, record in enumerate(records) if is_path(record.image))
    missing = [number for number, path in paths if not os.path.isfile(path)]
    if len(missing) > min(allowed_skips(max_skipped, len(records)), len(records) - 1):
        raise UserError(
            f"{things} are not where they should be: found {len(records) - len(missing)} of {len(records)}; "
            f"{shown(records[missing[0]])}, for example, is missing. Put them there, or say where they are."
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
        records: RecordTable.
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
        """Take a RecordTable, and int [N] numbers of the records behind the rows."""
        self._records, self._numbers = records, numbers
        counts = records.caption_counts()[numbers]
        self.rows = np.repeat(np.arange(len(numbers)), counts)
        self._first = np.cumsum(counts) - counts

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        number = range(len(self))[number]  # raises IndexError, as a list does
        row = int(self.rows[number])
        record = int(self._numbers[row])
        path = self._records.path_of(record)
        named = {} if path is None else {"file_name": printable_name(os.path.basename(path))}
        caption = self._records.caption_of(record, number - int(self._first[row]))
        made = {"image_id": self._records.image_ids[record], **named, **caption, "clip_embedding": row}
        made.setdefault("id", number)
        return made

    def image_ids(self):
        """Iterate over the image_id of every caption."""
        for start in range(0, len(self._numbers), BLOCK):
            for record in self._numbers[start : start + BLOCK].tolist():
                image_id = self._records.image_ids[record]
                for caption in self._records.captions_of(record):
                    yield caption.get("image_id", image_id)
