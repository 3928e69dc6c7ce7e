"""The batches of an epoch, packed before the step that learns from them asks."""

import collections
import dataclasses
from concurrent.futures import ThreadPoolExecutor

# A GPU computes while the next batches are packed; a CPU has no core to spare for it.
PACKED_AHEAD = {"cuda": 4, "mps": 2}
# Rows of one length, so that a GPU sees few shapes: with shorter ones the number of rows would differ from batch to batch.
ROW_SLOTS = (256, 512, 1024)
TRIED = 8  # batches


@dataclasses.dataclass
class StepBatch:
    """What one optimiser step learns from."""

    captions: object  # int64 [n], numbers of the captions of all processes
    parts: list  # features.packing.PackedBatch, this process's share in --accumulate parts
    has_share: bool  # False: there were fewer captions than processes, and the part is only there to join the exchange
    predicted: int  # tokens that this process predicts


def packed_steps(data, batches, accumulate, rank, processes, device_type):
    """Pack the share of process `rank` in each batch → StepBatch after StepBatch, in order.

    data: training.data.CaptionData; batches: list of int64 arrays of caption numbers, one an optimiser step. Where there is a GPU, some
    steps are packed ahead by a thread, on CUDA into memory that the GPU fetches by itself.
    """
    import numpy as np

    def pack(captions):
        share = captions[rank * len(captions) // processes : (rank + 1) * len(captions) // processes]
        has_share = len(share) > 0
        parts = np.array_split(share if has_share else captions[:1], min(accumulate, max(len(share), 1)))
        parts = [data.pack(part) for part in parts]
        predicted = sum(len(part.labels) for part in parts) * has_share
        return StepBatch(captions, [part.pin() for part in parts] if device_type == "cuda" else parts, has_share, predicted)

    ahead = PACKED_AHEAD.get(device_type, 0)
    if not ahead:
        yield from map(pack, batches)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque()
        for captions in batches:
            waiting.append(thread.submit(pack, captions))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def settle_row_slots(row_tokens, data, bs, sampling, device_type):
    """Slots that every row of a batch holds: --row_tokens where it is given; else on a GPU the one of ROW_SLOTS that costs the least over
    a few batches, and None on a CPU, where each batch has rows of its own.
    """
    from features.packing import plan_epoch, row_cost

    if row_tokens is not None or device_type not in PACKED_AHEAD:
        return row_tokens

    batches = plan_epoch(data.caption_rows, bs, sampling)[:TRIED]
    return min(ROW_SLOTS, key=lambda slots: sum(row_cost(*data.pack(batch, row_slots=slots).input_ids.shape) for batch in batches))
