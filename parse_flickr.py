"""Flickr30k or Flickr8k captions → feature files for train, val and test, split by image: each picture encoded once.

    python parse_flickr.py                                         # data/flickr30k/results.csv, pictures in flickr30k_images/
                                                                   # → data/flickr30k/oscar_split_ViT-B_32_{train,val,test}.pkl
    python parse_flickr.py --annotations data/flickr8k/Flickr8k.token.txt         # → data/flickr8k/oscar_split_ViT-B_32_….pkl
    python parse_flickr.py --annotations data/flickr30k/dataset_flickr30k.json    # Karpathy's splits: 1,014 for val, 1,000 for test

The annotations are known by what is in them: Flickr30k's results.csv ("image_name| comment_number| comment"), its .token file and
Flickr8k's Flickr8k.token.txt ("name.jpg#0<TAB>caption"), Flickr8k's captions.txt ("image,caption"), or Karpathy's JSON of either.

Karpathy's JSON has its own splits. The others are dealt out by image: --val_share 0.13 --test_share 0.03 --seed 0; no image stands on two
sides. A share of 0 writes no such file. --out x.pkl writes x_train.pkl, x_val.pkl and x_test.pkl. Pictures that cannot be read, and lines
that are no caption, are skipped and listed in {out}.skipped.csv. A run that was stopped goes on when started again.
"""

import csv
import math
import re
import shlex
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.annotations import KARPATHY_FORM, is_karpathy, read_json, read_karpathy
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from features.splits import split_by_image
from models.encoders import load_encoder

DATA = Path("data")
ANNOTATIONS = DATA / "flickr30k" / "results.csv"
ANNOTATIONS_IN_ARCHIVE = DATA / "flickr30k" / "flickr30k_images" / "results.csv"  # where Kaggle's archive has it
FOLDERS = ("flickr30k_images", "flickr30k-images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
FORMS = 'results.csv ("image_name| comment_number| comment"), a .token file ("name.jpg#0<TAB>caption"), captions.txt or Karpathy\'s JSON'
SPLITS = ("train", "val", "test")
BAD_SHARE = 0.01  # of the lines of a file: more, and it is another file
TOKEN_LINE = re.compile(r"(.+?)#\d+\s+(.*)")
# "2199200615.jpg| 4   A dog runs …": the one row of results.csv whose second bar is missing.
NUMBER_AND_TEXT = re.compile(r"\s*\d+\s+(.*)")


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_flickr.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--annotations", type=Path, metavar="FILE", help=f"captions (default {ANNOTATIONS})")
    group.add_argument("--images", type=Path, metavar="FOLDER",
                       help="pictures (default: beside the captions: flickr30k_images/, Flicker8k_Dataset/, Images/ …)")  # fmt: skip
    group.add_argument("--val_share", type=share, metavar="S", help="share of the images for validation (default 0.13)")
    group.add_argument("--test_share", type=share, metavar="S", help="share of the images for testing (default 0.03)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    add_options(parser)
    args = parser.parse_args(argv)
    args.annotations = args.annotations or (ANNOTATIONS_IN_ARCHIVE if ANNOTATIONS_IN_ARCHIVE.is_file() else ANNOTATIONS)
    return args


def share(text):
    """ "0.13" or "13%" → 0.13."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def read_captions(path):
    """Annotations in any of the forms → {file name: captions}, {split: file names} or None, [(image_id, path, reason)] of bad lines.

    Raises UserError when the file is missing or in none of the forms.
    """
    if not path.is_file():
        raise UserError(f"no captions {path}. Give them with --annotations; data/README.md says where Flickr30k and Flickr8k are.")
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        start = file.read(100)
        if start.lstrip().startswith("{"):
            return read_karpathy_splits(path)
        heading = start.partition("\n")[0].replace(" ", "").strip().lower()
        file.seek(0)
        if TOKEN_LINE.fullmatch(start.partition("\n")[0].strip()):
            return gather(path, map(split_token_line, file), headed=False)
        if heading == "image,caption":
            return gather(path, ((row[0], ",".join(row[1:])) if len(row) > 1 else None for row in csv.reader(file)), headed=True)
        if "|" in heading:
            return gather(path, map(split_at_bars, file), headed=heading.startswith("image_name|"))
    raise UserError(f"{path} starts with {start.partition(chr(10))[0][:60]!r}; expected {FORMS}. Give another file with --annotations.")


def split_at_bars(line):
    """A line of results.csv → file name, caption; None when it is neither of the two forms."""
    name, *rest = line.split("|", 2)
    if len(rest) == 2 and rest[0].strip().isdecimal():
        return name, rest[1]
    shifted = NUMBER_AND_TEXT.fullmatch(rest[0].rstrip()) if len(rest) == 1 else None
    return (name, shifted[1]) if shifted else None


def split_token_line(line):
    """A line of a .token file → file name, caption; None when it is no such line. One name there is "….jpg.1" for "….jpg"."""
    parts = TOKEN_LINE.fullmatch(line.strip())
    return (re.sub(r"(\.jpe?g)\.\d+$", r"\1", parts[1]), parts[2]) if parts else None


def gather(path, rows, headed):
    """(file name, caption) or None a line → what read_captions gives. Raises UserError when too many lines are bad."""
    captions, bad, lines = {}, [], 0
    for number, row in enumerate(rows, 1):
        if headed and number == 1:
            continue
        lines += 1
        if row is None or not row[0].strip():
            bad.append(("", f"{path}, line {number}", "not a name, a number and a caption"))
            continue
        every = captions.setdefault(row[0].strip(), [])
        every.append({"caption": row[1].strip()})
    if len(bad) > max(1, math.ceil(BAD_SHARE * lines)):
        raise UserError(f"{len(bad)} of {lines} lines hold no caption, {bad[0][1]} the first; expected {FORMS}. Give another file.")
    return captions, None, bad


def read_karpathy_splits(path):
    """Karpathy's JSON → as read_captions, with its splits; restval counts to train."""
    content = read_json(path, KARPATHY_FORM)
    if not is_karpathy(content):
        raise UserError(f"{path} is JSON of another form; expected {KARPATHY_FORM}. Give another file with --annotations.")
    captions, splits = {}, {split: set() for split in SPLITS}
    for split, name, _, sentences in read_karpathy(content, path):
        split = "train" if split == "restval" else split
        if split not in splits:
            raise UserError(f"{path} has the split {split!r} for {name}; expected train, val or test. Download it again.")
        captions[name] = sentences
        splits[split].add(name)
    return captions, splits, []


def find_folder(annotations, given):
    """The folder of the pictures: as given, or the first of the usual ones beside the annotations, or the annotations' own."""
    if given and not given.is_dir():
        raise UserError(f"no folder {given}. Say where the pictures are with --images.")
    if given:
        return given
    beside = (annotations.parent / name / inner for name in FOLDERS for inner in (name, ""))  # Kaggle nests them twice
    return next((folder for folder in beside if folder.is_dir()), annotations.parent)


@one_line_errors
def main(argv=None):
    """Read the captions, deal the images out, encode each split with one encoder, write the feature files."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    captions, splits, bad = read_captions(args.annotations)
    val, test = args.val_share, args.test_share
    if splits is None:
        val, test = 0.13 if val is None else val, 0.03 if test is None else test
        if val + test >= 1:
            raise UserError(f"--val_share {val} and --test_share {test} leave nothing to train on. Give smaller shares.")
        splits = split_by_image(captions, {"train": 1 - val - test, "val": val, "test": test}, args.seed)
    elif val is not None or test is not None:
        raise UserError(f"{args.annotations} has splits of its own: leave --val_share and --test_share out.")
    folder = find_folder(args.annotations, args.images)
    eight = "8k" in f"{args.annotations.parent.name} {args.annotations.name}".lower()
    base = args.out or DATA / ("flickr8k" if eight else "flickr30k") / f"oscar_split_{file_stem(args.clip_model_type)}.pkl"
    records = {
        split: [Record(Path(name).stem, str(folder / name), every) for name, every in captions.items() if name in splits[split]]
        for split in SPLITS
        if splits[split]
    }
    check_images([record for every in records.values() for record in every], args.max_skipped)
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
    accelerate_model(encoder.module)
    outs = {split: base.with_name(f"{base.stem}_{split}{base.suffix}") for split in records}
    for split, every in records.items():
        options = extract_options(args) | {"missing": bad if split == "train" else ()}
        extract(every, encoder, outs[split], source=args.annotations, split=split, **options)
    first = outs.get("train") or next(iter(outs.values()))
    val_data = f" --val_data {shlex.quote(str(outs['val']))}" if "val" in outs and "train" in outs else ""
    print(f"next: python train.py --data {shlex.quote(str(first))}{val_data} --out_dir ./flickr_train/")


if __name__ == "__main__":
    sys.exit(main())
