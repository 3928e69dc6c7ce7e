"""Conceptual Captions to feature files: each picture is encoded once, with a caption; missing and broken pictures are counted and listed.

Everything that is under --data_root, train and val, as published; to data/conceptual/conceptual_clip_ViT-B_32_train.pkl and ..._val.pkl:

    python parse_conceptual.py --clip_model_type ViT-B/32 --data_root ./data/conceptual --num_threads 16

It looks there for shards, train/*.tar and val/*.tar, and otherwise for Google's Train_GCC-training.tsv and
Validation_GCC-1.1.0-Validation.tsv with the pictures in train/ and val/. For other places, give one split at a time:

    python parse_conceptual.py --shards 'cc3m/{00000..00331}.tar'                                 # img2dataset's webdataset shards
    python parse_conceptual.py --shards 'pipe:curl -s https://host/cc3m/{00000..00331}.tar'
    python parse_conceptual.py --tsv Validation_GCC-1.1.0-Validation.tsv --images cc3m_val --split val

Shards: pictures are read from the tars when they are encoded. Piped and compressed (.tar.gz) shards are first copied to {out}.shards, where
room for all of them is needed, and the copies are removed at the end. What img2dataset could not download is listed from the .parquet
beside a tar.

TSV: caption<TAB>address, or caption<TAB>path of a picture below --images; a first line "caption<TAB>url" is a heading. For an address the
picture's file is the number of its row, from 0: 00000012.jpg, as the published script saved them, or 00000/000000012.jpg, as img2dataset's
"files" form has it; any suffix, any number of zeros.

A caption gets a final full stop where it has none, as published. Dead links stop nothing; --max_skipped counts files that exist and cannot
be read. All are listed in {out}.skipped.csv. Interrupted jobs resume when you run the same command again.
"""

import contextlib
import os
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from features.options import whole_number
from features.own_data import suggest_next
from features.processes import current, together
from features.record_table import RecordTable
from features.shards import REMOTE, FetchError, expand_shards, fetch_shard, index_shard, read_failures, remove_copies
from features.tables import read_text
from models.encoders import ENCODER_HELP, load_encoder

ROOT = Path("data/conceptual")
TSV_NAMES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
NOT_PICTURES = (".txt", ".json", ".parquet", ".csv", ".tsv")


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_conceptual.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=Path, default=ROOT, metavar="FOLDER",
                       help=f"folder of the data set and of the feature files (default {ROOT})")  # fmt: skip
    group.add_argument("--shards", nargs="+", metavar="TARS", help="tar shards; braces, pipe:COMMAND and http://... are allowed")
    group.add_argument("--tsv", type=Path, metavar="FILE", help="table of captions and addresses, or captions and paths")
    group.add_argument("--images", type=Path, metavar="FOLDER", help="pictures of --tsv (default: the folder of the TSV)")
    group.add_argument("--split", nargs="+", choices=("train", "val"), metavar="SPLIT",
                       help="train, val or both (default: those under --data_root; train for --shards and --tsv)")  # fmt: skip
    add_options(parser, ENCODER_HELP)
    group.add_argument("--num_threads", type=whole_number, dest="num_workers", metavar="N", help="published name of --num_workers")
    args = parser.parse_args(argv)
    if args.shards and args.tsv:
        parser.error("--shards and --tsv are two ways: give one")
    if args.images and not args.tsv:
        parser.error("--images goes with --tsv")
    if (args.shards or args.tsv) and len(args.split or ()) > 1:
        parser.error("--shards and --tsv are one split: give one --split")
    return args


def end_with_full_stop(caption):
    """Return a caption with a full stop at its end and no space before it; a blank one stays blank."""
    text = caption.strip()
    if text.endswith(" ."):
        text = text[:-1].rstrip()
    return text + "." if text and not text.endswith(".") else text


def _fetch(shard, folder):
    """Copy a shard where it cannot be read in place. Returns its path, and why there is none."""
    try:
        return fetch_shard(shard, folder), None
    except FetchError as error:
        return None, str(error)


def read_shards(shards, folder):
    """Read shards; copies of piped ones go to `folder`. Returns records, and [(image_id, path, reason)] of what is dead or broken."""
    from tqdm import tqdm

    records, missing, seen = RecordTable(), [], {}
    for shard in tqdm(shards, unit=" shards", disable=None, dynamic_ncols=True):
        path, reason = current().first_does(_fetch, shard, folder)
        if reason:
            missing.append(("", shard, f"could not be fetched: {reason}"))
            print(f"{shard}: could not be fetched", file=sys.stderr)
            continue
        samples, fault = index_shard(path)
        if fault:
            missing.append(("", shard, fault))
            print(f"{shard}: {fault}; {len(samples)} entries before that are used", file=sys.stderr)
            if path != shard and not samples and current().is_first:
                os.unlink(path)  # a later run fetches it again
        dead = read_failures(path)
        missing += dead
        listed = {key for key, _, _ in dead}
        for key, captions, picture in samples:
            # Two downloads number their pictures alike: the later one's get their shard's name.
            image_id = key if seen.setdefault(key, shard) == shard else f"{shard}/{key}"
            if picture is None:
                missing += [(image_id, shard, "no picture beside its caption")] * (key not in listed)
            elif not captions:
                missing.append((image_id, picture.place, "no caption"))
            else:
                records.append(Record(image_id, picture, [{"caption": end_with_full_stop(caption)} for caption in captions]))
    return records, missing


def read_tsv(path, images):
    """Read Google's TSV and a folder of pictures. Returns records, and [(image_id, path, reason)] of what has no picture."""
    text = read_text(path, "Give --tsv, or see data/README.md for where Conceptual Captions are.")
    if not images.is_dir():
        raise UserError(f"no folder of pictures {images}. Say where the pictures of {path} are with --images.")
    numbered = number_files(images)
    records, missing = RecordTable(), []
    row = -1
    for line in text.split("\n"):
        fields = line.rstrip("\r").split("\t")
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
    """Find the pictures in a folder and the folders in it that have a number as name. Returns dict of number to path."""
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
    """Find what to read. Returns list of (split, "shards" or "tsv", addresses of shards or a TSV and its folder of pictures)."""
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
        raise UserError(f"no Conceptual Captions under {args.data_root}: expected train/*.tar, or {TSV_NAMES['train']} with the "
                        "pictures in train/ (likewise val). Say where it is with --data_root, --shards or --tsv.")  # fmt: skip
    if args.out and len(found) > 1:
        raise UserError("--out names one file, and both train and val are there. Give one --split, or no --out.")
    return found


def _copies(out):
    """Return the folder for copies of piped shards, which are removed when the feature file is written."""
    return out.with_name(out.name + ".shards")


@one_line_errors
@together
def main(argv=None):
    """Read each split, find the pictures, encode them, write the feature files."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    splits = find_splits(args)
    outs = [args.out or args.data_root / f"conceptual_clip_{file_stem(args.clip_model_type)}_{split}.pkl" for split, _, _ in splits]
    with contextlib.ExitStack() as claims:
        found = []
        for (_, kind, where), out in zip(splits, outs):
            claims.enter_context(current().claim(_copies(out)))
            records, missing = read_shards(where, _copies(out)) if kind == "shards" else read_tsv(*where)
            if not records and missing:
                raise UserError(f"no picture with a caption for {out}: {missing[0][1]}, for example: {missing[0][2]}.")
            check_images(records, args.max_skipped)
            found.append((records, missing))
        encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
        accelerate_model(encoder.module)
        for (split, kind, where), out, (records, missing) in zip(splits, outs, found):
            source = where[0] if kind == "tsv" or len(where) == 1 else f"{where[0]} ... {where[-1]}"
            extract(records, encoder, out, source=source, split=split, missing=missing, **extract_options(args))
            current().first_does(remove_copies, _copies(out))
    suggest_next({split: out for (split, _, _), out in zip(splits, outs)}, "./conceptual_train/")


if __name__ == "__main__":
    sys.exit(main())
