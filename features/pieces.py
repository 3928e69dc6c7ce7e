"""Finished work of an extraction, kept in a folder until the feature file is written. A job of seconds needs none.

{folder}/run.json                     fingerprint of the run the pieces belong to
{folder}/{first}-{end}.npz            batches first ... end-1: embeddings, record numbers, what could not be read and why

Pieces are whole batches and follow one another, so a resumed run makes the same batches as an undisturbed one. Each is written under a
temporary name and renamed, so every piece is whole whenever a run is killed. B batch, N images, D width, L vectors per image.
"""

import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from common import UserError, remove_own_files, replace_file
from features.loading import pad_vectors
from features.records import is_path

LABEL = "run.json"


def fingerprint(records, encoder, batch_size, fast_decode=False):
    """Digest everything that decides the embeddings' bytes: encoder, weights, batches, and the pictures themselves.

    A picture file counts by its path, size and time of change; a picture in memory by its bytes; one read later by its key.

    Returns:
        str, hexadecimal.
    """
    import torch

    made_by = [encoder.name, encoder.width, encoder.digest(), encoder.preprocessing, encoder.mixed_precision, encoder.pooling]
    what = [*made_by, encoder.device.type, torch.__version__, batch_size, *(["fast_decode"] if fast_decode else [])]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for record in records:
        digest.update(f"\0{record.image_id}\0".encode("utf-8", "surrogatepass"))
        if is_path(record.image):
            digest.update(file_stamp(record.image).encode("utf-8", "surrogatepass"))
        elif isinstance(record.image, (bytes, bytearray)):
            digest.update(hashlib.sha256(record.image).digest())
        else:
            digest.update(record.image.key.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def file_stamp(path):
    """Describe the state of a file: its path, size in bytes and time of change."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{os.fspath(path)}\0missing"
    return f"{os.fspath(path)}\0{status.st_size} {status.st_mtime_ns}"


class PieceRows:
    """The embeddings of one piece, [n, D] or [n, L, D] float32, read from its file when they are asked for."""

    def __init__(self, path, shape):
        """Take the piece's path and the shape of its array."""
        self.path, self.shape, self.dtype = path, shape, np.dtype(np.float32)

    def padded(self, most):
        """Return the same with `most` vectors per image."""
        return PieceRows(self.path, (self.shape[0], most, self.shape[2]))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        rows = _read_whole(self.path)[1]
        return (pad_vectors(rows, self.shape[1]) if rows.ndim == 3 else rows)[index]


class Pieces:
    """The pieces in one folder, and the batches not yet written there.

    Attributes:
        folder: Path.
        batches, images, skipped: how many are done, written or not.
    """

    def __init__(self, folder, run):
        """Resume from the pieces in `folder` if they are of this `run` (a fingerprint), else start over, and say so."""
        self.folder = Path(folder)
        self.batches = self.images = self.skipped = 0
        self._label = self.folder / LABEL
        self._run = {"run": run}
        self._pending = []  # (numbers, rows [B, D] or None, unread) a batch
        self._written = time.monotonic()
        if _read_json(self._label) == self._run:
            self._take_up()
        elif self.folder.exists():
            print(f"{self.folder} is of other images, another encoder or batch size: starting over", file=sys.stderr)
            self.remove()

    def _take_up(self):
        """Count the pieces that follow one another from batch 0; work resumes at the first that is missing or damaged."""
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
            print(f"resuming from {self.folder}: {self.images} images are done", file=sys.stderr)

    def add(self, numbers, rows, unread, save_seconds):
        """Add a batch; write a piece when `save_seconds` have passed since the last.

        Args:
            numbers: list of record numbers.
            rows: their embeddings [B, D] or [B, L, D], or None.
            unread: list of (number, reason) of what could not be read.
            save_seconds: seconds of work between two pieces.

        Raises:
            UserError: a piece cannot be written.
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
        """Put all pieces together.

        Returns:
            Embeddings as a list of parts [n, D] or [n, L, D] float32, which stay in their files; record numbers int64 [N]; list of
            (number, reason) of what could not be read.

        Raises:
            UserError: a piece was damaged or removed meanwhile.
        """
        parts, numbers, unread, reached = [], [], [], 0
        for path in self._files():
            first, end = _span(path)
            of_piece, rows, skipped = _read_whole(path)
            if first != reached:
                raise _changed(self.folder)
            reached = end
            parts += [PieceRows(path, rows.shape)] if len(rows) else []
            numbers.append(of_piece)
            unread += [tuple(pair) for pair in skipped]
        if reached + len(self._pending) != self.batches:
            raise _changed(self.folder)
        rows, of_piece, skipped = _join(self._pending)
        parts += [rows] if len(rows) else []
        if parts and len(parts[0].shape) == 3:
            most = max(part.shape[1] for part in parts)
            parts = [part.padded(most) if isinstance(part, PieceRows) else pad_vectors(part, most) for part in parts]
        return parts, np.concatenate([*numbers, np.array(of_piece, np.int64)]), unread + skipped

    def remove(self):
        """Remove the pieces, and the folder unless it holds something else: the feature file is written."""
        _remove(self.folder)

    def _files(self):
        return _pieces_in(self.folder)


def pieces_folder(out):
    """Return the folder of the pieces of a feature file."""
    return out.with_name(out.name + ".pieces")


def remove_pieces(out):
    """Remove the pieces of a feature file that keep_pieces left."""
    _remove(pieces_folder(out))


def _pieces_in(folder):
    return sorted(path for path in folder.glob("*.npz") if _span(path))


def _remove(folder):
    remove_own_files(folder, [*_pieces_in(folder), folder / LABEL])


def _span(path):
    """Return the batches in a piece, from its name: (3, 7) for "000000003-000000007.npz"; None for another name."""
    first, dash, end = path.stem.partition("-")
    return (int(first), int(end)) if dash and first.isdecimal() and end.isdecimal() else None


def _join(batches):
    """Join batches. Returns rows [N, D] or [N, L, D] float32, numbers and unread of them all."""
    rows = [rows for numbers, rows, _ in batches if len(numbers)]
    numbers = [int(number) for numbers, _, _ in batches for number in numbers]
    unread = [tuple(pair) for _, _, unread in batches for pair in unread]
    if rows and rows[0].ndim == 3:
        most = max(some.shape[1] for some in rows)
        rows = [pad_vectors(some, most) for some in rows]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32), numbers, unread


def _read_whole(path):
    """Read a piece that is needed. Returns numbers, rows, unread. Raises UserError when it is damaged."""
    piece = _read_piece(path)
    if piece is None:
        raise _changed(path)
    return piece


def _changed(path):
    return UserError(f"{path} was changed while this ran. Run the same command again: it makes what is missing.")


def _read_piece(path):
    """Read a piece. Returns numbers, rows, unread; None when the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            numbers, rows, unread = file["numbers"], file["rows"], json.loads(file["unread"].tobytes())
            return (numbers, rows, unread) if len(numbers) == len(rows) and rows.dtype == np.float32 else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_json(path):
    """Return the content of a JSON file; None when there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
