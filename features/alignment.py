"""Do captions belong to the images they stand beside? True pairs of image and text against pairs of the same images with other texts.

Where captions are shifted against their images, a true pair is no closer than a shuffled one. Letters: n sampled pairs, D width, J width of
the space that images and texts share.
"""

import numpy as np

from common import UserError

LEAST_PAIRS = 8
LEAST_STRETCH = 30  # pairs from which a stretch of the file is judged for itself
STRETCHES = 16
ALIGNED = 4.0  # standard errors by which true pairs must be closer
BATCH = 256


def compare_pairs(report, features, good, towers, sample, seed, encoder=None):
    """Add "alignment" to the report's facts: a verdict ("aligned", "no gap", "partly", "not tested") and its figures.

    Args:
        report: features.check.Report.
        features: Features.
        good: bool [N], rows that hold an embedding at all.
        towers: function from an encoder's name to its text tower or None; or None.
        sample: most images drawn.
        seed: of the sample.
        encoder: the name to use where the file does not name its own.
    """
    name = encoder or features.meta.get("encoder")
    reason = tower = None
    if towers is None:
        reason = "this command has no text towers; check.py compares captions with their images"
    elif not sample:
        reason = "--sample 0"
    elif features.embeddings_per_image > 1:
        reason = "several embeddings an image, which are not in the space of a text tower"
    elif features.kind.are_texts:
        reason = "these are embeddings of the captions themselves"
    elif not name:
        reason = "the file does not name its encoder; give --clip_model_type"
    else:
        try:
            tower = towers(name)
            reason = None if tower else f"{name} has no text tower"
        except UserError as error:
            if encoder:
                raise
            reason = str(error)
    if not reason:
        images, texts = draw_pairs(features, good, sample, seed)
        reason = None if len(images) >= LEAST_PAIRS else f"{len(images)} images with a caption, too few"
    if reason:
        report.facts["alignment"] = {"verdict": "not tested", "reason": reason}
        report.notes.append(f"captions were not compared with their images: {reason}")
        return
    try:
        figures = measure_alignment(tower, features.clip_embedding, images, texts)
    except UserError as error:
        if encoder:
            raise
        report.facts["alignment"] = {"verdict": "not tested", "reason": str(error)}
        report.problems.append(f"embeddings are not what {name} gives: {error}")
        return
    report.facts["alignment"] = figures
    shown = (
        f"mean cosine {figures['true_cosine']:.4f} with its own caption, {figures['shuffled_cosine']:.4f} with another "
        f"({figures['pairs']:,} images, {figures['standard_errors']:.1f} standard errors apart)"
    )
    if figures["verdict"] == "aligned":
        report.notes.append(f"captions belong to their images: {shown}")
    elif figures["verdict"] == "partly":
        where = ", ".join(f"{first:,} to {last:,}" for first, last in figures["rows_without_gap"])
        report.problems.append(f"captions do not belong to their images in rows {where}; over all: {shown}")
    else:
        why = "rows are out of step, or the encoder does not know such pictures"
        report.problems.append(f"captions do not belong to their images, {why}: {shown}")


def draw_pairs(features, good, sample, seed):
    """Draw images and one caption of each. Returns rows [n] int64, ascending, and n texts; blank captions are skipped."""
    draw = np.random.default_rng(seed)
    rows = features.caption_rows
    order = draw.permutation(len(rows))
    images, first = np.unique(rows[order], return_index=True)  # of each image, the caption that comes first in the draw
    kept = np.flatnonzero(good[images])
    chosen = np.sort(draw.permutation(kept)[:sample])
    every = features.texts
    texts = [every[int(order[first[place]])] for place in chosen]
    full = [place for place, text in enumerate(texts) if text.strip()]
    return images[chosen][full].astype(np.int64), [texts[place] for place in full]


def measure_alignment(tower, clip_embedding, images, texts):
    """Compare the cosine of each image and its own text with its mean over the other texts. Returns dict of figures and the verdict.

    The standard error is of the mean of these differences. A stretch of rows whose difference is not 2 of its own standard errors, in a
    file where half of the stretches have 8 and more, is out of step: that is "partly". Raises UserError when the tower does not fit.
    """
    import torch

    places = range(0, len(images), BATCH)
    try:
        image = torch.cat([tower.project(clip_embedding[images[at : at + BATCH]].float()).cpu() for at in places]).float()  # [n, J]
    except RuntimeError as error:  # as torch says that widths differ
        found = f"embeddings {clip_embedding.shape[1]} wide do not go into the text tower ({str(error).splitlines()[0][:100]})"
        raise UserError(f"{found}: give the --clip_model_type they were made with.") from error
    text = torch.cat([tower.encode_text(texts[at : at + BATCH]).cpu() for at in places]).float()  # [n, J]
    if image.shape != text.shape:
        found = f"images are {image.shape[1]} wide in the text tower's space, texts {text.shape[1]}"
        raise UserError(f"{found}: give the --clip_model_type they were made with.")
    true = (image * text).sum(1).double()
    others = ((image * text.sum(0)).sum(1).double() - true) / (len(true) - 1)  # the mean with every text but its own
    gap = (true - others).numpy()
    stretches = np.array_split(np.arange(len(gap)), max(1, min(STRETCHES, len(gap) // LEAST_STRETCH)))
    of_stretch = np.array([_standard_errors(gap[stretch]) for stretch in stretches])
    verdict, without = "aligned" if _standard_errors(gap) >= ALIGNED else "no gap", []
    if verdict == "aligned" and np.median(of_stretch) >= 2 * ALIGNED:
        without = [[int(images[one[0]]), int(images[one[-1]])] for one, errors in zip(stretches, of_stretch) if errors < ALIGNED / 2]
    return {
        "verdict": "partly" if without else verdict,
        "pairs": len(gap),
        "true_cosine": float(true.mean()),
        "shuffled_cosine": float(others.mean()),
        "standard_errors": float(_standard_errors(gap)),
        "closer_share": float((gap > 0).mean()),
        "rows_without_gap": without,
    }


def _standard_errors(gap):
    """The mean of `gap` in units of its standard error."""
    return gap.mean() / max(gap.std(ddof=1) / len(gap) ** 0.5, 1e-9)
