"""Your own pictures or sounds with captions → feature files for training and validation.

    python parse_folder.py photos/                                    # → data/photos_ViT-B_32_train.pkl and …_val.pkl
    python parse_folder.py photos/ --val_share 0 --out mine.pkl       # one file
    python parse_folder.py recordings/ --clip_model_type ViT-B/32     # sounds, as spectrograms

Captions stand in a metadata.csv or metadata.jsonl with file_name and caption (or text), in the folder or in any folder below it, file
names counted from where it lies; several rows, or in .jsonl a list, give a picture several captions. Or in a .txt beside each picture
(cat.jpg, cat.txt), a caption a line. Captions are UTF-8. One picture in ten goes into the validation file, with all its captions.

A run that was stopped goes on when started again. Pictures that are missing or cannot be read are skipped and listed in
{out}.skipped.csv. docs/your-own-data.md shows the layouts.
"""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.audio import SOUND_SUFFIXES
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract_options
from features.own_data import (
    add_own_data_options,
    encoder_for,
    extract_files,
    find_caption_columns,
    plan_files,
    texts_of,
)  # fmt: skip
from models.encoders import load_encoder
from prediction.inputs import PICTURE_SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl")
EXPECTED = "a metadata.csv or metadata.jsonl with file_name and caption, or a .txt beside each picture"


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_folder.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("folder", type=Path, metavar="FOLDER", help="folder of pictures or sounds, and of their captions")
    add_own_data_options(parser, val_share=0.1)
    add_options(parser)
    return parser.parse_args(argv)


def read_text(path):
    """A UTF-8 file, with or without a byte order mark → its text. Raises UserError naming the first byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}). Save it as UTF-8.") from error


def read_csv(path):
    """CSV file → column names, list of rows as dicts of str. Raises UserError when it is empty or a row has a field too many."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        header = next(lines, [])
        for fields in lines:
            if any(field.strip() for field in fields[len(header) :]):
                raise UserError(
                    f"{path} has {len(fields)} fields in the row that ends in line {lines.line_num}, and {len(header)} columns. "
                    "Put captions with a comma between double quotes."
                )
            if fields:
                rows.append(dict(zip(header, fields)))
    except csv.Error as error:
        raise UserError(f"{path} is no proper CSV: {error}, in line {lines.line_num}. Check its quotes.") from error
    return header, rows


def read_jsonl(path):
    """A JSON object a line → names in order of first appearance, list of dicts. Raises UserError naming a line that is not one."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} has a line {number} that is not JSON ({error}); expected an object a line.") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path} has a {type(rows[-1]).__name__} in line {number}; expected an object with file_name and caption.")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def read_table(path, name_column, caption_columns):
    """Metadata file → (file name, list of captions) a row. Raises UserError naming the columns there are when one is missing."""
    columns, rows = read_jsonl(path) if path.suffix == ".jsonl" else read_csv(path)
    where = {column.strip().lower(): column for column in columns}.get(name_column.lower())
    if where is None:
        raise UserError(f"{path} has no column {name_column}; it has {', '.join(columns) or 'none'}. Name the file column {name_column}.")
    captions = find_caption_columns([column for column in columns if column != where], caption_columns, path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(where), (str, int)) or not str(row[where]).strip():
            raise UserError(f"{path} has a row {number} without {name_column}. Name its file, or remove the row.")
        try:
            yield str(row[where]).strip(), [text for column in captions for text in texts_of(row.get(column))]
        except ValueError as error:
            raise UserError(f"{path} has a row {number} whose caption is {error}; expected a text or a list of texts.") from error


def walk(folder):
    """Folder → (folder, sorted file names) of it and each folder below, links followed once, hidden ones left out."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX"))) if real not in seen else []
        if real not in seen:
            yield Path(place), sorted(name for name in names if not name.startswith("."))
        seen.add(real)


def kind_of(path):
    """Path → "image" or "audio" by its suffix, None for another."""
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in PICTURE_SUFFIXES else "audio" if suffix in SOUND_SUFFIXES else None


def read_folder(folder, caption_columns=None):
    """Folder → records, image_id being the path within the folder; their kind "image" or "audio"; the files without a caption.

    Raises UserError when there is no such folder, nothing in it has a caption, metadata lack a column, or sounds and pictures are mixed.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}. Give a folder with {EXPECTED}.")
    captions, beside, items = {}, {}, []
    for place, names in walk(folder):
        tables = [name for name in METADATA if name in names]
        if len(tables) > 1:
            raise UserError(f"{place} holds {' and '.join(tables)}; expected one of them. Remove the other.")
        for table in tables:
            for name, texts in read_table(place / table, "file_name", caption_columns):
                path = place / name
                if "\\" in name and not path.exists():
                    path = place / name.replace("\\", "/")
                captions.setdefault(os.path.normpath(path), []).extend(texts)
        listed = set(names)
        for name in names:
            if kind_of(name):
                items.append(os.path.normpath(place / name))
                text = os.path.splitext(name)[0] + ".txt"
                if text in listed:
                    beside[items[-1]] = place / text
    for path, text in beside.items():
        if path not in captions:
            captions[path] = [line for line in re.split(r"[\r\n]+", read_text(text)) if line.strip()]
    bare = [path for path in items if not any(text.strip() for text in captions.get(path, []))]
    if not any(text.strip() for texts in captions.values() for text in texts):
        raise UserError(f"{folder} holds {len(items)} pictures or sounds and no caption; expected {EXPECTED}.")
    records = [
        Record(os.path.relpath(path, folder).replace(os.sep, "/"), path, [{"caption": text} for text in texts])
        for path, texts in captions.items()
    ]
    kinds = {kind_of(record.image) or "image" for record in records}
    if len(kinds) > 1:
        raise UserError(f"{folder} has captions of pictures and of sounds, which need files of their own. Put them into two folders.")
    return records, kinds.pop(), bare


def load_fast_encoder(*settings):
    """Load an encoder as load_encoder does, with faster operators."""
    from models.operators import accelerate_model  # imports torch, which --help does without

    encoder = load_encoder(*settings)
    accelerate_model(encoder.module)
    return encoder


def write_features(records, kind, out, args, source, val_share):
    """Check the files, load the encoder once, write the feature file, or two of them."""
    check_images(records, args.max_skipped)
    files = plan_files(records, out, "train", val_share, args.seed)
    encoder = encoder_for(kind, load_fast_encoder, args)
    extract_files(files, encoder, args.seed, source=source, **extract_options(args))


def describe(folder, records, kind, bare):
    """Print what read_folder found."""
    noun = "pictures" if kind == "image" else "sounds"
    left_out = f"; {len(bare)} without a caption left out, such as {bare[0]}" if bare else ""
    print(f"{folder}: {len(records)} {noun} named, {sum(len(record.captions) for record in records)} captions{left_out}")


@one_line_errors
def main(argv=None):
    """Read a folder and its captions, encode, write the feature files."""
    args = parse_options(argv)
    records, kind, bare = read_folder(args.folder, args.caption_column)
    describe(args.folder, records, kind, bare)
    out = args.out or Path("data") / f"{args.folder.resolve().name or 'folder'}_{file_stem(args.clip_model_type)}_train.pkl"
    write_features(records, kind, out, args, args.folder, args.val_share)


if __name__ == "__main__":
    sys.exit(main())
