"""Conceptual Captions → feature files: every picture encoded once, a caption beside it, dead and broken pictures counted and listed.

Everything under --data_root that is there, train and val, as published:

    python parse_conceptual.py --clip_model_type ViT-B/32 --data_root ./data/conceptual --num_threads 16
                                                         # → data/conceptual/conceptual_clip_ViT-B_32_train.pkl and …_val.pkl

It looks there for shards, train/*.tar and val/*.tar, and otherwise for Google's Train_GCC-training.tsv and
Validation_GCC-1.1.0-Validation.tsv with the pictures in train/ and val/. Other places, one split at a time:

    python parse_conceptual.py --shards 'cc3m/{00000..00331}.tar'                                 # img2dataset's webdataset shards
    python parse_conceptual.py --shards 'pipe:curl -s https://host/cc3m/{00000..00331}.tar'
    python parse_conceptual.py --tsv Validation_GCC-1.1.0-Validation.tsv --images cc3m_val --split val

Shards: pictures are read from the tars as their turn comes; piped ones are copied to {out}.shards first (room for all of them is needed)
and the copies removed at the end. Compressed tars are not read. What img2dataset could not fetch is listed from the .parquet beside a tar.

TSV: caption<TAB>address or caption<TAB>path of a picture below --images; a first line "caption<TAB>url" is a heading. For an address the
picture's file is the number of its row, from 0: 00000012.jpg, as the published script saved them, or 00000/000000012.jpg as img2dataset's
"files" form has it; any suffix, any number of zeros.

A caption gets its final full stop where it has none, as published. Dead links stop nothing; --max_skipped counts files that are there
and cannot be read. All are listed in {out}.skipped.csv. A run that was stopped goes on when started again.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options, whole_number
from features.shards import REMOTE, FetchError, expand_shards, fetch_shard, index_shard, read_failures
from models.encoders import load_encoder

ROOT = Path("data/conceptual")
TSV_NAMES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
NOT_PICTURES = (".txt", ".json", ".parquet", ".csv", ".tsv")


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_conceptual.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=Path, default=ROOT, metavar="FOLDER",
                       help=f"where the data set lies and the feature files go (default {ROOT})")  # fmt: skip
    group.add_argument("--shards", nargs="+", metavar="TARS", help="tar shards, braces allowed; pipe:COMMAND and http://… too")
    group.add_argument("--tsv", type=Path, metavar="FILE", help="captions and addresses, or captions and paths")
    group.add_argument("--images", type=Path, metavar="FOLDER", help="pictures of --tsv (default: the folder of the TSV)")
    group.add_argument("--split", nargs="+", choices=("train", "val"), metavar="SPLIT",
                       help="train val (default: those under --data_root; train for --shards and --tsv)")  # fmt: skip
    add_options(parser)
    group.add_argument("--num_threads", type=whole_number, dest="num_workers", default=None, metavar="N", help="the same as --num_workers")
    args = parser.parse_args(argv)
    if args.shards and args.tsv:
        parser.error("--shards and --tsv are two ways: give one")
    if args.images and not args.tsv:
        parser.error("--images goes with --tsv")
    if (args.shards or args.tsv) and len(args.split or ()) > 1:
        parser.error("--shards and --tsv are one split: give one --split")
    return args


def end_with_full_stop(caption):
    """A caption with a full stop at its end, no space before it; a blank one stays blank."""
    text = caption.strip()
    if text.endswith(" ."):
        text = text[:-1].rstrip()
    return text + "." if text and not text.endswith(".") else text


def read_shards(shards, folder):
    """Shards, copies of piped ones going to `folder` → records, [(image_id, path, reason)] of what is dead or broken."""
    from tqdm import tqdm

    records, missing, seen = [], [], {}
    for shard in tqdm(shards, unit=" shards", disable=None, dynamic_ncols=True):
        try:
            path = fetch_shard(shard, folder)
        except FetchError as error:
            missing.append(("", shard, f"could not be fetched: {error}"))
            print(f"{shard}: could not be fetched", file=sys.stderr)
            continue
        samples, fault = index_shard(path)
        if fault:
            missing.append(("", shard, fault))
            print(f"{shard}: {fault}; {len(samples)} entries before that are used", file=sys.stderr)
            if path != shard and not samples:
                os.unlink(path)  # a later run fetches it again
        dead = read_failures(path)
        missing += dead
        listed = {key for key, _, _ in dead}
        for key, caption, picture in samples:
            # Two downloads number their pictures alike: the later one's get their shard's name.
            image_id = key if seen.setdefault(key, shard) == shard else f"{shard}/{key}"
            if picture is None:
                missing += [(image_id, shard, "no picture beside its caption")] * (key not in listed)
            elif caption is None:
                missing.append((image_id, picture.key, "no caption"))
            else:
                records.append(Record(image_id, picture, [{"caption": end_with_full_stop(caption)}]))
    return records, missing


def read_tsv(path, images):
    """Google's TSV and a folder of pictures → records, [(image_id, path, reason)] of what has no picture."""
    if not path.is_file():
        raise UserError(f"no captions {path}. Give --tsv, or see data/README.md for where Conceptual Captions are.")
    if not images.is_dir():
        raise UserError(f"no folder of pictures {images}. Say where the pictures of {path} are with --images.")
    numbered = number_files(images)
    records, missing = [], []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        lines = (line.rstrip("\r\n").split("\t") for line in file)
        row = -1
        for fields in lines:
            if row < 0 and len(fields) >= 2 and fields[0].strip().lower() == "caption" and REMOTE.match(fields[1]) is None:
                continue  # a heading
            row += 1
            if fields == [""]:
                continue
            caption, where = (fields[0], fields[1].strip()) if len(fields) >= 2 else ("", "")
            image_id = f"{row:08d}"
            if not where:
                missing.append((image_id, f"{path}, row {row}", f"{len(fields)} fields; expected a caption and an address or a path"))
                continue
            picture = numbered.get(row) if REMOTE.match(where) else str(images / where)
            if picture is None or not os.path.isfile(picture):
                missing.append((image_id, where, "no picture (a dead link)" if picture is None else "no such file"))
                continue
            records.append(Record(image_id, picture, [{"caption": end_with_full_stop(caption)}]))
    if not records and missing:
        raise UserError(f"none of the {len(missing)} rows of {path} has a picture in {images}: row 0 should be 00000000.jpg or "
                        "00000/000000000.jpg, or its path as the TSV has it. Say where they are with --images.")  # fmt: skip
    return records, missing


def number_files(folder):
    """Pictures in a folder and the folders in it, by the number that is their name → {number: path}."""
    numbered = {}
    with os.scandir(folder) as entries:
        folders = [folder, *sorted(entry.path for entry in entries if entry.is_dir())]
    for place in folders:
        for name in sorted(os.listdir(place)):
            stem, suffix = os.path.splitext(name)
            if not stem.isdecimal() or not suffix or suffix.lower() in NOT_PICTURES:
                continue
            first = numbered.setdefault(int(stem), os.path.join(place, name))
            if first != os.path.join(place, name):
                raise UserError(f"two pictures have the number {int(stem)}: {first} and {os.path.join(place, name)}. Keep one of them.")
    return numbered


def find_splits(args):
    """What to read → list of (split, "shards" or "tsv", where: addresses, or a TSV and its folder of pictures)."""
    if args.shards:
        return [((args.split or ["train"])[0], "shards", expand_shards(args.shards))]
    if args.tsv:
        return [((args.split or ["train"])[0], "tsv", (args.tsv, args.images or args.tsv.parent))]
    found = []
    for split in dict.fromkeys(args.split or TSV_NAMES):
        shards, tsv = sorted(map(str, (args.data_root / split).glob("*.tar"))), args.data_root / TSV_NAMES[split]
        if shards:
            found.append((split, "shards", shards))
        elif tsv.is_file() or args.split:
            found.append((split, "tsv", (tsv, args.data_root / split)))
    if not found:
        raise UserError(f"nothing of Conceptual Captions under {args.data_root}: expected train/*.tar, or {TSV_NAMES['train']} with the "
                        "pictures in train/ (likewise val). Say where it is with --data_root, --shards or --tsv.")  # fmt: skip
    if args.out and len(found) > 1:
        raise UserError("--out names one file, and both train and val are there. Give one --split, or no --out.")
    return found


def _copies(out):
    """The folder for copies of piped shards; it goes when the feature file stands."""
    return out.with_name(out.name + ".shards")


@one_line_errors
def main(argv=None):
    """Read each split by itself, find the pictures, encode them, write its feature file."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    splits = find_splits(args)
    outs = [args.out or args.data_root / f"conceptual_clip_{file_stem(args.clip_model_type)}_{split}.pkl" for split, _, _ in splits]
    found = []
    for (_, kind, where), out in zip(splits, outs):
        records, missing = read_shards(where, _copies(out)) if kind == "shards" else read_tsv(*where)
        if not records and missing:
            raise UserError(f"no picture with a caption for {out}: {missing[0][1]}, for example: {missing[0][2]}.")
        check_images(records, args.max_skipped)
        found.append((records, missing))
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
    accelerate_model(encoder.module)
    for (split, kind, where), out, (records, missing) in zip(splits, outs, found):
        source = where[0] if kind == "tsv" or len(where) == 1 else f"{where[0]} … {where[-1]}"
        extract(records, encoder, out, source=source, split=split, missing=missing, **extract_options(args))
        shutil.rmtree(_copies(out), ignore_errors=True)
    train = next((out for (split, _, _), out in zip(splits, outs) if split == "train"), outs[0])
    print(f"next: python train.py --data {shlex.quote(str(train))} --out_dir ./conceptual_train/")


if __name__ == "__main__":
    sys.exit(main())
