"""Finished work of an extraction, kept in a folder until the feature file is written. A job of seconds needs none.

{folder}/run.json                     fingerprint of the run the pieces belong to
{folder}/{first}-{end}.npz            batches first ... end-1: embeddings, record numbers, what could not be read and why, the run

Pieces are whole batches, so a resumed run makes the same batches as an undisturbed one. Several processes put their pieces into one
folder, and any number of processes resumes. Each piece is written under a temporary name and renamed, so it is whole whenever a run is
killed. B batch, N images, D width, L vectors per image.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from common import ARCHIVE_ERRORS, UserError, remove_own_files, replace_file
from features.loading import pad_vectors
from features.records import is_path

LABEL = "run.json"


def fingerprint(records, encoder, batch_size, fast_decode=False, contents=True):
    """Digest everything that decides the embeddings' bytes: encoder, weights, batches, and the pictures themselves.

    A picture file counts by its path, size and time of change; a picture in memory by its bytes; one read later by its key. Without
    `contents` the pictures count by their ids alone.

    Args:
        records: features.record_table RecordTable.

    Returns:
        str, hexadecimal.
    """
    import torch

    made_by = [encoder.name, encoder.width, encoder.digest(), encoder.preprocessing, encoder.mixed_precision, encoder.pooling]
    what = [*made_by, encoder.device.type, torch.__version__, batch_size, *(["fast_decode"] if fast_decode else [])]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for image_id, image in zip(records.image_ids, records.images):
        digest.update(f"\0{image_id}\0".encode("utf-8", "surrogatepass"))
        if not contents:
            continue
        if is_path(image):
            digest.update(file_stamp(image).encode("utf-8", "surrogatepass"))
        elif isinstance(image, (bytes, bytearray)):
            digest.update(hashlib.sha256(image).digest())
        else:
            digest.update(image.key.encode("utf-8", "surrogatepass"))
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
        images, skipped: how many were done when this process began, or by it since, written or not.
    """

    def __init__(self, folder, run, takes_up=True):
        """Resume from the pieces in `folder` if they are of this `run` (a fingerprint), else start over, and say so.

        takes_up: False in a process that only adds pieces, beside the one that has taken up those that were there.
        """
        self.folder = Path(folder)
        self.images = self.skipped = 0
        self._label = self.folder / LABEL
        self._run = run
        self._done = []  # (first, end) of each piece that was there, in order
        self._pending = []  # (batch, numbers, rows [B, D] or None, unread), neighbours
        self._written = time.monotonic()
        if not takes_up:
            return
        if _read_json(self._label) == {"run": run}:
            self._take_up()
        elif self.folder.exists():
            print(f"{self.folder} is of other images, another encoder or batch size: starting over", file=sys.stderr)
            self.remove()

    def _take_up(self):
        """Count the pieces; remove those that are damaged, overlap with one before, or are of another run."""
        for path in self._files():
            first, end = _span(path)
            piece = _read_piece(path, self._run) if not self._done or first >= self._done[-1][1] else None
            if piece is None:
                path.unlink()
                continue
            self._done.append((first, end))
            self.images += len(piece[0]) + len(piece[2])
            self.skipped += len(piece[2])
        if self.images:
            print(f"resuming from {self.folder}: {self.images} images are done", file=sys.stderr)

    def missing(self, total):
        """List the batches of `total` that are in no piece."""
        starts, ends = [0, *(end for _, end in self._done)], [*(first for first, _ in self._done), total]
        return [batch for start, end in zip(starts, ends) for batch in range(start, end)]

    def add(self, batch, numbers, rows, unread, save_seconds):
        """Add a batch; write a piece when `save_seconds` have passed since the last.

        Args:
            batch: its place among all batches.
            numbers: list of record numbers.
            rows: their embeddings [B, D] or [B, L, D], or None.
            unread: list of (number, reason) of what could not be read.
            save_seconds: seconds of work between two pieces.

        Raises:
            UserError: a piece cannot be written.
        """
        if self._pending and batch != self._pending[-1][0] + 1:
            self.write()
        self._pending.append((batch, numbers, rows, unread))
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
                temporary.write_text(json.dumps({"run": self._run}))
        rows, numbers, unread = _join(self._pending)
        first, end = self._pending[0][0], self._pending[-1][0] + 1
        with replace_file(self.folder / f"{first:09d}-{end:09d}.npz") as temporary, open(temporary, "wb") as file:
            texts = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in (("unread", unread), ("run", self._run))}
            np.savez(file, rows=rows, numbers=np.array(numbers, np.int64), **texts)
        self._pending = []
        self._written = time.monotonic()

    def gather(self, total):
        """Put all pieces together.

        Args:
            total: number of batches that must be there; None where some are known to be missing.

        Returns:
            Embeddings as a list of parts [n, D] or [n, L, D] float32, which stay in their files; record numbers int64 [N]; list of
            (number, reason) of what could not be read.

        Raises:
            UserError: a piece was damaged, added or removed meanwhile.
        """
        found = []  # (first, end, part, numbers, unread)
        for path in self._files():
            numbers, rows, skipped = _read_whole(path, self._run)
            found.append((*_span(path), PieceRows(path, rows.shape), numbers, skipped))
        if self._pending:
            rows, numbers, skipped = _join(self._pending)
            found.append((self._pending[0][0], self._pending[-1][0] + 1, rows, np.array(numbers, np.int64), skipped))
            found.sort(key=lambda one: one[0])
        reached = [0, *(end for _, end, *_ in found)]
        if total is not None and reached != [*(first for first, *_ in found), total]:
            raise _changed(self.folder)
        parts = [part for _, _, part, _, _ in found if len(part)]
        if parts and len(parts[0].shape) == 3:
            most = max(part.shape[1] for part in parts)
            parts = [part.padded(most) if isinstance(part, PieceRows) else pad_vectors(part, most) for part in parts]
        numbers = np.concatenate([np.zeros(0, np.int64), *(one[3] for one in found)])
        return parts, numbers, [tuple(pair) for one in found for pair in one[4]]

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
    rows = [rows for _, numbers, rows, _ in batches if len(numbers)]
    numbers = [int(number) for _, numbers, _, _ in batches for number in numbers]
    unread = [tuple(pair) for *_, unread in batches for pair in unread]
    if rows and rows[0].ndim == 3:
        most = max(some.shape[1] for some in rows)
        rows = [pad_vectors(some, most) for some in rows]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32), numbers, unread


def _read_whole(path, run=None):
    """Read a piece that is needed. Returns numbers, rows, unread. Raises UserError when it is damaged."""
    piece = _read_piece(path, run)
    if piece is None:
        raise _changed(path)
    return piece


def _changed(path):
    return UserError(f"{path} was changed while this ran. Run the same command again: it makes what is missing.")


def _read_piece(path, run=None):
    """Read a piece. Returns numbers, rows, unread; None when the file is damaged, or of another run than `run`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            numbers, rows, unread = file["numbers"], file["rows"], json.loads(file["unread"].tobytes())
            ours = run is None or json.loads(file["run"].tobytes()) == run
            return (numbers, rows, unread) if ours and len(numbers) == len(rows) and rows.dtype == np.float32 else None
    except (OSError, *ARCHIVE_ERRORS):
        return None


def _read_json(path):
    """Return the content of a JSON file; None when there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
