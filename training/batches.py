"""The plan of a run and its batches, packed before the step that needs them."""

import collections
import contextlib
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

from common import UserError
from training.options import WARMUP_SHARE, WARMUP_STEPS

# A GPU computes while the next batches are packed; a CPU has no core to spare for it.
PACKED_AHEAD = {"cuda": 4, "mps": 2}
# Lengths of rows in tokens, so that a GPU sees few shapes. With shorter rows their number would differ from batch to batch.
ROW_SLOTS = (256, 512, 1024)
TRIED = 8  # batches

# The probe of packed rows. Local attention windows are 256 and more, so the row it tries is as long as the run's can be, up to this.
LONGEST_ROW = 1024  # tokens
CAPTIONS_COMPARED = 6
TOLERANCE = 1e-4  # nats per token; packed and plain rows differ by rounding (about 1e-6), an ignored mask by far more
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, and how its batches are laid out."""

    steps_per_epoch: int  # optimizer steps
    total_steps: int  # optimizer steps of the whole run
    warmup_steps: int  # optimizer steps of warm-up
    packed: bool  # whether captions share rows and prefixes
    row_slots: int | None  # tokens of every row; None: each batch as it fits best

    def epoch_of(self, step):
        """Return the epoch, counted from 0, of the last of `step` optimizer steps."""
        return max(step - 1, 0) // self.steps_per_epoch

    def ends_epoch(self, step):
        """Whether an epoch, or the run, ends after `step` optimizer steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps


@dataclasses.dataclass
class StepBatch:
    """What one optimizer step learns from."""

    captions: object  # [n] int64, numbers of the captions of all processes
    parts: list  # features.packing.PackedBatch, this process's share in --accumulate parts
    has_share: bool  # False: fewer captions than processes, so the part only joins the exchange of gradients
    predicted: int  # tokens that this process predicts


def make_plan(model, data, options, device_type, say):
    """Settle the length of the run and the layout of its batches.

    Args:
        model: ClipCaptionModel, to try packed rows on.
        data: training.data.CaptionData.
        device_type: "cuda", "cpu" or "mps".
        say: function that prints a line.

    Returns:
        Plan.

    Raises:
        UserError: the data has less than one batch, or the language model cannot be trained on embeddings.
    """
    captions = len(data.tokens)
    steps_per_epoch = captions // options.bs if options.drop_last else math.ceil(captions / options.bs)
    if not steps_per_epoch:
        raise UserError(f"--drop_last leaves nothing of {captions} captions: one batch is --bs {options.bs}. Take a smaller --bs.")
    total = options.epochs * steps_per_epoch
    total = total if options.max_steps is None else min(total, options.max_steps)
    packed = takes_packed_rows(model, data, options.bs, say)
    row_slots = choose_row_slots(dataclasses.replace(data, packed=packed), options.bs, options.sampling, device_type)
    return Plan(steps_per_epoch, total, count_warmup(options, total), packed, row_slots)


def count_warmup(options, total):
    """Count the optimizer steps of warm-up of a run of `total` steps."""
    if options.warmup_ratio is not None:
        return round(options.warmup_ratio * total)
    if options.warmup_steps is not None:
        return options.warmup_steps
    return WARMUP_STEPS if options.published else min(WARMUP_STEPS, round(WARMUP_SHARE * total))


def run_batches(data, options, plan, step, accelerator):
    """Yield the StepBatch of every optimizer step from `step` to the end of the run.

    The draw of an epoch depends on seed and epoch alone, so that the step is the whole position of a run.
    """
    from features.packing import plan_epoch

    while step < plan.total_steps:
        epoch, done = divmod(step, plan.steps_per_epoch)
        drawn = plan_epoch(data.caption_rows, options.bs, options.sampling, options.seed, epoch, options.drop_last)
        drawn = drawn[done : done + plan.total_steps - step]
        rank, processes = accelerator.process_index, accelerator.num_processes
        with contextlib.closing(packed_steps(data, drawn, options.accumulate, rank, processes, accelerator.device.type)) as batches:
            yield from batches
        step += len(drawn)


def packed_steps(data, batches, accumulate, rank, processes, device_type):
    """Pack the share of process `rank` in each batch and yield one StepBatch after the other.

    Where there is a GPU, a thread packs some steps ahead, on CUDA into memory that the GPU fetches from directly.

    Args:
        data: training.data.CaptionData.
        batches: list of [n] int64 arrays of caption numbers, one per optimizer step.
        accumulate: parts into which a share is split.
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


def choose_row_slots(data, bs, sampling, device_type):
    """Choose the length of every row on a GPU: the one of ROW_SLOTS that costs the least over a few batches.

    Returns:
        Tokens per row; None on a CPU, where each batch has rows of its own.
    """
    from features.packing import plan_epoch, row_cost

    if device_type not in PACKED_AHEAD:
        return None
    batches = plan_epoch(data.caption_rows, bs, sampling)[:TRIED]
    return min(ROW_SLOTS, key=lambda slots: sum(row_cost(*data.pack(batch, row_slots=slots).input_ids.shape) for batch in batches))


def takes_packed_rows(model, data, bs, say):
    """Try packed rows: compare the losses of captions at the end of a packed row with those of one row per caption.

    Args:
        model: ClipCaptionModel; it is left in the mode it was in.
        data: training.data.CaptionData.
        bs: captions per batch.
        say: function that prints a line; it is called when the losses differ or the language model refuses the mask.

    Returns:
        Whether the losses are the same.

    Raises:
        UserError: the language model cannot read plain rows either.
    """
    import numpy as np
    import torch

    numbers = _longest_row(data, bs)
    was_training = model.training
    model.eval()
    name = type(model.gpt).__name__
    try:
        with torch.no_grad():
            batch = data.pack(numbers, blocks_a_row=(len(numbers),), packed=True, ignore_index=None)
            ends = np.cumsum(data.tokens.predicted[numbers])
            last = int(np.searchsorted(ends, int(batch.predict_slots.argmax()), side="right"))  # the caption at the row's end
            compared = [n for n, row in enumerate(data.caption_rows[numbers]) if row == data.caption_rows[numbers[last]]]
            compared = compared[-CAPTIONS_COMPARED:]
            plain = model(data.pack(numbers[compared], packed=False, ignore_index=None), reduction="none")
    except REFUSALS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be trained on embeddings ({reason}). Take another language model, such as gpt2.") from error
    try:
        with torch.no_grad():
            packed = model(batch, reduction="none")[ends[compared[-1]] - len(plain) : ends[compared[-1]]]
        difference = (packed - plain).abs().mean().item()
        found = None if difference <= TOLERANCE * max(1.0, plain.mean().item()) else f"its losses differ by {difference:.2g} nats per token"
    except REFUSALS as error:
        found = f"it answers: {(str(error).splitlines() or [type(error).__name__])[0]}"
    model.train(was_training)
    if found:
        say(f"{name} does not take packed rows ({found}): trained with one caption per row, which is slower")
    return found is None


def _longest_row(data, bs):
    """Find the captions of the longest row a batch may have: [n] int64, sorted by image."""
    import numpy as np

    from features.packing import BLOCKS_A_ROW

    rows = np.asarray(data.caption_rows)
    tokens_of = np.bincount(rows, data.tokens.lengths)
    order = np.lexsort((rows, -tokens_of[rows]))[:bs]
    images, slots, taken = [], 0, []
    for number in order:
        if rows[number] not in images:
            if len(images) == max(BLOCKS_A_ROW) or (images and slots > LONGEST_ROW):
                break
            images.append(rows[number])
            slots += data.prefix_length
        slots += data.tokens.lengths[number]
        taken.append(number)
    return np.array(sorted(taken, key=lambda number: (rows[number], number)))
