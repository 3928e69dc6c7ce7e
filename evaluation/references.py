"""Predictions and references, read from the files that hold them and matched by image.

Predictions: COCO's result format (.json), or what predict.py writes (.json, .jsonl, .csv). References: caption annotations of any data set
that the parse scripts read.
"""

import collections.abc
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

from common import UserError
from features.annotations import read_annotations
from features.image_ids import HALF_PAIR, id_key, match_ids, plain_id, without_suffix
from features.schema import check_structure
from features.tables import plain_name, read_csv, read_jsonl, read_text

DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-of-domain"}
SPLITS = re.compile(r"train|validation|val|test|development|evaluation")
LISTED = 5  # ids that an error names
PREDICTIONS = 'predictions: [{"image_id": ..., "caption": ...}, ...], or what predict.py --out writes as .json, .jsonl or .csv'
MISSING = "Give --references: annotations as .json or .csv, or a feature file."


@dataclasses.dataclass
class References:
    """What is true of each image: mappings from key (features.image_ids.id_key) to value."""

    captions: collections.abc.Mapping  # -> list of str
    split: str | None = None  # of all images
    splits: dict = dataclasses.field(default_factory=dict)  # -> split, where the images have several
    domains: dict = dataclasses.field(default_factory=dict)  # -> one of the values of DOMAINS; nocaps only
    file_names: dict = dataclasses.field(default_factory=dict)  # -> name of the picture or sound, where known

    def split_of(self, keys):
        """Name the split that the images of `keys` share; None where they share none."""
        shared = {self.splits.get(key) for key in keys} if self.splits else {self.split}
        return shared.pop() if len(shared) == 1 else None


@dataclasses.dataclass
class Prediction:
    """What was predicted for an image, the best caption first."""

    image_id: object  # as it is in the file
    captions: list  # of str
    scores: list = dataclasses.field(default_factory=list)  # mean log-probability per token of each caption, where known
    ended: list = dataclasses.field(default_factory=list)  # whether each caption ended with the stop token, where known
    file_name: str | None = None  # of the picture or sound, where known


def name_domain(text):
    """Translate nocaps' name of a domain ("in-domain", "near-domain", "out-domain") to one of the values of DOMAINS, or None."""
    return DOMAINS.get(re.split(r"[-_ ]", str(text).lower())[0])


def list_some(ids):
    """List the first of many ids, for an error: "a, b, c and 4 more"."""
    ids = [str(one)[:80] for one in ids]
    return ", ".join(ids[:LISTED]) + (f" and {len(ids) - LISTED:,} more" if len(ids) > LISTED else "")


# -- Predictions -----------------------------------------------------------------------------------------------------------


@functools.cache
def _row_schema():
    """Build the schema of a file of predictions, once. Fields that it does not name are dropped."""
    from typing import Annotated

    from pydantic import Field, StrictInt, StrictStr, TypeAdapter
    from typing_extensions import NotRequired, TypedDict

    row = TypedDict("row", {
        "image_id": Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Annotated[StrictStr, Field(min_length=1, max_length=4096)],
        "caption": StrictStr,
        "rank": NotRequired[Annotated[int, Field(ge=1, lt=2**31)]],
        **dict.fromkeys(("checkpoint", "file", "file_name"), NotRequired[StrictStr | None]),
    })  # fmt: skip
    return TypeAdapter(list[row])


def _read_rows(path):
    """Read the rows of a file of predictions, by its suffix, and check them. Raises UserError where it holds something else."""
    suffix, missing = Path(path).suffix.lower(), f"Expected {PREDICTIONS}."
    if suffix in (".csv", ".jsonl"):
        _, rows = (read_csv if suffix == ".csv" else read_jsonl)(path, missing)
    else:
        text = read_text(path, missing)
        try:
            rows = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); expected {PREDICTIONS}.") from error
        if isinstance(rows, dict) and "annotations" in rows:
            raise UserError(f"{path} holds annotations, as references are; expected {PREDICTIONS}.")
    if rows == []:
        raise UserError(f"{path} holds no prediction; expected {PREDICTIONS}.")
    return check_structure(_row_schema(), rows, path, PREDICTIONS)


def read_predictions(path):
    """Read a file of predictions.

    Args:
        path: .json, .jsonl or .csv file.

    Returns:
        dict of key to Prediction, in the order of the file.

    Raises:
        UserError: the file is missing, empty or holds something else; an id occurs twice; there are captions of several checkpoints.
    """
    rows = _read_rows(path)
    checkpoints = {row.get("checkpoint") for row in rows}
    if len(checkpoints) > 1:
        raise UserError(f"{path} holds captions of {len(checkpoints)} checkpoints; expected one. Write one file per checkpoint.")
    ranks, twice, broken = {}, set(), 0
    for row in rows:
        row["image_id"] = plain_id(row["image_id"])
        key, rank = id_key(row["image_id"]), row.get("rank", 1)
        row["caption"], found = HALF_PAIR.subn("\ufffd", row["caption"])
        broken += bool(found)
        if ranks.setdefault(key, {}).setdefault(rank, row) is not row:
            twice.add(key)
    if twice:
        ids = list_some(key for key in ranks if key in twice)
        raise UserError(f"{path} has {len(twice):,} image ids more than once: {ids}. Keep one caption for each.")
    if broken:
        print(f"{path}: {broken} captions hold half of a surrogate pair, which was replaced by U+FFFD", file=sys.stderr)
    predictions = {}
    for key, of_image in ranks.items():
        ordered = [of_image[rank] for rank in sorted(of_image)]
        image_id, file_name = ordered[0]["image_id"], ordered[0].get("file_name") or ordered[0].get("file")
        file_name = None if file_name == str(image_id) else file_name  # predict.py --data knows no file
        predictions[key] = Prediction(image_id, [row["caption"] for row in ordered], file_name=file_name)
    return predictions


# -- References ------------------------------------------------------------------------------------------------------------


def read_references(path):
    """Read caption annotations, in any form that features.annotations reads.

    Args:
        path: the file.

    Returns:
        References.

    Raises:
        UserError: the file is missing, empty or has another form.
    """
    annotations = read_annotations(path, MISSING)
    for what, count in annotations.left_out.items():
        print(f"{path}: {count:,} {what} left out", file=sys.stderr)
    named = SPLITS.search(Path(path).stem)
    found = References({}, named[0] if named else None)
    is_table = annotations.form in ("clotho", "flickr")  # where an empty cell is no caption
    for image in annotations.images:
        key = id_key(image.image_id)
        texts = [row["caption"] for row in image.captions if row["caption"].strip() or not is_table]
        if texts:
            found.captions.setdefault(key, []).extend(texts)
        if image.file_name:
            found.file_names[key] = image.file_name
        if image.split:
            found.splits[key] = image.split
        domain = next((name_domain(row["domain"]) for row in image.captions if row.get("domain")), None)
        if domain:
            found.domains[key] = domain
    if not found.captions:
        raise UserError(f"{path} holds no caption; expected references. {MISSING}")
    return found


# -- Matching --------------------------------------------------------------------------------------------------------------


def match_references(keys, references):
    """Match images with references: by id, or else by the file that the references name.

    Args:
        keys: keys of the images, as id_key gives them.
        references: References.

    Returns:
        dict of each key that has references to the references' key.
    """
    found = match_ids(keys, references.captions)
    if len(found) == len(keys):
        return found
    taken, by_name = set(found.values()), {}
    for key, name in references.file_names.items():
        if key in references.captions and key not in taken:
            by_name.setdefault(id_key(name), []).append(key)
    by_name = {name: several[0] for name, several in by_name.items() if len(several) == 1}
    by_file = match_ids([key for key in keys if key not in found], by_name)
    return found | {key: by_name[name] for key, name in by_file.items()}


def pair_up(images, references, source):
    """Match images with references.

    Args:
        images: dict of key to anything, such as Prediction.
        references: References.
        source: where the images are from, for errors.

    Returns:
        dict of the references' key to the same, in the order of the images.

    Raises:
        UserError: images have no references, or both sides name different files for one id.
    """
    found = match_references(images, references)
    alone = [key for key in images if key not in found]
    if alone:
        raise UserError(
            f"{source} has {len(alone):,} of {len(images):,} images without references: {list_some(alone)}. "
            "Give the references of the same split, or leave these images out."
        )
    for key, image in images.items():
        ours, theirs = getattr(image, "file_name", None), references.file_names.get(found[key])
        if ours and theirs and _base(ours) != _base(theirs):
            raise UserError(
                f"{source} captions {ours} as image {image.image_id}, and the references name {theirs} for it: these are different "
                "pictures. Caption the pictures that the references name."
            )
    return {found[key]: image for key, image in images.items()}


def _base(name):
    """Reduce a file name to what the names of one picture share: no folders, no suffix, COCO's number."""
    return without_suffix(id_key(plain_name(name).rpartition("/")[2]))
