"""Validation: the loss on held-out captions, the best checkpoint, and when to stop early."""

import math


def validation_loss(model, data, bs, accelerator):
    """Mean cross-entropy of a token over a data set, in nats; perplexity is its exponential.

    model: as accelerator.prepare gave it; data: training.data.CaptionData; bs: captions a batch. Each process takes its share of the
    batches. The model is left in the mode it was in.
    """
    import torch

    from features.packing import plan_epoch

    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device="cpu" if accelerator.device.type == "mps" else accelerator.device)
    with torch.no_grad():
        batches = plan_epoch(data.caption_rows, bs, "images")
        for captions in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = data.pack(captions)
            # The bare module: processes may have different numbers of batches, and must not wait for one another here.
            loss = accelerator.unwrap_model(model)(batch.to(accelerator.device))
            sums[0] += loss.to(sums.device)
            sums[1] += len(batch.labels)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    model.train(was_training)
    return (sums[0] / sums[1].clamp(min=1)).item()


class BestSoFar:
    """Remembers the lowest validation loss and counts the epochs since."""

    def __init__(self, patience=None, loss=math.inf, epochs_since=0):
        """patience: epochs without a better loss before training stops; None never stops it."""
        self.patience, self.loss, self.epochs_since = patience, loss, epochs_since

    def update(self, loss):
        """Count one epoch → whether its loss is the best."""
        better = loss < self.loss
        self.loss = min(loss, self.loss)
        self.epochs_since = 0 if better else self.epochs_since + 1
        return better

    @property
    def is_out_of_patience(self):
        return self.patience is not None and self.epochs_since >= self.patience

    def as_dict(self):
        """What a resume point keeps."""
        return {"loss": self.loss, "epochs_since": self.epochs_since}
