"""From images to one feature file: each image is encoded once, in batches, and an interrupted job resumes.

A parse script turns its data set into Records, hands them to `extract` with an encoder, and is done:

    add_options(parser, ENCODER_HELP)              the options that all parse scripts have
    check_images(records, max_skipped)             do the pictures exist? (before minutes of loading weights)
    extract(records, encoder, out, **extract_options(args), source=..., split=...)

While it runs, finished batches are kept as pieces in the folder {out}.pieces; the same command, run again, resumes from them. Batches are
cut by record, so the result has the same bytes whatever the number of interruptions and workers. An image that cannot be read is skipped,
counted, and listed in {out}.skipped.csv. Under a launcher each process encodes its share of the batches, and the first joins the pieces.
"""

import contextlib
import copy
import signal
import sys
import threading
import time
from pathlib import Path

from common import UserError, resolve_output
from features.directory import is_directory_name
from features.directory_writer import check_replaceable
from features.embeddings import MappedEmbeddings
from features.image_ids import printable_name
from features.loading import Pictures, encode_batch, make_loader
from features.options import add_options, extract_options
from features.pieces import Pieces, fingerprint, pieces_folder
from features.processes import current
from features.record_table import Record
from features.records import (
    RecordCaptions,
    allowed_skips,
    check_images,
    merge_records,
    shown,
    skipped_file,
    write_skipped,
)
from features.store import save_features

__all__ = ["Record", "add_options", "check_images", "extract", "extract_options", "merge_records"]
THINGS = {"image": "images", "audio": "sounds"}  # what the records of an encoder are, for messages


def extract(records, encoder, out, *, source, split=None, batch_size=None, num_workers=None, max_skipped="1%", save_seconds=15,
            more_meta=None, keep_pieces=False, missing=(), fast_decode=False):  # fmt: skip
    """Encode the records' images and write the feature file `out`, as the only command that does.

    Args:
        records: iterable of Record, several of one image allowed.
        encoder: models.encoders Encoder, or features.audio SoundEncoder.
        out: path of the feature file, or without a suffix of a feature directory.
        source: where the data is from, for the meta.
        split: name of the split, for the meta.
        batch_size: images encoded together; None: 64, or 16 on a CPU, whose caches hold less.
        num_workers: processes that read pictures; None: by the number of cores.
        max_skipped: how many images may be skipped: a number, or a share such as "1%", which always allows 10.
        save_seconds: seconds of work between two pieces.
        more_meta: dict of plain values added to the meta.
        keep_pieces: leave {out}.pieces to the caller, so that the same call later encodes nothing.
        missing: (image_id, path, reason) of what the caller found missing; listed and counted.
        fast_decode: read JPEGs scaled down, which the meta then says.

    Returns:
        dict, the meta with counts.

    Raises:
        UserError: `out` cannot be written or another command writes it, images are missing, or too many cannot be read. In the last
            case the list of skipped images is written and the feature file is not.
    """
    out = Path(out)
    check_replaceable(out) if is_directory_name(out) else resolve_output(out)
    preprocess = _fast(encoder) if fast_decode else encoder.preprocess
    # Records of many views, sounds, are encoded view by view anyway.
    batch_size = batch_size or (8 if encoder.many_views else 16 if encoder.device.type == "cpu" else 64)
    merged = merge_records(records)
    records, things = merged.records, THINGS[encoder.modality]
    check_images(records, max_skipped, things)
    allowed = allowed_skips(max_skipped, len(records))
    processes = current()
    if processes.count > 1:
        _check_agreement(processes, fingerprint(records, encoder, batch_size, fast_decode, contents=False))
    with processes.claim(out):
        run = processes.first_does(fingerprint, records, encoder, batch_size, fast_decode)
        pieces = Pieces(pieces_folder(out), run, takes_up=processes.is_first)
        batches = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
        missing_batches = processes.first_does(pieces.missing, len(batches))
        started, already = time.monotonic(), pieces.images
        own = {batch: batches[batch] for batch in processes.share(missing_batches)}
        with _kept_when_interrupted(pieces, records, things, processes):
            _encode_into(pieces, records, preprocess, encoder, batch_size, num_workers, allowed, save_seconds, own)
            if not processes.is_first:
                pieces.write()
        complete = not any(processes.gather(pieces.skipped > allowed))  # a process stops early when it has skipped too many
        speed = (len(records) - already) / max(time.monotonic() - started, 1e-6)

        def join():
            parts, numbers, skipped = pieces.gather(len(batches) if complete else None)
            write_skipped(out, records, skipped, missing)
            if len(skipped) > allowed or not len(numbers):
                raise UserError(_too_many(out, records, skipped, allowed, things))
            counts = _count(merged, len(skipped) + len(missing))
            meta = _describe(encoder, source, split, fast_decode) | counts | (more_meta or {})
            captions = RecordCaptions(records, numbers)
            save_features(out, MappedEmbeddings(parts), captions, meta)
            pieces.write() if keep_pieces else pieces.remove()
            _report(out, encoder, counts, len(numbers), len(captions), speed)
            return {**meta, "width": encoder.width, "images": len(numbers), "captions": len(captions)}

        return processes.first_does(join)


def _check_agreement(processes, digest):
    """Raise UserError where the processes of this command have read different records or weights."""
    digests = processes.gather(digest)
    other = next((number for number, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        raise UserError(f"process {other} of {processes.count} has read other records or weights than process 0. Give all machines the "
                        "same files and versions.")  # fmt: skip


@contextlib.contextmanager
def _kept_when_interrupted(pieces, records, things, processes):
    """Write what is pending when Ctrl-C or a scheduler's SIGTERM stops the block, and end with exit code 130."""
    try:
        with _sigterm_interrupts() if processes.count == 1 else contextlib.nullcontext():
            yield
    except KeyboardInterrupt:
        pieces.write()
        if processes.count > 1:
            raise  # which may mean that another process has died
        print(f"interrupted: {pieces.images} of {len(records)} {things} are kept in {pieces.folder}; run the same command to resume",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(130) from None


def _count(merged, skipped):
    """Return the counts of what was left out, for the meta."""
    return {
        "skipped": skipped,
        "blank_captions": merged.blank,
        "images_without_caption": merged.captionless,
        **({"captions_with_broken_characters": merged.replaced} if merged.replaced else {}),
    }


def _report(out, encoder, counts, images, captions, speed):
    """Print what was written."""
    things = THINGS[encoder.modality]
    notes = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    if counts["skipped"]:
        notes.append(f"see {skipped_file(out)}")
    print(
        f"{images} {things}, {captions} captions -> {out} ({encoder.width} wide, {encoder.name}, "
        f"{speed:.1f} {things}/s{''.join('; ' + note for note in notes)})",
        flush=True,
    )


def _describe(encoder, source, split, fast_decode):
    """Return the meta of a feature file: how its embeddings were made."""
    meta = {
        "encoder": encoder.name,
        "normalized": False,
        "preprocessing": encoder.preprocessing,
        "mixed_precision": encoder.mixed_precision,
        "source": printable_name(str(source)),
        "split": split,
    }
    if encoder.pooling != "pooled":
        meta["pooling"] = encoder.pooling
    if encoder.audio is not None:
        meta["audio"] = encoder.audio
    if fast_decode:
        meta["fast_decode"] = True
    return meta


def _fast(encoder):
    """Return the encoder's preprocessing, reading JPEGs scaled down. Raises UserError where there is no scale to go by."""
    if encoder.preprocess.short_side is None:
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


def _encode_into(pieces, records, preprocess, encoder, batch_size, num_workers, allowed, save_seconds, batches):
    """Encode `batches` (place among all batches -> record numbers) one by one; stop early when more than `allowed` cannot be read."""
    from tqdm import tqdm

    pictures = Pictures(records.images, preprocess)
    loader = make_loader(pictures, list(batches.values()), encoder, batch_size, num_workers, current().local_count)
    total = pieces.images + sum(map(len, batches.values()))
    with tqdm(total=total, initial=pieces.images, unit=f" {THINGS[encoder.modality]}", disable=None, dynamic_ncols=True) as bar:
        for place, (numbers, batch, unread) in zip(batches, loader):
            rows = encode_batch(encoder, batch).numpy() if numbers else None  # [B, D], or [B, L, D] without pooling
            pieces.add(place, numbers, rows, unread, save_seconds)
            bar.update(len(numbers) + len(unread))
            if pieces.skipped > allowed:
                return


def _too_many(out, records, skipped, allowed, things):
    """Return the error of a job that skipped too many images."""
    number, reason = skipped[0]
    return (
        f"{len(skipped)} of {len(records)} {things} could not be read, at most {min(allowed, len(records) - 1)} may be skipped; "
        f"the first is {shown(records[number])}: {reason}. "
        f"All are listed in {skipped_file(out)}: mend or remove them, or raise --max_skipped."
    )
