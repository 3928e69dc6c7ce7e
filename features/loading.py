"""Preprocessed batches of records, in order, read by worker processes; and records of several views, such as a sound's windows."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Windows of sounds that go through an encoder together, whatever the length of a clip.
VIEWS_AT_ONCE = {"cpu": 16}
VIEWS_AT_ONCE_ELSEWHERE = 64
MOST_APART = 64  # views of a record that are kept apart; of a longer one, neighbours are averaged


def pad_vectors(several):
    """Tensors [B, L, D] whose L may differ → one [N, L, D]; zeros stand where one has fewer vectors than another."""
    import torch

    most = max(rows.shape[1] for rows in several)
    return torch.cat([torch.nn.functional.pad(rows, (0, 0, 0, most - rows.shape[1])) for rows in several])


def encode_views(encoder, several):
    """Encode records of several views each → [B, D] float32 on the CPU, the mean over each record's views.

    Of an encoder without pooling: [B, L, D], the views apart, at most MOST_APART, zeros where a record has fewer than another.

    several: list of tensors or arrays [W, …], W ≥ 1. Views pass the encoder in chunks of equal size, so that a long clip needs no more
    memory than many short ones.
    """
    import torch

    views = [view for record in several for view in torch.as_tensor(record)]
    chunk = VIEWS_AT_ONCE.get(encoder.device.type, VIEWS_AT_ONCE_ELSEWHERE)
    encoded = [encoder.encode(torch.stack(views[start : start + chunk])).float().cpu() for start in range(0, len(views), chunk)]
    by_record = torch.cat(encoded).split([len(record) for record in several])
    if getattr(encoder, "pooling", "pooled") == "pooled":
        return torch.stack([rows.mean(0) for rows in by_record])
    groups = [torch.stack([group.mean(0) for group in rows.tensor_split(min(len(rows), MOST_APART))]) for rows in by_record]
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True)  # [B, L, D]


def encode_batch(encoder, batch):
    """Encode what a loader gave (a tensor or array [B, …], or a list of views) → [B, D] on the CPU."""
    import torch

    return encode_views(encoder, batch) if getattr(encoder, "many_views", False) else encoder.encode(torch.as_tensor(batch)).cpu()


class Pictures:
    """What a loader worker sees: number → (number, preprocessed picture or None, reason it cannot be read or None)."""

    def __init__(self, images, preprocess):
        """images: what `preprocess` takes, or objects whose read() gives it."""
        self.images, self.preprocess = images, preprocess

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        image = self.images[number]
        try:
            return number, self.preprocess(image.read() if hasattr(image, "read") else image), None
        except (ValueError, OSError) as error:
            return number, None, str(error)


def _stack(items):
    """Items of a batch → numbers read, tensor [B, …] or None, [(number, reason)] of the rest."""
    import torch

    good = [(number, tensor) for number, tensor, _ in items if tensor is not None]
    unread = [(number, reason) for number, tensor, reason in items if tensor is None]
    return [number for number, _ in good], torch.stack([tensor for _, tensor in good]) if good else None, unread


def _stack_without_shared_memory(items):
    numbers, batch, unread = _stack(items)
    return numbers, batch if batch is None else batch.numpy(), unread  # an array goes through a pipe, a tensor through /dev/shm


def _list_views(items):
    """Like _stack for records of many views: a list of arrays [W, …] in place of one tensor."""
    good = [(number, tensor) for number, tensor, _ in items if tensor is not None]
    unread = [(number, reason) for number, tensor, reason in items if tensor is None]
    return [number for number, _ in good], [tensor.numpy() for _, tensor in good], unread


def _read_in_threads(dataset, batches, threads):
    """Batches one after the other: all cores read the pictures of one, then are free for the encoder. PIL works outside Python's lock."""

    def read(numbers):
        return [dataset[number] for number in numbers]

    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            size = -(-len(batch) // threads)
            shares = pool.map(read, (batch[start : start + size] for start in range(0, len(batch), size)))
            yield _stack([item for share in shares for item in share])


def make_loader(dataset, batches, encoder, batch_size, num_workers):
    """A loader over the given batches of record numbers, in order; its workers read and preprocess, and hold no weights.

    Without workers pictures are read by threads of this process between two encodings, sounds by this process itself.
    """
    from torch.utils.data import DataLoader

    on_gpu = encoder.device.type == "cuda"
    many_views = getattr(encoder, "many_views", False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_workers is None:
        # A GPU waits for pictures; a CPU encodes several times slower than one core reads them, and misses a core given to reading.
        num_workers = min(16, cores) if on_gpu else cores // 4
    num_workers = min(num_workers, len(batches))
    if not num_workers and not many_views:
        return _read_in_threads(dataset, batches, cores)
    shared_memory = Path("/dev/shm")
    most_bytes = num_workers * 3 * batch_size * 2_000_000  # three batches a worker, pictures of up to 400 x 400 float32
    scarce = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free < most_bytes  # 64 MB in most containers
    plainly = _stack_without_shared_memory if scarce else _stack
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        # Nobody knows how long clips are, and so how much shared memory they would need.
        collate_fn=_list_views if many_views else plainly,
        pin_memory=on_gpu and not scarce and not many_views,
    )
