"""Caption annotations in tables: Clotho's CSV, the forms of Flickr30k and Flickr8k, and any table with file names and captions."""

import math
import re

from common import UserError
from features.annotated import Annotated, Annotations
from features.image_ids import name_images
from features.tables import csv_rows, find_separator, plain_name, read_csv, read_table, read_text

FORMS = (
    'results.csv ("image_name| comment_number| comment"), a .token file ("name.jpg#0<TAB>caption"), captions.txt ("image,caption"), '
    "or a CSV with file_name and caption"
)
CLOTHO_FORM = "the columns file_name and caption_1 ... caption_5, as Clotho has them"
NAME_COLUMNS = ("file_name", "image", "image_name", "filename", "image_path", "image_id")
BAD_SHARE = 0.01  # of the lines of a file; with more bad ones it is another kind of file
TOKEN_LINE = re.compile(r"(.+?)#\d+\s+(.*)")
# "2199200615.jpg| 4   A dog runs ...": the one row of results.csv whose second bar is missing.
NUMBER_AND_TEXT = re.compile(r"\s*\d+\s+(.*)")


def read_annotation_table(path, missing):
    """Read a table of captions in any of the forms; arguments and returns as those of features.annotations.read_annotations."""
    text = read_text(path, missing)
    first = text.partition("\n")[0].strip()
    heading = first.replace(" ", "").lower().replace('"', "")
    if TOKEN_LINE.fullmatch(first):
        return _gather(path, map(split_token_line, text.splitlines()), headed=False)
    if "|" in heading:
        return _gather(path, map(split_at_bars, text.splitlines()), headed=heading.startswith("image_name|"))
    columns = re.split("[,;\t]", heading)
    if "file_name" in columns and any(re.fullmatch(r"caption_\d+", column) for column in columns):
        return read_clotho(path, missing=missing)
    # Captions with commas and without quotes: everything behind the name (and its number) is the caption.
    if columns in (["image", "caption"], ["image_name", "comment_number", "comment"]):
        rows = csv_rows(text, path, delimiter=find_separator(first), strict=False)
        return _gather(path, (_split_row(fields, len(columns)) for _, fields in rows), headed=True)
    if any(name in columns for name in NAME_COLUMNS):
        return _read_named_rows(path, missing)
    raise UserError(f"{path} starts with {first[:60]!r}; expected {FORMS}. Give another file with --annotations.")


def split_at_bars(line):
    """Split a line of results.csv. Returns file name and caption; None when it has neither of the two forms."""
    name, *rest = line.split("|", 2)
    if len(rest) == 2 and rest[0].strip().isdecimal():
        return name, rest[1]
    shifted = NUMBER_AND_TEXT.fullmatch(rest[0].rstrip()) if len(rest) == 1 else None
    return (name, shifted[1]) if shifted else None


def split_token_line(line):
    """Split a line of a .token file. Returns file name and caption, or None. One name there is "....jpg.1" for "....jpg"."""
    parts = TOKEN_LINE.fullmatch(line.strip())
    return (re.sub(r"(\.jpe?g)\.\d+$", r"\1", parts[1]), parts[2]) if parts else None


def _split_row(fields, columns):
    """Split a row of captions.txt. Returns file name and caption, or None."""
    if len(fields) < columns or columns == 3 and not fields[1].strip().isdecimal():
        return None
    return fields[0], ",".join(fields[columns - 1 :])


def _gather(path, rows, headed):
    """Put the captions of each file name together.

    Args:
        path: the file, for errors.
        rows: (file name, caption) of each line, or None for a bad one.
        headed: whether the first line is a heading.

    Raises:
        UserError: too many lines are bad.
    """
    captions, bad, lines = {}, [], 0
    for number, row in enumerate(rows, 1):
        if headed and number == 1:
            continue
        lines += 1
        if row is None or not row[0].strip():
            bad.append(("", f"{path}, line {number}", "not a name, a number and a caption"))
        else:
            captions.setdefault(row[0].strip(), []).append({"caption": row[1].strip()})
    if len(bad) > max(1, math.ceil(BAD_SHARE * lines)):
        raise UserError(f"{len(bad)} of {lines} lines hold no caption, {bad[0][1]} the first; expected {FORMS}. Give another file.")
    return Annotations("flickr", _named(captions), bad=bad)


def _named(captions, splits=()):
    """Give each file name its image_id. Returns list of Annotated."""
    ids = zip(name_images(captions), captions.items())
    return [Annotated(image_id, name, rows, dict(splits).get(name)) for image_id, (name, rows) in ids]


def _read_named_rows(path, missing):
    """Read a table with a column of file names, captions in the usual columns, and perhaps a split."""
    captions, splits = {}, {}
    for name, texts, row in read_table(path, NAME_COLUMNS, missing=missing):
        captions.setdefault(name, []).extend({"caption": text} for text in texts)
        if row.get("split"):
            splits[name] = row["split"]
    return Annotations("flickr", _named(captions, splits))


def read_clotho(path, which="all", missing="Check the path."):
    """Read Clotho's captions.

    Args:
        path: the CSV, in any of the usual encodings.
        which: "all" captions of a clip, or the "first", as published.
        missing: what to do when there is no such file, for the error.

    Returns:
        Annotations. An image_id is the clip's name without HTML escapes and spaces around it; the file_name is as in the CSV.

    Raises:
        UserError: the file is missing, is not a CSV, or lacks the columns; the message names those it has.
    """
    header, rows = read_csv(path, missing)
    columns = {name.strip(): name for name in header}
    numbered = sorted((name for name in columns if re.fullmatch(r"caption_\d{1,9}", name)), key=lambda name: int(name[8:]))
    if "file_name" not in columns or not numbered:
        found = ", ".join(repr(name[:40]) for name in list(columns)[:12]) or "none: it is empty"
        raise UserError(f"{path} has the columns {found}; expected {CLOTHO_FORM}. Give another file.")
    numbered = numbered[:1] if which == "first" else numbered
    sounds = {}
    for number, row in enumerate(rows, 1):
        name = (row.get(columns["file_name"]) or "").strip()
        if not name:
            raise UserError(f"{path} has no file_name in row {number}; expected {CLOTHO_FORM}. Correct or remove that row.")
        rows_of_sound = sounds.setdefault(plain_name(name), Annotated(plain_name(name), name, [])).captions
        rows_of_sound += [{"caption": row.get(columns[column]) or ""} for column in numbered]
    return Annotations("clotho", list(sounds.values()))
