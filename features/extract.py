"""Images → one feature file: each image encoded once, in batches, going on where a killed run stopped.

A parse script turns its data set into Records, hands them here with an encoder, and is done:

    add_options(parser)                            the options every parse script has
    check_images(records, max_skipped)             are the pictures there? (before minutes of loading weights)
    extract(records, encoder, out, **extract_options(args), source=…, split=…)

While it runs, finished batches are kept as pieces in the folder {out}.pieces; the same command run again goes on from them. Batches
are cut by record, so the result has the same bytes however often it was interrupted and whatever the number of workers.
An image that cannot be read is skipped, counted, and listed in {out}.skipped.csv. Letters: B batch, D width.
"""

import argparse
import collections
import contextlib
import copy
import csv
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

from common import UserError, replace_file
from features.directory import check_replaceable, is_directory_name
from features.embeddings import MappedEmbeddings
from features.gathered import CaptionRows
from features.loading import Pictures, encode_batch, make_loader
from features.pieces import Pieces, fingerprint
from features.store import save_features

# image_id: str or int; image: path, the bytes of a file, or an object with read() → one of these, called where the picture is needed, and
# a str `key` that stands for its content; captions: dicts with at least "caption", whose other keys are kept.
Record = collections.namedtuple("Record", "image_id image captions")

LEAST_ALLOWED = 10  # bad images that never stop a job, when the limit is given as a share
SKIPPED_COLUMNS = ("image_id", "path", "reason")


def add_options(parser):
    """Add the options all parse scripts have. Defaults of None: --out is the script's to choose, --num_workers goes by the machine."""
    group = parser.add_argument_group("features")
    group.add_argument("--clip_model_type", default="ViT-B/32", metavar="NAME",
                       help="encoder: RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B/32 ViT-B/16 ViT-L/14 ViT-L/14@336px, "
                            "tinyvit timm:NAME open_clip:ARCH/PRETRAINED hf:REPO_OR_DIR clap:REPO_OR_DIR (sounds), or the path of a CLIP "
                            "weight file or of a folder that save_pretrained wrote; see docs/encoders.md (default ViT-B/32)")  # fmt: skip
    group.add_argument("--out", type=Path, metavar="FILE", help="feature file to write: .pkl, or a name without suffix for a folder")
    group.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default auto)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="for the encoder (default no)")
    group.add_argument("--pooling", choices=("pooled", "none"), default="pooled",
                       help="none: keep every patch token of a picture, every window of a sound, for the transformer mapper")  # fmt: skip
    group.add_argument("--batch_size", type=whole_number_from_1, metavar="N", help="images encoded together (default 64; 16 on a CPU)")
    group.add_argument("--num_workers", type=whole_number, metavar="N", help="processes that read pictures; 0: none (default by cores)")
    group.add_argument("--fast_decode", action="store_true",
                       help="read JPEGs at the smallest scale that the encoder can use: faster, slightly other embeddings")  # fmt: skip
    group.add_argument("--max_skipped", type=number_or_share, default="1%", metavar="N|X%",
                       help="stop when more images cannot be read: a number, or a share, which always allows 10 (default 1%%)")  # fmt: skip
    group.add_argument("--save_seconds", type=float, default=15, metavar="S", help="work lost at most when killed, in seconds (default 15)")


def extract_options(args):
    """What add_options read, as keyword arguments of extract."""
    return {name: getattr(args, name) for name in ("batch_size", "num_workers", "max_skipped", "save_seconds", "fast_decode")}


def merge_records(records):
    """One Record an image, in order of first appearance; captions that are empty or blank left out.

    → records, blank captions dropped, images dropped because no caption was left
    Raises UserError when one image_id stands for two pictures.
    """
    images = {}
    for record in records:
        key = str(record.image_id)
        first = images.setdefault(key, record)
        if first.image != record.image:
            raise UserError(f"image_id {key} stands for two pictures, {_shown(first)} and {_shown(record)}. Give each picture its own id.")
        if first is not record:
            images[key] = first._replace(captions=[*first.captions, *record.captions])
    merged, blank = [], 0
    for record in images.values():  # of millions, few have anything to leave out: those stay the objects they are
        kept = [caption for caption in record.captions if caption["caption"].strip()]
        blank += len(record.captions) - len(kept)
        if kept:
            merged.append(record if len(kept) == len(record.captions) else record._replace(captions=kept))
    return merged, blank, len(images) - len(merged)


def check_images(records, max_skipped="1%", things="images"):
    """Raise UserError when there are no records, no pictures, or more of them missing than may be skipped. things: "images" or "sounds"."""
    if not records:
        raise UserError(f"no {things[:-1]} with a caption in this data set: nothing to encode. Check the annotations.")
    missing = [record for record in records if _is_path(record.image) and not os.path.isfile(record.image)]
    if len(missing) > min(_allowed(max_skipped, len(records)), len(records) - 1):
        raise UserError(
            f"{things} are not where they should be: found {len(records) - len(missing)} of {len(records)}; "
            f"{_shown(missing[0])}, for example, is missing. Put them there, or say where they are."
        )


def extract(records, encoder, out, *, source, split=None, batch_size=None, num_workers=None, max_skipped="1%", save_seconds=15,
            more_meta=None, keep_pieces=False, missing=(), fast_decode=False):  # fmt: skip
    """Encode the records' images and write the feature file `out`. → its meta, with the counts.

    records: Records, several of one image allowed; encoder: has name, width, device, preprocess, preprocessing, encode and digest;
    source, split: where the data is from, for the meta; max_skipped: a number, or a share such as "1%" that always allows 10;
    save_seconds: seconds of work between two pieces; more_meta: dict of plain values added to the meta; keep_pieces: leave {out}.pieces
    to the caller, so that the same call later encodes nothing; missing: (image_id, path, reason) of what the caller found gone: listed
    and counted; fast_decode: read JPEGs scaled down, which the meta then says.
    Raises UserError when `out` cannot be written, when images are missing, or when too many cannot be read (then the list of them is
    written, the feature file is not).
    """
    out = Path(out)
    _check_writable(out)
    # On a CPU smaller batches stay in its caches. Records of many views, sounds, are encoded view by view anyway.
    batch_size = batch_size or (8 if getattr(encoder, "many_views", False) else 16 if encoder.device.type == "cpu" else 64)
    preprocess = _fast(encoder) if fast_decode else encoder.preprocess
    records, blank, captionless = merge_records(records)
    things = _things(encoder)
    check_images(records, max_skipped, things)
    allowed = _allowed(max_skipped, len(records))
    pieces = Pieces(out.with_name(out.name + ".pieces"), fingerprint(records, encoder, batch_size, fast_decode))
    started, already = time.monotonic(), pieces.images
    try:
        with _sigterm_interrupts():
            _encode_into(pieces, records, preprocess, encoder, batch_size, num_workers, allowed, save_seconds)
    except KeyboardInterrupt:
        pieces.write()
        print(f"stopped: {pieces.images} of {len(records)} {things} are kept in {pieces.folder}; run again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
    seconds = max(time.monotonic() - started, 1e-6)
    parts, numbers, skipped = pieces.gather()
    _write_skipped(out, records, skipped, missing)
    if len(skipped) > allowed or not len(numbers):
        raise UserError(_too_many(out, records, skipped, allowed, things))
    captions = CaptionRows(records, numbers)
    counts = {"skipped": len(skipped) + len(missing), "blank_captions": blank, "images_without_caption": captionless}
    meta = {
        "encoder": encoder.name,
        "normalized": False,
        "preprocessing": encoder.preprocessing,
        "mixed_precision": getattr(encoder, "mixed_precision", "no"),
        "source": str(source),
        "split": split,
        **counts,
        **(more_meta or {}),
    }
    if getattr(encoder, "pooling", "pooled") != "pooled":
        meta["pooling"] = encoder.pooling
    if getattr(encoder, "audio", None) is not None:
        meta["audio"] = encoder.audio
    if fast_decode:
        meta["fast_decode"] = True
    save_features(out, MappedEmbeddings(parts), captions, meta)
    pieces.write() if keep_pieces else pieces.remove()
    notes = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    if counts["skipped"]:
        notes.append(f"see {_skipped_file(out)}")
    speed = (len(records) - already) / seconds
    print(
        f"{len(numbers)} {things}, {len(captions)} captions → {out} ({encoder.width} wide, {encoder.name}, {speed:.1f} {things}/s"
        f"{''.join('; ' + note for note in notes)})",
        flush=True,
    )
    return {**meta, "width": encoder.width, "images": len(numbers), "captions": len(captions)}


def _fast(encoder):
    """The encoder's preprocessing, reading JPEGs scaled down. Raises UserError where there is no scale to go by."""
    if getattr(encoder.preprocess, "short_side", None) is None:
        raise UserError(f"--fast_decode is for encoders that scale a picture's shorter side and crop, unlike {encoder.name}. Leave it out.")
    preprocess = copy.copy(encoder.preprocess)
    preprocess.fast_decode = True
    return preprocess


@contextlib.contextmanager
def _sigterm_interrupts():
    """Let SIGTERM, as a scheduler sends it, stop the job as Ctrl-C does; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_writable(out):
    """Raise UserError, before any work, when `out` is a folder or its folder cannot be made or written."""
    if is_directory_name(out):
        check_replaceable(out)
    folder = out.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        found = f"{folder} is not a folder that can be written"
        raise UserError(f"cannot write {out}: {found}. Give another --out, a file name (.pkl) in a folder you may write.")


def _encode_into(pieces, records, preprocess, encoder, batch_size, num_workers, allowed, save_seconds):
    """Encode what `pieces` does not hold yet, batch by batch; stops early when more than `allowed` cannot be read."""
    from tqdm import tqdm

    batches = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
    pictures = Pictures([record.image for record in records], preprocess)
    loader = make_loader(pictures, batches[pieces.batches :], encoder, batch_size, num_workers)
    skipped = pieces.skipped
    with tqdm(total=len(records), initial=pieces.images, unit=f" {_things(encoder)}", disable=None, dynamic_ncols=True) as bar:
        for numbers, batch, unread in loader:
            rows = encode_batch(encoder, batch).numpy() if numbers else None  # [B, D], or [B, L, D] without pooling
            pieces.add(numbers, rows, unread, save_seconds)
            bar.update(len(numbers) + len(unread))
            skipped += len(unread)
            if skipped > allowed:
                return


def _things(encoder):
    """What the records of an encoder are, for messages."""
    return "sounds" if getattr(encoder, "modality", "image") == "audio" else "images"


def _write_skipped(out, records, skipped, missing):
    """List the images that were skipped; no such file when there are none."""
    path = _skipped_file(out)
    if not skipped and not missing:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(SKIPPED_COLUMNS)
        for number, reason in skipped:
            writer.writerow((records[number].image_id, _place(records[number].image), reason))
        writer.writerows(missing)


def _too_many(out, records, skipped, allowed, things):
    number, reason = skipped[0]
    return (
        f"{len(skipped)} of {len(records)} {things} could not be read, at most {min(allowed, len(records) - 1)} may be skipped; "
        f"the first is {_shown(records[number])}: {reason}. "
        f"All are listed in {_skipped_file(out)}: mend or remove them, or raise --max_skipped."
    )


def _skipped_file(out):
    return out.with_name(out.name + ".skipped.csv")


def _allowed(max_skipped, images):
    """How many of `images` may be skipped: a number as it is, a share of them but at least 10."""
    max_skipped = number_or_share(max_skipped)
    return max_skipped if isinstance(max_skipped, int) else max(LEAST_ALLOWED, math.ceil(max_skipped * images))


def number_or_share(text):
    """ "50" → 50; "1%" or "0.01" → the share 0.01."""
    text = str(text).strip()
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of images or a share of them")
    return value if text.endswith("%") or value % 1 else int(value)


def whole_number_from_1(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def whole_number(text):
    return whole_number_from_1(text) if int(text) else 0


def _is_path(image):
    return isinstance(image, (str, os.PathLike))


def _place(image):
    """Where a picture is, as text; "" for one that is in memory, or does not say."""
    return str(image) if _is_path(image) else getattr(image, "place", "")


def _shown(record):
    return _place(record.image) or f"the picture of image_id {record.image_id}"
