"""Tables of captions: CSV in the encodings and with the separators that people have, JSON lines, and the columns in them."""

import ast
import csv
import html
import io
import json
import math
import os
import re
import unicodedata
from pathlib import Path

from common import UserError

ENCODINGS = ("utf-8-sig", "cp1252", "latin-1")  # cp1252 is latin-1 with quotation marks in place of control characters
SEPARATORS = ",;\t|"
LONGEST_FIELD = 2**27  # characters in a field of a CSV; Python's own limit is 131,072
LONGEST_LIST = 2**16  # characters of a cell that may be a list written as text
# The usual names of a caption column, the likeliest first; and numbered ones, all of which are taken (caption_1 ... caption_5).
CAPTION_COLUMNS = (
    "caption", "captions", "text", "texts", "sentence", "sentences", "description", "descriptions", "alt_text", "txt", "raw", "comment",
)  # fmt: skip
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence|comment|raw)_?\d+", re.IGNORECASE)


def decode_text(data):
    """Decode a text file: UTF-8 or UTF-16 with a byte order mark, UTF-8 without one, else cp1252 or latin-1.

    Args:
        data: bytes.

    Returns:
        The text, and the name of its encoding.
    """
    encodings = ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ENCODINGS
    for encoding in (*encodings, "latin-1"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 decodes every byte")


def read_text(path, missing):
    """Read a text file in any of the usual encodings; a printed note names one that is not UTF-8.

    Args:
        path: a regular file.
        missing: what to do when there is no such file, for the error.

    Raises:
        UserError: there is no such file, or it holds NUL characters.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is no regular file" if path.exists() else "no such file"
        raise UserError(f"no captions {path} ({found}). {missing}")
    text, encoding = decode_text(path.read_bytes())
    if "\0" in text:
        raise UserError(f"{path} holds NUL characters; expected a text file. Save it as UTF-8.")
    if not encoding.startswith("utf"):
        print(f"{path} is not UTF-8; read as {encoding}")
    return text


def find_separator(line):
    """Find the character between the fields of a heading: a comma, semicolon, tab or bar, the most frequent outside quotes."""
    outside = re.sub(r'"[^"]*"', "", line)
    return max(SEPARATORS, key=outside.count)


def csv_rows(text, path, **settings):
    """Iterate over the rows of a CSV as (number of the line it ends in, fields). Raises UserError where it is not one."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = csv.reader(io.StringIO(text, newline=""), **{"strict": True, **settings})
    while True:
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path} is not a proper CSV: {error}, in line {lines.line_num}. Check its quotes.") from error
        if fields:
            yield lines.line_num, fields


def read_csv(path, missing="Check the path."):
    """Read a CSV with a heading.

    Args:
        path: the file.
        missing: what to do when there is no such file, for the error.

    Returns:
        List of column names, and list of rows as dicts of str.

    Raises:
        UserError: the file is missing, is not a CSV, or a row has more fields than the heading.
    """
    text = read_text(path, missing)
    rows = csv_rows(text, path, delimiter=find_separator(text.partition("\n")[0]), skipinitialspace=True)
    _, header = next(rows, (0, []))
    table = []
    for line, fields in rows:
        if any(field.strip() for field in fields[len(header) :]):
            raise UserError(
                f"{path} has {len(fields)} fields in the row that ends in line {line}, and {len(header)} columns. "
                "Put captions with a comma between double quotes."
            )
        table.append(dict(zip(header, fields)))
    return header, table


def read_jsonl(path, missing="Check the path."):
    """Read a file with one JSON object per line; arguments and returns as those of read_csv."""
    rows = []
    for number, line in enumerate(read_text(path, missing).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} has a line {number} that is not JSON ({error}); expected one object per line.") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path} has a {type(rows[-1]).__name__} in line {number}; expected an object with file_name and caption.")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def read_table(path, name_columns, caption_columns=None, missing="Check the path."):
    """Read file names and captions from a CSV or JSON lines.

    Args:
        path: the file; .jsonl holds JSON lines, every other suffix a CSV.
        name_columns: names of the column with file names, the likeliest first.
        caption_columns: names of the caption columns, or None for the usual ones.
        missing: what to do when there is no such file, for the error.

    Yields:
        (file name, list of captions, the row as a dict) of each row.

    Raises:
        UserError: a column is missing, or a row lacks its file name or has a caption that is not a text.
    """
    columns, rows = read_jsonl(path, missing) if Path(path).suffix == ".jsonl" else read_csv(path, missing)
    by_lower = {column.strip().lower(): column for column in reversed(columns)}
    where = next((by_lower[name.lower()] for name in name_columns if name.lower() in by_lower), None)
    if where is None:
        raise UserError(f"{path} has no column {name_columns[0]}; it has {', '.join(columns)[:200] or 'none'}. "
                        f"Name the file column {name_columns[0]}.")  # fmt: skip
    captions = find_caption_columns([column for column in columns if column != where], caption_columns, path)
    for number, row in enumerate(rows, 1):
        name = row.get(where)
        if not isinstance(name, (str, int)) or not str(name).strip():
            raise UserError(f"{path} has a row {number} without {name_columns[0]}. Name its file, or remove the row.")
        try:
            yield str(name).strip(), [text for column in captions for text in texts_of(row.get(column))], row
        except ValueError as error:
            raise UserError(f"{path} has a row {number} whose caption is {error}; expected a text or a list of texts.") from error


def find_caption_columns(columns, wanted, where):
    """Find the caption columns of a table.

    Args:
        columns: the table's column names.
        wanted: the names that the user gave, or None.
        where: what the table is called in an error.

    Returns:
        List of names, as the table writes them.

    Raises:
        UserError: none fits; the message names the columns that exist.
    """
    columns = list(columns)
    by_lower = {name.strip().lower(): name for name in reversed(columns)}
    if wanted:
        found = [name if name in columns else by_lower.get(name.lower()) for name in wanted]
    else:
        usual = [by_lower[name] for name in CAPTION_COLUMNS if name in by_lower]
        found = usual[:1] or [name for name in columns if NUMBERED_CAPTION.fullmatch(name.strip())]
    if not found or None in found:
        missing = ", ".join(name for name, column in zip(wanted, found) if column is None) if wanted else "caption or text"
        raise UserError(f"{where} has no column {missing}; it has {', '.join(columns)[:200] or 'none'}. Name one with --caption_column.")
    return found


def texts_of(value):
    """List the texts in a caption cell.

    Args:
        value: a text; a list of texts, also one written as text (`["a", "b"]`); a dict with one, such as COCO's sentences; None or NaN.

    Returns:
        List of str; [] for None and NaN.

    Raises:
        ValueError: it is something else, such as a number.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return []
    if isinstance(value, str):
        return _written_list(value) or [value]
    if isinstance(value, dict):
        key = next((name for name in ("raw", *CAPTION_COLUMNS) if name in value), None)
        if key is not None and not isinstance(value[key], dict):
            return texts_of(value[key])
    elif isinstance(value, (list, tuple)):
        if not any(isinstance(item, (list, tuple)) for item in value):
            return [text for item in value for text in texts_of(item)]
    raise ValueError(f"a {type(value).__name__} ({str(value)[:40]})")


def _written_list(text):
    """Read a list of texts that was written as text, by JSON or by Python. Returns None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > LONGEST_LIST:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
    return None


def plain_name(name):
    """Reduce a file name to what its spellings share: no HTML escapes or spaces around it, "/" between folders, accents composed."""
    stem, suffix = os.path.splitext(html.unescape(unicodedata.normalize("NFC", name)).strip().replace("\\", "/"))
    return stem.strip() + suffix
