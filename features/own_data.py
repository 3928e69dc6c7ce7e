"""What the scripts for anyone's own data share: options, splits by image, a training and a validation file, and what to run next."""

import hashlib
import shlex

from common import UserError
from features.extract import extract
from features.options import share
from features.pieces import remove_pieces
from features.processes import current
from features.records import merge_records


def add_own_data_options(parser, val_share=0.0):
    """Add the options that these scripts share; `val_share` is the default of --val_share."""
    group = parser.add_argument_group("captions and splits")
    group.add_argument("--caption_column", nargs="+", metavar="NAME", help="column(s) with captions (default: found by the usual names)")
    group.add_argument("--val_share", type=share, default=val_share, metavar="X",
                       help=f"share of the images for a validation file; 0 for none (default {val_share:g})")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the train/validation split (default 0)")
    group.add_argument("--spectrogram", choices=("mel", "published"), default="mel",
                       help="how a sound becomes a picture for an image encoder (default mel)")  # fmt: skip


def encoder_for(kind, load, args):
    """Load the encoder that the command line asks for.

    Args:
        kind: "image" or "audio", what the records are.
        load: function with the arguments of models.encoders.load_encoder.
        args: what add_options and add_own_data_options read.

    Returns:
        Encoder, or SoundEncoder for "audio".

    Raises:
        UserError: the encoder takes sounds and the records are pictures.
    """
    encoder = load(args.clip_model_type, args.device, args.mixed_precision, "pooled" if kind == "audio" else args.pooling)
    if kind == "audio":
        from features.audio import sound_encoder

        return sound_encoder(encoder, "waveform" if encoder.modality == "audio" else args.spectrogram, args.pooling)
    if encoder.modality == "audio":
        raise UserError(f"{encoder.name} takes sounds, and these are pictures. Use an image encoder, such as --clip_model_type ViT-B/32.")
    return encoder


def split_by_image(image_ids, shares, seed=0):
    """Deal images out to splits. No image is in two of them.

    Args:
        image_ids: iterable of ids, repeats allowed.
        shares: dict of split name to share; they add up to 1. Every split with a share above 0 gets at least one image.
        seed: the result depends on the seed and the set of ids alone, not on their order.

    Returns:
        dict of split name to set of image ids.

    Raises:
        UserError: there are fewer images than splits that need one.
    """
    wanted = [name for name, share_of_it in shares.items() if share_of_it > 0]
    if not wanted or any(one < 0 for one in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"shares of a split are {shares}; expected numbers from 0 that add up to 1.")

    def place(image_id):
        return hashlib.blake2b(f"{seed} {image_id}".encode("utf-8", "surrogateescape"), digest_size=8).digest()

    order = sorted({str(image_id): image_id for image_id in image_ids}.values(), key=place)
    if len(order) < len(wanted):
        raise UserError(f"{len(order)} images cannot be split into {', '.join(wanted)}. Give more images, or fewer splits.")
    splits, start, share_so_far = {name: set() for name in shares}, 0, 0.0
    for number, name in enumerate(wanted, 1):
        share_so_far += shares[name]
        end = len(order) if number == len(wanted) else round(share_so_far * len(order))
        end = min(max(end, start + 1), len(order) - (len(wanted) - number))  # at least one for this split, and for each that follows
        splits[name] = set(order[start:end])
        start = end
    return splits


def plan_files(records, out, split="train", val_share=0.0, seed=0):
    """Deal records out by image to one file, or to a validation file and the other.

    Args:
        records: list of Record.
        out: path of the file; the validation file lies beside it, its name ending in _val.
        split: name of the split that `out` holds.
        val_share: share of the images for the validation file.
        seed: of that choice.

    Returns:
        List of (split, path, records).

    Raises:
        UserError: there are too few images for two files.
    """
    if not val_share:
        return [(split, out, records)]
    if split == "val":
        raise UserError("--val_share takes images out for a validation file, and --split val is one. Give one of the two.")
    ids = [record.image_id for record in merge_records(records).records]
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

    An interrupted job does not encode again what it has encoded, also of a file that was already written.
    """
    more_meta = {"split_seed": seed} if len(files) > 1 else None
    for split, out, records in files:
        extract(records, encoder, out, split=split, more_meta=more_meta, keep_pieces=len(files) > 1, **options)
    for _, out, _ in files:
        current().first_does(remove_pieces, out)
    suggest_next({split: out for split, out, _ in files})


def suggest_next(outs, out_dir="./data_train/"):
    """Print the command that comes next: training, with validation where there is such a file; or evaluation.

    Args:
        outs: dict of split name to the path of its feature file.
        out_dir: folder for checkpoints that the command names.
    """
    held_out = {split: out for split, out in outs.items() if split.split("_")[0] in ("val", "validation", "test", "dev")}
    train = next((out for split, out in outs.items() if split not in held_out), None)
    if train is None:
        data = shlex.quote(str(next(iter(outs.values()))))
        print(f"next: python evaluate.py --data {data} --checkpoint CHECKPOINT   (or train.py ... --val_data {data})")
        return
    val = next((out for split, out in held_out.items() if split.startswith("val")), None)
    validation = f" --val_data {shlex.quote(str(val))}" if val else ""
    print(f"next: python train.py --data {shlex.quote(str(train))}{validation} --out_dir {out_dir}")
