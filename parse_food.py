"""Pictures of food with captions to a feature file: parse_folder.py with the food set's layout and names.

    python parse_food.py --clip_model_type ViT-B/32          # data/ViT-B_32_train.pkl, 512 wide
    python parse_food.py --clip_model_type RN50x4            # data/RN50x4_train.pkl, 640 wide
    python parse_food.py --train_size 0.9                    # nine images in ten; the others in data/ViT-B_32_val.pkl
    python parse_food.py --data_path my_food/                # another folder

--data_path holds the set as Kaggle's archive unpacks it, archive/Captions.csv (Index,Captions) and archive/dataset/{Index}.jpg, or these
without the archive/, or pictures with captions in a layout parse_folder.py reads. Captions of --token_limit characters or more
are left out.
"""

import os
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import Record, add_options
from features.options import share_above_0
from features.processes import together
from features.tables import read_table
from models.encoders import ENCODER_HELP
from parse_folder import EXPECTED, describe, read_folder, write_features

CAPTIONS = "Captions.csv"
PICTURES = "dataset"
SUFFIXES = (".jpg", ".jpeg", ".png")


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_food.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", type=Path, default=Path("data/food"), metavar="FOLDER", help="the unpacked set (default data/food)")
    group.add_argument("--token_limit", type=int, default=240, metavar="N",
                       help="leave out captions of N characters or more; 0 keeps all (default 240)")  # fmt: skip
    group.add_argument("--train_size", type=share_above_0, default=1.0, metavar="X",
                       help="share of the images to train on; the others go into a validation file (default 1: all)")  # fmt: skip
    group.add_argument("--caption_column", nargs="+", metavar="NAME", help=f"column(s) with captions (default Captions in {CAPTIONS})")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split by --train_size (default 0)")
    add_options(parser, ENCODER_HELP)
    parser.set_defaults(spectrogram="mel")
    return parser.parse_args(argv)


def read_kaggle(table, caption_columns=None):
    """Read Kaggle's Captions.csv, with the pictures in dataset/ beside it.

    Args:
        table: path of the CSV. An Index is a number or a name, with or without the suffix of its picture.
        caption_columns: names of the caption columns, or None.

    Returns:
        List of Record; an image_id is the Index.

    Raises:
        UserError: a column or the folder is missing.
    """
    folder = table.parent / PICTURES
    if not folder.is_dir():
        raise UserError(f"no folder {folder} beside {table}; expected the pictures there. Unpack the whole archive.")
    files = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        files[name] = name
        if suffix.lower() in SUFFIXES:
            files.setdefault(stem, name)
    captions = {}
    for index, texts, _ in read_table(table, ["Index"], caption_columns):
        captions.setdefault(index, []).extend(texts)
    return [
        Record(index, str(folder / files.get(index, f"{index}.jpg")), [{"caption": text} for text in texts])
        for index, texts in captions.items()
    ]


def read_food(data_path, caption_columns=None):
    """Read --data_path. Returns records. Raises UserError when it has neither Kaggle's layout nor one of parse_folder.py."""
    for place in (data_path, data_path / "archive"):
        if (place / CAPTIONS).is_file():
            return read_kaggle(place / CAPTIONS, caption_columns)
    if not data_path.is_dir():
        raise UserError(f"no folder {data_path}; expected archive/{CAPTIONS} in it, or {EXPECTED}. Unpack it there, or give --data_path.")
    records, kind, bare = read_folder(data_path, caption_columns)
    if kind != "image":
        raise UserError(f"{data_path} holds sounds; expected pictures. Sounds go through parse_folder.py.")
    describe(data_path, records, kind, bare)
    return records


def leave_out_long(records, limit):
    """Leave out captions of `limit` characters or more, and pictures that have no other. Returns records, and how many captions went."""
    kept = [record._replace(captions=[row for row in record.captions if len(row["caption"]) < limit]) for record in records]
    dropped = sum(len(record.captions) for record in records) - sum(len(record.captions) for record in kept)
    return [after for before, after in zip(records, kept) if after.captions or not before.captions], dropped


@one_line_errors
@together
def main(argv=None):
    """Read the food set, encode, write the feature file, or two with --train_size."""
    args = parse_options(argv)
    records = read_food(args.data_path, args.caption_column)
    if args.token_limit > 0:
        records, dropped = leave_out_long(records, args.token_limit)
        if dropped:
            print(f"{dropped} captions of {args.token_limit} characters or more left out")
    out = args.out or Path("data") / f"{file_stem(args.clip_model_type)}_train.pkl"
    write_features(records, "image", out, args, args.data_path, 1 - args.train_size)


if __name__ == "__main__":
    sys.exit(main())
