"""CLIPScore and RefCLIPScore (arXiv:2104.08718), from embeddings in CLIP's joint space. N images, J width of the joint space."""

from evaluation.statistics import mean_metric

WEIGHT = 2.5  # section 3.1: stretches the usual cosines over most of 0 to 1


def clip_scores(images, candidates, references):
    """Compute CLIPScore, 2.5 * max(cos(image, candidate), 0), and RefCLIPScore.

    RefCLIPScore is the harmonic mean of CLIPScore and max(0, the largest cos(candidate, reference)).

    Args:
        images: [N, J] float, of L2 norm 1, as are the others.
        candidates: [N, J].
        references: list of N arrays [R, J], R >= 1.

    Returns:
        dict of score name to Metric.
    """
    import numpy as np

    images, candidates = np.asarray(images, np.float64), np.asarray(candidates, np.float64)
    clip = WEIGHT * np.maximum((images * candidates).sum(-1), 0)
    closest = np.array([(np.asarray(truth, np.float64) @ one).max() for truth, one in zip(references, candidates)])
    closest = np.maximum(closest, 0)
    total = clip + closest
    harmonic = np.divide(2 * clip * closest, total, out=np.zeros_like(total), where=total > 0)
    return {"CLIPScore": mean_metric(clip), "RefCLIPScore": mean_metric(harmonic)}
