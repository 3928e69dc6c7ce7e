"""Predictions and references out of the files they come in, matched by image.

Predictions: COCO's result format (.json), or what predict.py writes (.json, .jsonl, .csv). References: COCO's caption annotations or
nocaps' (.json), or Clotho's captions (.csv).
"""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

from common import UserError

MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".wav", ".flac", ".mp3", ".ogg"}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-of-domain"}
LISTED = 5  # ids that an error names


@dataclasses.dataclass
class References:
    """What is true of each image: key (see image_key) → value."""

    captions: dict  # → list of str
    split: str | None = None
    domains: dict = dataclasses.field(default_factory=dict)  # → one of the values of DOMAINS; nocaps only
    file_names: dict = dataclasses.field(default_factory=dict)  # → name of the picture or sound, where known


@dataclasses.dataclass
class Prediction:
    """What was predicted for an image, the best caption first."""

    image_id: object  # as it stood in the file
    captions: list  # of str
    scores: list = dataclasses.field(default_factory=list)  # mean log-probability a token of each, where known
    ended: list = dataclasses.field(default_factory=list)  # whether each ended by its stop token, where known


def image_key(image_id):
    """An image's id in the form by which files are matched: without a media suffix, COCO's twelve digits as a number."""
    text = str(image_id)
    if Path(text).suffix.lower() in MEDIA:
        text = text[: -len(Path(text).suffix)]
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", text)
    return str(int(number[1])) if number else text


def name_domain(text):
    """nocaps' name of a domain ("in-domain", "near-domain", "out-domain" …) → one of the values of DOMAINS, or None."""
    return DOMAINS.get(re.split(r"[-_ ]", str(text).lower())[0])


def list_some(ids):
    """The first of many ids, for an error: "a, b, c and 4 more"."""
    ids = [str(one) for one in ids]
    return ", ".join(ids[:LISTED]) + (f" and {len(ids) - LISTED:,} more" if len(ids) > LISTED else "")


def _read_text(path, what):
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; expected {what}. Check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); expected {what}.") from error
    if not text.strip():
        raise UserError(f"{path} is empty; expected {what}.")
    return text


def _read_json(path, what):
    try:
        return json.loads(_read_text(path, what))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({error}); expected {what}.") from error


def read_predictions(path):
    """Read predictions → dict of key → Prediction, in the order of the file.

    Raises UserError for a missing or empty file, one that holds something else, an id that stands in it twice, and captions of
    several checkpoints.
    """
    what = 'predictions: [{"image_id": …, "caption": …}, …], or what predict.py --out writes as .json, .jsonl or .csv'
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(_read_text(path, what), newline="")))
    elif suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in _read_text(path, what).split("\n") if line.strip()]
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not JSON, line by line ({error}); expected {what}.") from error
    else:
        rows = _read_json(path, what)
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {_kind(rows)}; expected {what}.")
    if not rows:
        raise UserError(f"{path} holds no prediction; expected {what}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), (str, int)) or not isinstance(row.get("caption"), str):
            raise UserError(f"{path} has an entry {number} without an image_id and a caption; expected {what}.")
    checkpoints = {row.get("checkpoint") for row in rows}
    if len(checkpoints) > 1:
        raise UserError(f"{path} holds captions of {len(checkpoints)} checkpoints; expected one. Write one file a checkpoint.")
    ranks = {}
    for row in rows:
        of_image = ranks.setdefault(image_key(row["image_id"]), {})
        rank = row.get("rank", 1)
        of_image.setdefault(int(rank) if str(rank).isdigit() else rank, []).append(row)
    twice = [key for key, of_image in ranks.items() if any(len(same) > 1 for same in of_image.values())]
    if twice:
        raise UserError(f"{path} has {len(twice):,} image ids more than once: {list_some(twice)}. Keep one caption for each.")
    predictions = {}
    for key, of_image in ranks.items():
        ordered = [of_image[rank][0] for rank in sorted(of_image, key=lambda rank: (isinstance(rank, str), rank))]
        predictions[key] = Prediction(ordered[0]["image_id"], [row["caption"] for row in ordered])
    return predictions


def read_references(path):
    """Read COCO's or nocaps' caption annotations (.json), or Clotho's captions (.csv) → References.

    Raises UserError for a missing or empty file and one in another format.
    """
    if Path(path).suffix.lower() == ".csv":
        return _read_clotho(path)
    what = 'references: COCO\'s annotations {"images": […], "annotations": [{"image_id": …, "caption": …}, …]}'
    content = _read_json(path, what + ", Clotho's .csv, or a feature file (.pkl)")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path} holds {_kind(content)}; expected {what}, Clotho's .csv, or a feature file (.pkl).")
    captions = {}
    for number, row in enumerate(content["annotations"]):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), (str, int)) or not isinstance(row.get("caption"), str):
            raise UserError(f"{path} has an annotation {number} without an image_id and a caption; expected {what}.")
        captions.setdefault(image_key(row["image_id"]), []).append(row["caption"])
    if not captions:
        raise UserError(f"{path} holds no caption; expected {what}.")
    domains, file_names = {}, {}
    for image in content.get("images") if isinstance(content.get("images"), list) else []:
        if isinstance(image, dict) and name_domain(image.get("domain")):
            domains[image_key(image.get("id"))] = name_domain(image["domain"])
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            file_names[image_key(image.get("id"))] = image["file_name"]
    split = re.search(r"train|val|test", Path(path).stem)
    return References(captions, split[0] if split else None, domains, file_names)


def _read_clotho(path):
    what = "references: Clotho's file_name, caption_1, caption_2, …"
    rows = csv.DictReader(io.StringIO(_read_text(path, what), newline=""))
    columns = [name for name in rows.fieldnames or [] if re.fullmatch(r"caption_\d+", name or "")]
    if "file_name" not in (rows.fieldnames or []) or not columns:
        raise UserError(f"{path} has the columns {list_some(rows.fieldnames or [])}; expected {what}.")
    captions, file_names = {}, {}
    for row in rows:
        key = image_key(row["file_name"])
        file_names[key] = row["file_name"]
        if key in captions:
            raise UserError(f"{path} has {row['file_name']} more than once; expected one row for each sound. Keep one.")
        captions[key] = [row[name] for name in columns if row[name]]
    captions = {key: texts for key, texts in captions.items() if texts}
    if not captions:
        raise UserError(f"{path} holds no caption; expected {what}.")
    split = re.search(r"development|validation|evaluation", Path(path).stem)
    return References(captions, split[0] if split else None, file_names=file_names)


def _kind(content):
    """What a JSON file turned out to hold, in words."""
    if isinstance(content, list):
        return "a list, as predictions are" if content and isinstance(content[0], dict) and "caption" in content[0] else "a list"
    if isinstance(content, dict):
        return "annotations, as references are" if "annotations" in content else f"an object with {list_some(content) or 'nothing'}"
    return f"a {type(content).__name__}"


def pair_up(predictions, references, source):
    """Keys that both hold, in the order of the predictions. Raises UserError listing predictions without references.

    predictions: dict of key → Prediction; references: References; source: the predictions' file, for the error.
    """
    alone = [key for key in predictions if key not in references.captions]
    if alone:
        raise UserError(
            f"{source} has {len(alone):,} of {len(predictions):,} images without references: {list_some(alone)}. "
            "Give the references of the same split, or leave these images out."
        )
    return list(predictions)
