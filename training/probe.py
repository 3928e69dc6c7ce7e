"""Whether a language model takes packed rows: tried on a few captions before the run begins."""

from common import UserError

# Local attention windows are 256 and more: the row that is tried must be as long as the run's can be, up to this many tokens.
LONGEST_ROW = 1024
CAPTIONS_COMPARED = 6
# Nats a token, on average: packed and plain rows differ by rounding (about 1e-6), a mask that is not obeyed by far more.
TOLERANCE = 1e-4
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


def takes_packed_rows(model, data, bs, say):
    """Compare the losses of captions at the end of a packed row with those of one row each → whether they are the same.

    model: ClipCaptionModel; it is left in the mode it was in. data: training.data.CaptionData; bs: captions a batch. Says so when they
    are not the same, or when the language model refuses the mask. Raises UserError when it cannot read plain rows either.
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
        found = None if difference <= TOLERANCE * max(1.0, plain.mean().item()) else f"its losses differ by {difference:.2g} nats a token"
    except REFUSALS as error:
        found = f"it answers: {(str(error).splitlines() or [type(error).__name__])[0]}"
    model.train(was_training)
    if found:
        say(f"{name} does not take packed rows ({found}): trained with one caption a row, which is slower")
    return found is None


def _longest_row(data, bs):
    """The captions of the longest row a batch may have, sorted by image: those of the images with most tokens. → int64 [n]."""
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
