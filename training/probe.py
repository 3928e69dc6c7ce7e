"""Whether a language model takes packed rows: tried on a few captions before the run begins."""

from common import UserError

CAPTIONS_TRIED = 6
# Nats a token, on average: packed and plain rows differ by rounding (about 1e-6), a mask that is not obeyed by far more.
TOLERANCE = 1e-4


def takes_packed_rows(model, data, say):
    """Compare the losses of a few captions packed into one row with those of one row each → whether they are the same.

    model: ClipCaptionModel; it is left in the mode it was in. data: training.data.CaptionData. Says so when they are not, or when the
    language model refuses the mask. Raises UserError when it cannot read plain rows either.
    """
    import torch

    from features.packing import plan_epoch

    numbers = plan_epoch(data.caption_rows, CAPTIONS_TRIED)[0]
    was_training = model.training
    model.eval()
    name = type(model.gpt).__name__
    try:
        with torch.no_grad():
            plain = model(data.pack(numbers, packed=False), reduction="none")
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be trained on embeddings ({reason}). Take another language model, such as gpt2.") from error
    try:
        with torch.no_grad():
            packed = model(data.pack(numbers, packed=True, blocks_a_row=(len(numbers),)), reduction="none")
        difference = (packed - plain).abs().mean().item() if len(plain) else 0.0
        found = None if difference <= TOLERANCE * max(1.0, plain.mean().item()) else f"its losses differ by {difference:.2g} nats a token"
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        found = f"it answers: {(str(error).splitlines() or [type(error).__name__])[0]}"
    model.train(was_training)
    if found:
        say(f"{name} does not take packed rows ({found}): trained with one caption a row, which is slower")
    return found is None
