"""What the front doors for anyone's own data share: which columns hold captions, pictures or sounds, a train and a validation file."""

import argparse
import math
import re
import shlex
import shutil

from common import UserError
from features.extract import extract, merge_records
from features.splits import split_by_image

# The usual names of a caption column, the likeliest first; and numbered ones, all of which are taken (caption_1 … caption_5).
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences", "description", "descriptions", "alt_text", "txt", "raw")
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence|comment|raw)_?\d+", re.IGNORECASE)


def add_own_data_options(parser, val_share=0.0):
    """Add the options these front doors have in common; `val_share` is the default of --val_share."""
    group = parser.add_argument_group("captions and splits")
    group.add_argument("--caption_column", nargs="+", metavar="NAME", help="column(s) with captions (default: found by the usual names)")
    group.add_argument("--val_share", type=share, default=val_share, metavar="X",
                       help=f"share of the images for a validation file beside the other; 0: none (default {val_share:g})")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw of --val_share (default 0)")
    group.add_argument("--spectrogram", choices=("mel", "published"), default="mel", help="of sounds, for an image encoder (default mel)")


def share(text):
    """ "0.1" → 0.1, a share from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


def find_caption_columns(columns, wanted, where):
    """Names of a table's columns, and those the user named or None → the names of the caption columns, as the table writes them.

    where: what the table is called in an error. Raises UserError naming the columns there are when none fits.
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
        raise UserError(f"{where} has no column {missing}; it has {', '.join(columns) or 'none'}. Name one with --caption_column.")
    return found


def texts_of(value):
    """What stands in a caption cell → list of str: a text, a list of texts, or a dict with one (COCO's sentences hold theirs as "raw").

    Nothing (None, NaN) is no text. Raises ValueError for numbers and the like.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        key = next((name for name in ("raw", *CAPTION_COLUMNS) if name in value), None)
        if key is not None:
            return texts_of(value[key])
    elif isinstance(value, (list, tuple)):
        return [text for item in value for text in texts_of(item)]
    raise ValueError(f"a {type(value).__name__} ({str(value)[:40]})")


def encoder_for(kind, load, args):
    """Load the encoder that the command line asks for, as one for records of `kind` "image" or "audio".

    load: models.encoders.load_encoder; args: what add_options and add_own_data_options read.

    Raises UserError when the encoder takes sounds and the records are pictures.
    """
    encoder = load(args.clip_model_type, args.device, args.mixed_precision, "pooled" if kind == "audio" else args.pooling)
    hears = getattr(encoder, "modality", "image") == "audio"
    if kind == "audio":
        from features.audio import sound_encoder

        return sound_encoder(encoder, "waveform" if hears else args.spectrogram, args.pooling)
    if hears:
        raise UserError(f"{encoder.name} takes sounds, and these are pictures. Take an image encoder, such as --clip_model_type ViT-B/32.")
    return encoder


def plan_files(records, out, split="train", val_share=0.0, seed=0):
    """Deal records out by image → list of (split, path, records): one file, or the validation file and the other.

    The validation file lies beside `out`, its name ending in _val. Raises UserError when there are too few images for two files.
    """
    if not val_share:
        return [(split, out, records)]
    if split == "val":
        raise UserError("--val_share takes images out for a validation file, and --split val is one. Give one of the two.")
    ids = [record.image_id for record in merge_records(records)[0]]
    if len(ids) < 2:
        raise UserError(f"{len(ids)} image(s) with a caption cannot be split in two. Give more images, or --val_share 0.")
    held_out = split_by_image(ids, {split: 1 - val_share, "val": val_share}, seed)["val"]
    val_out = out.with_name(f"{out.stem.removesuffix('_' + split)}_val{out.suffix}")
    return [
        ("val", val_out, [record for record in records if record.image_id in held_out]),
        (split, out, [record for record in records if record.image_id not in held_out]),
    ]


def extract_files(files, encoder, seed=0, **options):
    """Write the files that plan_files planned with `seed`, through extract with `options`, and print how to train on them.

    What a stopped run has encoded, of a file already written too, is not encoded again.
    """
    more_meta = {"split_seed": seed} if len(files) > 1 else None
    for split, out, records in files:
        extract(records, encoder, out, split=split, more_meta=more_meta, keep_pieces=len(files) > 1, **options)
    for _, out, _ in files:
        shutil.rmtree(out.with_name(out.name + ".pieces"), ignore_errors=True)
    train_out = shlex.quote(str(files[-1][1]))
    validation = f" --val_data {shlex.quote(str(files[0][1]))}" if len(files) > 1 else ""
    print(f"next: python train.py --data {train_out}{validation} --out_dir ./data_train/")
