"""Validation: loss and grounding gap on held-out captions, scores of decoded ones, the best checkpoint, and when to stop early."""

import math

GAP_CAPTIONS = 5000  # the gap is measured on so many captions: the second pass stays cheap, the error of a difference of pairs small
# A captioner has collapsed when it hardly needs its prefix: a trained one's gap is some tenths of a nat or more.
LEAST_GAP = 0.01  # nats a token
LEAST_DISTINCT = 0.1  # different captions, as a share of the different references; and never just one
COLLAPSE_ADVICE = (
    "The language model passes over its prefix. Look whether captions belong to their images (python check.py DATA), train longer or with "
    "a higher --mapper_lr, or start from trained weights (--init_from)."
)


def validation_loss(model, data, bs, accelerator):
    """Mean cross-entropy of a token over a data set, in nats (perplexity is its exponential), and the grounding gap → two floats.

    The gap is the loss with every image's prefix taken from another image, less the true loss, over the first captions (GAP_CAPTIONS,
    to a whole batch): what looking at the image is worth. NaN where there is one image alone.
    model: as accelerator.prepare gave it; data: training.data.CaptionData; bs: captions a batch. Each process takes its share of the
    batches. The model is left in the mode it was in.
    """
    import torch

    from features.packing import plan_epoch

    was_training = model.training
    model.eval()
    place = "cpu" if accelerator.device.type == "mps" else accelerator.device
    sums = torch.zeros(5, dtype=torch.float64, device=place)  # loss and tokens; of the gap: shuffled loss, true loss, tokens
    other = other_images(data.caption_rows)
    # The bare module: processes may have different numbers of batches, and must not wait for one another here.
    bare = accelerator.unwrap_model(model)
    with torch.no_grad():
        batches = list(enumerate(plan_epoch(data.caption_rows, bs, "images")))
        for number, captions in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = data.pack(captions)
            tokens = len(batch.labels)
            loss = bare(batch.to(accelerator.device)).to(place)
            sums[:2] += torch.stack([loss.double(), loss.new_tensor(tokens).double()])
            if other is not None and number * bs < GAP_CAPTIONS:
                rows = torch.from_numpy(other[batch.image_rows.cpu().numpy()])
                batch.clip_embedding = data.features.clip_embedding[rows].float().to(accelerator.device)
                shuffled = bare(batch).to(place)
                sums[2:] += torch.stack([shuffled.double(), loss.double(), loss.new_tensor(tokens).double()])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    model.train(was_training)
    loss, tokens, shuffled, true, counted = sums.tolist()
    return loss / max(tokens, 1), (shuffled - true) / counted if counted else math.nan


def other_images(caption_rows):
    """Give every image another one: an int64 array from row to row, no image its own; None where there is one image alone."""
    import numpy as np

    rows = np.unique(caption_rows)
    if len(rows) < 2:
        return None
    drawn = np.random.default_rng(0).permutation(rows)
    other = np.arange(rows.max() + 1)
    other[drawn] = np.roll(drawn, 1)
    return other


class Validation:
    """What train.py asks at each validation: figures the same on every process, decoding on the first."""

    def __init__(self, model, captioner, data, options, accelerator, say):
        """model: as accelerator.prepare gave it; captioner: the same, bare; data: CaptionData; options: bs and val_captions."""
        from training.sampling import TOKENISER, CaptionSample

        self.model, self.captioner, self.data, self.bs, self.accelerator = model, captioner, data, options.bs, accelerator
        first = accelerator.is_main_process and options.val_captions
        self.sample = CaptionSample(data, options.val_captions) if first else None
        if self.sample:
            say(f"validation: {len(self.sample.texts):,} images captioned greedily each time; CIDEr over words of the {TOKENISER}")

    def run(self):
        """→ dict of figures (val_loss, val_perplexity, val_gap, and what CaptionSample.score gives), and rows of samples.

        Samples are of the first process alone. Random generators are left as they were, so that training goes on as without it.
        """
        from training.state import random_states, restore_random_states

        random, was_training = random_states(), self.model.training
        loss, gap = validation_loss(self.model, self.data, self.bs, self.accelerator)
        figures = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}
        figures |= {} if math.isnan(gap) else {"val_gap": gap}
        scores, rows = self.sample.score(self.captioner) if self.sample else ({}, [])
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (scores,) = broadcast_object_list([scores])
        self.model.train(was_training)
        restore_random_states(random)
        return figures | scores, rows


def find_collapse(figures, quotes_base=False):
    """What says that the captions hardly depend on their images → str, or None where nothing does.

    figures: what Validation.run gave; quotes_base: the prompt already holds a caption of the image, so that a small gap says nothing.
    """
    signs = []
    gap = figures.get("val_gap")
    if gap is not None and gap < LEAST_GAP and not quotes_base:
        signs.append(f"with another image's prefix the loss is only {gap:.4f} nats a token higher")
    distinct, true = figures.get("val_distinct"), figures.get("val_distinct_references")
    if distinct is not None and true > 1 and distinct < max(2, LEAST_DISTINCT * true):
        signs.append(f"{figures['val_captions']} images get {distinct} different caption{'s' * (distinct != 1)}")
    return " and ".join(signs) or None


def describe_figures(figures):
    """The figures of a validation in words, without the loss: ", grounding gap 0.801 nats a token, CIDEr 91.2, …"."""
    parts = []
    if "val_gap" in figures:
        parts.append(f"grounding gap {figures['val_gap']:.3f} nats a token")
    if "val_cider" in figures:
        count = figures["val_captions"]
        parts.append(f"CIDEr {100 * figures['val_cider']:.1f}, {figures['val_distinct']} of {count} captions distinct")
        parts.append(f"{figures['val_ended']:.0%} ended by themselves")
    return "".join(f", {part}" for part in parts)


class BestSoFar:
    """Remembers the best validation, by loss (lowest) or CIDEr (highest), and counts the validations since."""

    def __init__(self, patience=None, by="loss", value=None, epochs_since=0, step=-1):
        """patience: validations without a better one before training stops; None never stops it. step: the last validation's."""
        self.patience, self.by, self.value, self.epochs_since, self.step = patience, by, value, epochs_since, step

    def update(self, figures, step):
        """Count one validation → whether it is the best. figures: what Validation.run gave; step: optimiser steps done."""
        value = figures[f"val_{self.by}"]
        better = self.value is None or (value < self.value if self.by == "loss" else value > self.value)
        better = better and not math.isnan(value)
        self.value = value if better else self.value
        self.epochs_since = 0 if better else self.epochs_since + 1
        self.step = step
        return better

    @property
    def is_out_of_patience(self):
        return self.patience is not None and self.epochs_since >= self.patience

    def as_dict(self):
        """What a resume point keeps."""
        return {"by": self.by, "value": self.value, "epochs_since": self.epochs_since, "step": self.step}
