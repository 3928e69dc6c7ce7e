"""Preprocessed batches of records, in order, read by worker processes; and records of several views, such as a sound's windows.

B batch, W views of a record, D width, L vectors per image.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Windows of sounds that go through an encoder together, whatever the length of a clip.
VIEWS_AT_ONCE = {"cpu": 16}
VIEWS_AT_ONCE_ELSEWHERE = 64
MOST_APART = 64  # views of a record that are kept apart; neighbours of a longer one are averaged


def pad_vectors(rows, most):
    """Pad an array [N, L, D] with zeros to [N, most, D]: an image with fewer vectors than another has zeros there."""
    return np.pad(rows, ((0, 0), (0, most - rows.shape[1]), (0, 0)))


def encode_views(encoder, several):
    """Encode records of several views each.

    Views pass the encoder in chunks of equal size, so that a long clip needs no more memory than many short ones.

    Args:
        encoder: Encoder or SoundEncoder.
        several: list of B tensors or arrays [W, ...], W >= 1.

    Returns:
        [B, D] float32 tensor on the CPU, the mean over each record's views. Without pooling [B, L, D], the views apart, at most MOST_APART,
        with zeros where a record has fewer than another.
    """
    import torch

    views = [view for record in several for view in torch.as_tensor(record)]
    chunk = VIEWS_AT_ONCE.get(encoder.device.type, VIEWS_AT_ONCE_ELSEWHERE)
    encoded = [encoder.encode(torch.stack(views[start : start + chunk])).float().cpu() for start in range(0, len(views), chunk)]
    by_record = torch.cat(encoded).split([len(record) for record in several])
    if encoder.pooling == "pooled":
        return torch.stack([rows.mean(0) for rows in by_record])
    groups = [torch.stack([group.mean(0) for group in rows.tensor_split(min(len(rows), MOST_APART))]) for rows in by_record]
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True)  # [B, L, D]


def encode_batch(encoder, batch):
    """Encode a loader's batch: a tensor or array [B, ...], or a list of views. Returns [B, D] or [B, L, D] on the CPU."""
    import torch

    return encode_views(encoder, batch) if encoder.many_views else encoder.encode(torch.as_tensor(batch)).cpu()


class Pictures:
    """A torch data set: the number of a record to (number, preprocessed picture or None, reason it cannot be read or None)."""

    def __init__(self, images, preprocess):
        """Take what `preprocess` accepts, or objects whose read() returns it."""
        self.images, self.preprocess = images, preprocess

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        image = self.images[number]
        try:
            return number, self.preprocess(image.read() if hasattr(image, "read") else image), None
        except (ValueError, OSError) as error:
            return number, None, str(error)


def _sort_read(items):
    """Split a batch's items into numbers read, their tensors, and [(number, reason)] of the rest."""
    good = [(number, tensor) for number, tensor, _ in items if tensor is not None]
    unread = [(number, reason) for number, tensor, reason in items if tensor is None]
    return [number for number, _ in good], [tensor for _, tensor in good], unread


def _stack(items):
    """Collate a batch to numbers read, tensor [B, ...] or None, and the rest."""
    import torch

    numbers, tensors, unread = _sort_read(items)
    return numbers, torch.stack(tensors) if tensors else None, unread


def _stack_without_shared_memory(items):
    """Collate to an array, which goes through a pipe; a tensor goes through /dev/shm."""
    numbers, batch, unread = _stack(items)
    return numbers, batch if batch is None else batch.numpy(), unread


def _list_views(items):
    """Collate records of many views to a list of arrays [W, ...]."""
    numbers, tensors, unread = _sort_read(items)
    return numbers, [tensor.numpy() for tensor in tensors], unread


def _read_in_threads(dataset, batches, threads):
    """Yield batches one after the other: all cores read the pictures of one, then are free for the encoder."""

    def read(numbers):
        return [dataset[number] for number in numbers]

    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            size = -(-len(batch) // threads)
            shares = pool.map(read, (batch[start : start + size] for start in range(0, len(batch), size)))
            yield _stack([item for share in shares for item in share])


def make_loader(dataset, batches, encoder, batch_size, num_workers, sharers=1):
    """Make a loader over batches of record numbers, in order. Its workers read and preprocess, and hold no weights.

    Args:
        dataset: Pictures.
        batches: sequence of ranges.
        encoder: the encoder that takes the batches.
        batch_size: records per batch, to estimate memory.
        num_workers: processes; None: by cores. With 0, threads of this process read pictures between two encodings, and the process
            itself reads sounds.
        sharers: processes of this command on this machine, which share its cores.

    Returns:
        Iterable of (numbers read, batch, [(number, reason)] of the rest).
    """
    from torch.utils.data import DataLoader

    on_gpu = encoder.device.type == "cuda"
    many_views = encoder.many_views
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // sharers)
    if num_workers is None:
        # A GPU waits for pictures. A CPU encodes several times slower than one core reads, and needs every core for that.
        num_workers = min(16, cores) if on_gpu else cores // 4
    num_workers = min(num_workers, len(batches))
    if not num_workers and not many_views:
        return _read_in_threads(dataset, batches, cores)
    shared_memory = Path("/dev/shm")
    most_bytes = num_workers * 3 * batch_size * 2_000_000  # three batches per worker, pictures of up to 400 x 400 float32
    scarce = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free < most_bytes  # 64 MB in most containers
    plainly = _stack_without_shared_memory if scarce else _stack
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        # Clips may have any length, so the shared memory they need is unknown.
        collate_fn=_list_views if many_views else plainly,
        pin_memory=on_gpu and not scarce and not many_views,
    )
