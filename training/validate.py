"""Validation: loss and grounding gap on held-out captions, scores of decoded ones, signs of a collapse, and the best checkpoint."""

import dataclasses
import math

from training.device import map_together, uncompiled
from training.state import random_states, restore_random_states

GAP_CAPTIONS = 5000  # captions that the gap is measured on: the second pass stays cheap, the error of a difference of pairs small
# A captioner has collapsed when it hardly needs its prefix: the gap of a trained one is some tenths of a nat or more.
LEAST_GAP = 0.01  # nats per token
LEAST_DISTINCT = 0.1  # different captions, as a share of the different references; and never just one
COLLAPSE_ADVICE = (
    "The language model ignores its prefix. Check that captions belong to their images (python check.py DATA), train longer or with "
    "a higher --mapper_lr, or start from trained weights (--init_from)."
)
SHOWN = 6  # sample captions in the table
DECODED_TOGETHER = 50  # images
TOKENIZER = "plain tokenizer: compare it with other validations, not with published scores"


class Validation:
    """Validates a run when it is due; the processes of the run share the batches and the decoding, and get the same figures."""

    def __init__(self, model, captioner, data, options, plan, accelerator, files, log, best):
        """Draw the sample of images to caption.

        Args:
            model: ClipCaptionModel as accelerator.prepare gave it; captioner: the same, bare.
            data: CaptionData of --val_data; None: never due.
            options: options of train.py; plan: training.batches.Plan.
            accelerator: accelerate.Accelerator.
            files: training.state.Checkpoints, which keep the best weights; log: training.run_log.RunLog.
            best: training.state.BestSoFar.
        """
        self.model, self.captioner, self.data, self.options, self.plan = model, captioner, data, options, plan
        self.accelerator, self.files, self.log, self.best = accelerator, files, log, best
        self.every = options.val_every or plan.steps_per_epoch
        self.sample = None
        if data and options.val_captions:
            self.sample = CaptionSample(data, options.val_captions)
            accelerator.print(f"validation: {len(self.sample.texts):,} images captioned greedily each time; CIDEr by the {TOKENIZER}")

    def is_due(self, step):
        """Whether a validation is due after `step` optimizer steps."""
        return self.data is not None and self.best.step < step and (step % self.every == 0 or step == self.plan.total_steps)

    def report(self, step):
        """Validate, print and log the figures, and keep the weights if they are the best."""
        figures, samples = self.run()
        better = self.best.update(figures, step)
        epoch, say = self.plan.epoch_of(step), self.accelerator.print
        where = f"step {step:,}" if self.options.val_every else f"epoch {epoch}"
        loss = f"validation loss {figures['val_loss']:.4f}, perplexity {figures['val_perplexity']:.2f}"
        warm = step >= min(self.plan.warmup_steps, self.plan.total_steps)
        collapse = find_collapse(figures, bool(self.options.base_checkpoint) or self.captioner.datastore is not None) if warm else None
        self.log.write_validation(step, epoch, figures | ({"val_collapse": collapse} if collapse else {}), samples)
        if better:
            self.files.save_weights("_best")
        say(f"{where}: {loss}{describe_figures(figures)}{', the best' if better else ''}")
        if samples:
            say("\n".join(format_samples(samples)))
        if collapse:
            say(f"warning: the captions hardly depend on their images: {collapse}. {COLLAPSE_ADVICE}")

    def run(self):
        """Validate once. Random generators are left as they were, so that validating never changes the training.

        Returns:
            Dict of figures (val_loss, val_perplexity, val_gap, and what CaptionSample.score returns), and rows of samples.
        """
        random, was_training = random_states(), self.model.training
        loss, gap = validation_loss(self.model, self.data, self.options.bs, self.accelerator)
        figures = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}
        figures |= {} if math.isnan(gap) else {"val_gap": gap}
        scores, rows = self.sample.score(self.captioner) if self.sample else ({}, [])
        self.model.train(was_training)
        restore_random_states(random)
        return figures | scores, rows


def validation_loss(model, data, bs, accelerator):
    """Compute the mean cross-entropy per token over a data set, and the grounding gap.

    The gap is the loss with every image's prefix taken from another image, less the true loss: what looking at the image is worth. It
    is measured on the first GAP_CAPTIONS captions, rounded up to a whole batch. Each process takes its share of the batches.

    Args:
        model: as accelerator.prepare gave it; it is left in the mode it was in.
        data: training.data.CaptionData.
        bs: captions per batch.

    Returns:
        Loss and gap, two floats in nats per token; the gap of a single image is NaN.
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
                mixed_up = dataclasses.replace(batch, clip_embedding=data.features.clip_embedding[rows].float())
                shuffled = bare(mixed_up.to(accelerator.device)).to(place)
                sums[2:] += torch.stack([shuffled.double(), loss.double(), loss.new_tensor(tokens).double()])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    model.train(was_training)
    loss, tokens, shuffled, true, counted = sums.tolist()
    return loss / max(tokens, 1), (shuffled - true) / counted if counted else math.nan


def other_images(caption_rows):
    """Give every image another one.

    Returns:
        int64 array from row to row, no image its own; None where there is only one image.
    """
    import numpy as np

    rows = np.unique(caption_rows)
    if len(rows) < 2:
        return None
    drawn = np.random.default_rng(0).permutation(rows)
    other = np.arange(rows.max() + 1)
    other[drawn] = np.roll(drawn, 1)
    return other


class CaptionSample:
    """Validation images drawn once, the same at every validation and in every run on the same data, with their references as words."""

    def __init__(self, data, count):
        """Draw `count` images (or all, where there are fewer) of a CaptionData."""
        import numpy as np

        from evaluation.tokens import tokenize_plain

        captions, rows = data.features.captions, np.unique(data.caption_rows)
        if count < len(rows):
            rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
        numbers = np.flatnonzero(np.isin(data.caption_rows, rows))
        self.embeddings = data.features.clip_embedding[rows.tolist()]
        self.about, references = {}, {int(row): [] for row in rows}
        for number in numbers.tolist():
            caption, row = captions[number], int(data.caption_rows[number])
            self.about.setdefault(row, {name: caption[name] for name in ("image_id", "file_name") if name in caption})
            references[row].append(caption["caption"])
        self.ids = [self.about[row]["image_id"] for row in references]
        self.texts = list(references.values())
        self.references = [tokenize_plain(several) for several in self.texts]

    def score(self, model):
        """Caption the sample greedily, in all processes together. Leaves the model in eval mode and may move the random generators.

        Returns:
            Dict of figures: val_cider (CIDEr-D against these images' references), val_captions (how many), val_distinct and
            val_distinct_references (different captions, different first references), val_ended (share that ended by the stop token);
            and rows of the table of samples, without step and epoch.
        """
        from evaluation.metrics import score_cider
        from evaluation.tokens import tokenize_plain
        from models.decoding import generate

        step = DECODED_TOGETHER if model.datastore is None else len(self.embeddings)  # generate gathers prompts of one length

        def decode(start):
            chunk, ids = self.embeddings[start : start + step].float(), self.ids[start : start + step]
            found = generate(model, chunk, "greedy", return_ended=True, seed=0, image_ids=ids, in_text_space=True)
            return [several[0] for several in found]

        with uncompiled(model):
            decoded = map_together(decode, range(0, len(self.embeddings), step))
        texts = [text for text, _, _ in decoded]
        words = tokenize_plain(texts)
        cider = score_cider(words, self.references)
        figures = {
            "val_cider": float(cider.value),
            "val_captions": len(words),
            "val_distinct": len(set(words)),
            "val_distinct_references": len({several[0] for several in self.references}),
            "val_ended": sum(ended for _, _, ended in decoded) / len(decoded),
        }
        rows = [
            {**about, "reference": several[0], "caption": text, "cider": round(float(score), 4)}
            for about, several, text, score in zip(self.about.values(), self.texts, texts, cider.per_image)
        ]
        return figures, rows[:SHOWN]


def format_samples(rows, width=52):
    """Lay the sample captions out as lines of text: image_id, reference, caption."""

    def cut(text):
        text = " ".join(str(text).split()).encode("utf-8", "replace").decode()
        return text if len(text) <= width else text[: width - 3] + "..."

    lines = [f"  {'image_id':<14} {'reference':<{width}} caption"]
    return lines + [f"  {cut(row['image_id'])[-14:]:<14} {cut(row['reference']):<{width}} {cut(row['caption'])}" for row in rows]


def find_collapse(figures, quotes_others=False):
    """Find signs that the captions hardly depend on their images.

    Args:
        figures: what Validation.run returned.
        quotes_others: whether the prompt already holds captions of the image or of similar ones, so that a small gap says nothing.

    Returns:
        The signs in words; None where there are none.
    """
    signs = []
    gap = figures.get("val_gap")
    if gap is not None and gap < LEAST_GAP and not quotes_others:
        signs.append(f"with another image's prefix the loss is only {gap:.4f} nats per token higher")
    distinct, true = figures.get("val_distinct"), figures.get("val_distinct_references")
    if distinct is not None and true > 1 and distinct < max(2, LEAST_DISTINCT * true):
        signs.append(f"{figures['val_captions']} images get {distinct} different caption{'s' * (distinct != 1)}")
    return " and ".join(signs) or None


def describe_figures(figures):
    """Put the figures of a validation in words, without the loss."""
    parts = []
    if "val_gap" in figures:
        parts.append(f"grounding gap {figures['val_gap']:.3f} nats per token")
    if "val_cider" in figures:
        count = figures["val_captions"]
        parts.append(f"CIDEr {100 * figures['val_cider']:.1f}, {figures['val_distinct']} of {count} captions distinct")
        parts.append(f"{figures['val_ended']:.0%} ended with the stop token")
    return "".join(f", {part}" for part in parts)
