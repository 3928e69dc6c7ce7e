"""Finished work of an extraction, kept in a folder until the feature file stands. A job of seconds needs none.

{folder}/run.json                     fingerprint of the run the pieces belong to
{folder}/{first}-{end}.npz            batches first … end-1: embeddings, record numbers, what could not be read and why

Pieces are whole batches and follow one another, so that going on from them gives the batches an undisturbed run would have made.
Each is written under a temporary name and renamed: whenever a run is killed, what stands here is whole. Nothing read here is code.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from common import UserError, replace_file
from features.gathered import PieceRows, pad_vectors


def fingerprint(records, encoder, batch_size, fast_decode=False):
    """Everything that decides the embeddings' bytes → a hexadecimal digest: encoder, weights, batches, and the pictures themselves.

    Of a picture file count its path, size and time of change; of a picture in memory, its bytes; of one read later, its key.
    """
    import torch

    precision = getattr(encoder, "mixed_precision", "no")
    made_by = [encoder.name, encoder.width, encoder.digest(), encoder.preprocessing, precision, getattr(encoder, "pooling", "pooled")]
    what = [*made_by, encoder.device.type, torch.__version__, batch_size, *(["fast_decode"] if fast_decode else [])]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for record in records:
        digest.update(f"\0{record.image_id}\0".encode("utf-8", "surrogatepass"))
        if isinstance(record.image, (str, os.PathLike)):
            digest.update(os.fsencode(record.image))
            try:
                status = os.stat(record.image)
                digest.update(f"\0{status.st_size} {status.st_mtime_ns}".encode())
            except OSError:
                digest.update(b"\0missing")
        elif hasattr(record.image, "key"):
            digest.update(record.image.key.encode("utf-8", "surrogateescape"))
        else:
            digest.update(hashlib.sha256(record.image).digest())
    return digest.hexdigest()


class Pieces:
    """The pieces in one folder, and the batches not yet written there.

    folder; batches, images, skipped: how many are done, written or not.
    """

    def __init__(self, folder, run):
        """Go on from the pieces in `folder` if they are of this `run` (a fingerprint), else start anew, and say which."""
        self.folder = Path(folder)
        self.batches = self.images = self.skipped = 0
        self._label = self.folder / "run.json"
        self._run = {"run": run}
        self._pending = []  # (numbers, rows [B, D] or None, unread) a batch
        self._written = time.monotonic()
        if _read_json(self._label) == self._run:
            self._take_up()
        elif self.folder.exists():
            print(f"{self.folder} is of other images, another encoder or batch size: starting anew", file=sys.stderr)
            self.remove()

    def _take_up(self):
        """Count the pieces that follow one another from batch 0; the first that is missing or damaged is where to go on."""
        for path in self._files():
            first, end = _span(path)
            piece = _read_piece(path) if first == self.batches else None
            if piece is None:
                path.unlink()
                continue
            self.batches = end
            self.images += len(piece[0]) + len(piece[2])
            self.skipped += len(piece[2])
        if self.images:
            print(f"going on from {self.folder}: {self.images} images are done", file=sys.stderr)

    def add(self, numbers, rows, unread, save_seconds):
        """Add a batch: record numbers [B], their embeddings [B, D] or None, and [(number, reason)] of what could not be read.

        Writes a piece when `save_seconds` of work have come together. Raises UserError when it cannot.
        """
        self._pending.append((numbers, rows, unread))
        self.batches += 1
        self.images += len(numbers) + len(unread)
        self.skipped += len(unread)
        if time.monotonic() - self._written >= save_seconds:
            self.write()

    def write(self):
        """Write what is pending as one piece."""
        if not self._pending:
            return
        if not self._label.exists():
            with replace_file(self._label) as temporary:
                temporary.write_text(json.dumps(self._run))
        rows, numbers, unread = _join(self._pending)
        first = self.batches - len(self._pending)
        with replace_file(self.folder / f"{first:09d}-{self.batches:09d}.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, rows=rows, numbers=np.array(numbers, np.int64), unread=np.frombuffer(json.dumps(unread).encode(), np.uint8))
        self._pending = []
        self._written = time.monotonic()

    def gather(self):
        """→ embeddings as parts [n, D] (or [n, L, D]) float32, record numbers int64 [N], [(number, reason)] of what could not be read.

        Parts stay in their files, and are read again when they are needed. Raises UserError when one was damaged meanwhile.
        """
        parts, numbers, unread = [], [], []
        for path in self._files():
            of_piece, rows, skipped = _read_whole(path)
            parts += [PieceRows(path, rows, lambda path: _read_whole(path)[1])] if len(rows) else []
            numbers.append(of_piece)
            unread += [tuple(pair) for pair in skipped]
        rows, of_piece, skipped = _join(self._pending)
        parts += [rows] if len(rows) else []
        if parts and len(parts[0].shape) == 3:
            most = max(part.shape[1] for part in parts)
            parts = [part.padded(most) if isinstance(part, PieceRows) else pad_vectors(part, most) for part in parts]
        return parts, np.concatenate([*numbers, np.array(of_piece, np.int64)]), unread + skipped

    def remove(self):
        """Remove the folder: the feature file stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self):
        return sorted(path for path in self.folder.glob("*.npz") if _span(path))


def _span(path):
    """The batches in a piece, from its name: "000000003-000000007.npz" → (3, 7); None for another name."""
    first, dash, end = path.stem.partition("-")
    return (int(first), int(end)) if dash and first.isdecimal() and end.isdecimal() else None


def _join(batches):
    """(numbers, rows or None, unread) a batch → rows [N, D] or [N, L, D] float32, numbers, unread of them all."""
    rows = [rows for numbers, rows, _ in batches if len(numbers)]
    numbers = [int(number) for numbers, _, _ in batches for number in numbers]
    unread = [tuple(pair) for _, _, unread in batches for pair in unread]
    if rows and rows[0].ndim == 3:
        most = max(some.shape[1] for some in rows)
        rows = [pad_vectors(some, most) for some in rows]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32), numbers, unread


def _read_whole(path):
    """A piece that is needed now → numbers, rows, unread. Raises UserError when it is damaged."""
    piece = _read_piece(path)
    if piece is None:
        raise UserError(f"{path} was damaged while this ran. Run the same command again: it makes this piece anew.")
    return piece


def _read_piece(path):
    """→ numbers, rows, unread; None when the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["numbers"], file["rows"], json.loads(file["unread"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_json(path):
    """The content of a JSON file; None when there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
