"""Embeddings that stay in their files: several arrays behind one another, rows fetched when they are asked for.

N rows, D width, L embeddings an image where there are several.
"""

import hashlib

import numpy as np

BLOCK_BYTES = 2**25  # read at one time when all are gone through


class MappedEmbeddings:
    """[N, D] or [N, L, D] over parts that are mapped files (or tensors), indexed by rows as a tensor is; what comes out is in memory."""

    def __init__(self, parts, rows=None):
        """parts: arrays or tensors whose shapes agree but for the first number; rows: int64, which rows of the parts (None: all)."""
        import torch

        self.parts, self._rows = parts, rows
        self._ends = np.cumsum([len(part) for part in parts])
        dtype = _torch_dtype(parts[0])
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, _torch_dtype(part))
        self.dtype = dtype
        self.shape = (int(self._ends[-1]) if rows is None else len(rows), *(int(size) for size in parts[0].shape[1:]))
        self.ndim = len(self.shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """Read rows: one, a slice, or a list, array or tensor of them. Returns a tensor in memory, dtype as stored."""
        import torch

        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = np.asarray(index)
            rows = rows.astype(np.int64) if rows.size == 0 else rows
        if rows.dtype.kind not in "iu":
            raise IndexError(f"rows are whole numbers, not {rows.dtype}")
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows.max() if rows.max() >= len(self) else rows.min()} of {len(self)}")
        flat = rows.reshape(-1) % max(len(self), 1)
        if self._rows is not None:
            flat = self._rows[flat]
        part_of = np.searchsorted(self._ends, flat, side="right")
        found = torch.empty((len(flat), *self.shape[1:]), dtype=self.dtype)
        for number in np.unique(part_of):
            places = np.flatnonzero(part_of == number)
            part = self.parts[number]
            found[torch.from_numpy(places)] = _in_memory(part, flat[places] - (self._ends[number] - len(part))).to(self.dtype)
        return found.reshape(*rows.shape, *self.shape[1:])

    def select(self, rows):
        """Select rows (int64), which stay in their files. Returns MappedEmbeddings."""
        return MappedEmbeddings(self.parts, rows if self._rows is None else self._rows[rows])

    def digest(self):
        """SHA-256 over every number, dtype and shape included: bytes. Reads all files once, a block at a time."""
        digest = hashlib.sha256(f"{self.shape[1:]}".encode())
        for part in self.parts:
            digest.update(f"{_torch_dtype(part)} {len(part)}".encode())
            for _, block in blocks(part):
                digest.update(byte_view(block))
        if self._rows is not None:
            digest.update(self._rows.tobytes())
        return digest.digest()

    @classmethod
    def join(cls, several):
        """Join tensors and MappedEmbeddings. Returns MappedEmbeddings."""
        several = [one if isinstance(one, cls) else cls([one]) for one in several]
        parts = [part for one in several for part in one.parts]
        if all(one._rows is None for one in several):
            return cls(parts)
        starts = np.cumsum([0, *(one._ends[-1] for one in several)])
        rows = [start + (np.arange(len(one)) if one._rows is None else one._rows) for one, start in zip(several, starts)]
        return cls(parts, np.concatenate(rows))


def select_rows(embeddings, rows):
    """Take some rows, in this order: of MappedEmbeddings they stay in their files, of a tensor they are copied.

    Args:
        embeddings: [N, D] or [N, L, D] tensor or MappedEmbeddings.
        rows: n ints.
    """
    return embeddings.select(np.asarray(rows, np.int64)) if isinstance(embeddings, MappedEmbeddings) else embeddings[rows]


def blocks(embeddings, start=0, stop=None):
    """Iterate over embeddings in blocks of some tens of megabytes.

    Args:
        embeddings: tensor, array or MappedEmbeddings.
        start: first row.
        stop: row to end before; None for all.

    Yields:
        (first row, tensor) of each block.
    """
    stop = len(embeddings) if stop is None else stop
    row_bytes = max(1, int(np.prod(embeddings.shape[1:]))) * 4
    size = max(1, BLOCK_BYTES // row_bytes)
    for first in range(start, stop, size):
        block = embeddings[first : min(first + size, stop)]
        yield first, _in_memory(block, slice(None)) if isinstance(block, np.ndarray) else block


def byte_view(tensor):
    """The bytes of a tensor on the CPU as a flat uint8 array, whatever its dtype (numpy has no bfloat16)."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def finite_rows(block):
    """Which rows of a tensor hold neither NaN nor infinity: bool [n]."""
    import torch

    return torch.isfinite(block).reshape(len(block), -1).all(1)


def first_bad_row(embeddings):
    """Find the first row that holds NaN or infinity. Returns its number, or None."""
    for start, block in blocks(embeddings):
        good = finite_rows(block)
        if not good.all():
            return start + int((~good).nonzero()[0])
    return None


def _torch_dtype(part):
    import torch

    return part.dtype if isinstance(part, torch.Tensor) else getattr(torch, part.dtype.name)


def _in_memory(part, index):
    """Copy rows of an array or tensor into a tensor, in the machine's byte order."""
    import torch

    if isinstance(part, torch.Tensor):
        return part[torch.from_numpy(index)] if isinstance(index, np.ndarray) else part[index]
    return torch.from_numpy(np.array(part[index], dtype=part.dtype.newbyteorder("=")))
