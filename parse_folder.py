"""Your own pictures or sounds with captions to feature files for training and validation.

    python parse_folder.py photos/                                    # data/photos_ViT-B_32_train.pkl and ..._val.pkl
    python parse_folder.py photos/ --val_share 0 --out mine.pkl       # one file
    python parse_folder.py more_photos/ --split test                  # data/more_photos_ViT-B_32_test.pkl
    python parse_folder.py recordings/ --clip_model_type ViT-B/32     # sounds, as spectrograms

Captions are in a metadata.csv or metadata.jsonl with file_name and caption (or text), in the folder or in any folder below it; file names
count from where it is. Several rows, or a list, give a picture several captions. Or they are in a .txt beside each picture (cat.jpg,
cat.txt), one per line. One picture in ten goes into the validation file, with all its captions, unless --split says that the folder is
held out as a whole.

Interrupted jobs resume when you run the same command again. Pictures that are missing or cannot be read are skipped and listed in
{out}.skipped.csv. docs/your-own-data.md shows the layouts.
"""

import os
import re
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract_options
from features.finder import walk
from features.image_ids import PICTURE_SUFFIXES, SOUND_SUFFIXES, name_images, printable_name
from features.own_data import add_own_data_options, encoder_for, extract_files, plan_files
from features.processes import together
from features.tables import decode_text, plain_name, read_table
from models.encoders import ENCODER_HELP, load_encoder

METADATA = ("metadata.csv", "metadata.jsonl")
VAL_SHARE = 0.1
EXPECTED = "a metadata.csv or metadata.jsonl with file_name and caption, or a .txt beside each picture"


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_folder.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("folder", type=Path, metavar="FOLDER", help="folder of pictures or sounds, and of their captions")
    group.add_argument("--split", choices=("train", "val", "test"), default="train",
                       help="what the folder is for; val and test are held out as a whole (default train)")  # fmt: skip
    add_own_data_options(parser, VAL_SHARE)
    add_options(parser, ENCODER_HELP)
    parser.set_defaults(val_share=None)
    args = parser.parse_args(argv)
    if args.val_share is None:
        args.val_share = VAL_SHARE if args.split == "train" else 0
    return args


def kind_of(path):
    """Return "image" or "audio" by a path's suffix, None for another."""
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in PICTURE_SUFFIXES else "audio" if suffix in SOUND_SUFFIXES else None


def read_folder(folder, caption_columns=None):
    """Read a folder and its captions.

    Args:
        folder: Path.
        caption_columns: names of the caption columns of the tables, or None.

    Returns:
        List of Record, with ids from features.image_ids; their kind, "image" or "audio"; list of the files without a caption.

    Raises:
        UserError: there is no such folder, nothing in it has a caption, a table lacks a column, or sounds and pictures are mixed.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}. Give a folder with {EXPECTED}.")
    captions, beside, items = {}, {}, []
    for place, names in walk(folder):
        tables = [name for name in METADATA if name in names]
        if len(tables) > 1:
            raise UserError(f"{place} holds {' and '.join(tables)}; expected one of them. Remove the other.")
        for table in tables:
            for path, texts in read_metadata(place / table, caption_columns):
                captions.setdefault(path, []).extend(texts)
        listed = set(names)
        for name in names:
            if kind_of(name):
                items.append(os.path.normpath(place / name))
                text = os.path.splitext(name)[0] + ".txt"
                if text in listed:
                    beside[items[-1]] = place / text
    read_beside({path: text for path, text in beside.items() if path not in captions}, captions)
    bare = [path for path in items if not any(text.strip() for text in captions.get(path, []))]
    if not any(text.strip() for texts in captions.values() for text in texts):
        raise UserError(f"{folder} holds {len(items)} pictures or sounds and no caption; expected {EXPECTED}.")
    ids = name_images(captions, [folder] * len(captions))
    records = [Record(image_id, path, [{"caption": text} for text in captions[path]]) for image_id, path in zip(ids, captions)]
    kinds = {kind_of(record.image) or "image" for record in records}
    if len(kinds) > 1:
        raise UserError(f"{folder} has captions of pictures and of sounds, which need files of their own. Put them into two folders.")
    return records, kinds.pop(), bare


def read_metadata(table, caption_columns):
    """Yield (path, captions) of each row of a table; a name may differ from the file's in its accents' form or in "\\" for "/"."""
    listings = {}
    for name, texts, _ in read_table(table, ["file_name"], caption_columns):
        path = table.parent / name
        if not os.path.exists(path):
            plain = table.parent / plain_name(name)
            if plain.parent not in listings:
                there = sorted(os.listdir(plain.parent), reverse=True) if plain.parent.is_dir() else []
                listings[plain.parent] = {plain_name(one): one for one in there}
            found = listings[plain.parent].get(plain.name)
            path = plain.parent / found if found else path
        yield os.path.normpath(path), texts


def read_beside(texts, captions):
    """Read the .txt files beside pictures, dict of path to .txt, into `captions`, dict of path to list of str."""
    foreign = []
    for path, text in texts.items():
        if not text.is_file():  # a FIFO would wait for ever
            continue
        content, encoding = decode_text(text.read_bytes())
        foreign += [(text, encoding)] * (not encoding.startswith("utf"))
        captions[path] = [line for line in re.split(r"[\r\n]+", content) if line.strip()]
    if foreign:
        print(f"{len(foreign)} .txt file(s) are not UTF-8; {foreign[0][0]}, for example, was read as {foreign[0][1]}")


def write_features(records, kind, out, args, source, val_share, split="train"):
    """Check the files, load the encoder once, write the feature file, or two of them."""
    from models.operators import accelerate_model  # imports torch, which --help does without

    check_images(records, args.max_skipped)
    files = plan_files(records, out, split, val_share, args.seed)
    encoder = encoder_for(kind, load_encoder, args)
    accelerate_model(encoder.module)
    extract_files(files, encoder, args.seed, source=source, **extract_options(args))


def describe(folder, records, kind, bare):
    """Print what read_folder found."""
    noun = "pictures" if kind == "image" else "sounds"
    left_out = f"; {len(bare)} without a caption left out, such as {printable_name(bare[0])}" if bare else ""
    print(f"{folder}: {len(records)} {noun} named, {sum(len(record.captions) for record in records)} captions{left_out}")


@one_line_errors
@together
def main(argv=None):
    """Read a folder and its captions, encode, write the feature files."""
    args = parse_options(argv)
    records, kind, bare = read_folder(args.folder, args.caption_column)
    describe(args.folder, records, kind, bare)
    name = printable_name(os.path.basename(os.path.realpath(args.folder))) or "folder"
    out = args.out or Path("data") / f"{name}_{file_stem(args.clip_model_type)}_{args.split}.pkl"
    write_features(records, kind, out, args, args.folder, args.val_share, args.split)


if __name__ == "__main__":
    sys.exit(main())
