"""How sure a score is: bootstrap intervals over images, and a paired test of two systems.

N images, S sums that a metric needs of each image, R draws. A metric is a function of sums over images, so a draw of images costs one
matrix product for any metric. CIDEr's document frequencies stay those of the whole set.
"""

import dataclasses

CHUNK = 64  # draws computed together, which bounds the memory


@dataclasses.dataclass
class Metric:
    """One score and what it is made of."""

    value: float
    per_image: object  # float64 [N], the score of each image alone
    sums: object  # float64 [N, S]
    combine: object  # float64 [..., S], sums over images -> [...], the score


def mean_metric(per_image, value=None):
    """Make a metric that is the mean of its images' scores.

    Args:
        per_image: [N] float.
        value: the mean, where the library has computed it.

    Returns:
        Metric.
    """
    import numpy as np

    per_image = np.asarray(per_image, np.float64)
    sums = np.stack([per_image, np.ones_like(per_image)], axis=-1)
    return Metric(float(per_image.mean() if value is None else value), per_image, sums, lambda sums: sums[..., 0] / sums[..., 1])


def _draw_images(count, draws, rng):
    """Draw `count` images with replacement, `draws` times. Returns how often each is drawn, float64 [draws, count]."""
    import numpy as np

    return np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws)]).astype(np.float64)


def _chunks(draws):
    return [min(CHUNK, draws - start) for start in range(0, draws, CHUNK)]


def bootstrap(metrics, draws=1000, seed=0):
    """Compute 95 % percentile intervals over images drawn with replacement (Efron 1979).

    Args:
        metrics: dict of name to Metric, all of the same images.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        dict of name to (low, high).
    """
    import numpy as np

    rng, drawn = np.random.default_rng(seed), {name: [] for name in metrics}
    count = len(next(iter(metrics.values())).sums)
    for size in _chunks(draws):
        weights = _draw_images(count, size, rng)
        for name, metric in metrics.items():
            drawn[name].append(metric.combine(weights @ metric.sums))
    return {name: tuple(np.percentile(np.concatenate(values), [2.5, 97.5]).tolist()) for name, values in drawn.items()}


def compare(first, second, draws=1000, seed=0):
    """Compare two systems on the same images.

    The interval is a paired bootstrap: both systems get the same drawn images. The two-sided p-value is by approximate randomization
    (Noreen 1989; arXiv:cs/0008005 uses it for text): each image's two captions are swapped by the toss of a coin. p is the share of tosses,
    the observed one included, whose difference is at least as large.

    Args:
        first: dict of name to Metric.
        second: the same for the other system, images in the same order.
        draws: number of draws, and of tosses.
        seed: seed of both.

    Returns:
        dict of name to {"difference", "interval", "p_value"}; the difference is second - first. Scores that are not numbers are left out.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    names = [name for name in first if name in second and np.isfinite(first[name].value + second[name].value)]
    if not names:
        return {}
    count = len(first[names[0]].sums)
    seen = {name: float(second[name].value - first[name].value) for name in names}
    drawn, as_large = {name: [] for name in names}, dict.fromkeys(names, 0)
    for size in _chunks(draws):
        weights = _draw_images(count, size, rng)
        tosses = rng.integers(0, 2, (size, count)).astype(np.float64)
        for name in names:
            one, other = first[name], second[name]
            drawn[name].append(other.combine(weights @ other.sums) - one.combine(weights @ one.sums))
            moved = tosses @ (other.sums - one.sums)
            tossed = other.combine(other.sums.sum(0) - moved) - one.combine(one.sums.sum(0) + moved)
            as_large[name] += int((np.abs(tossed) >= abs(seen[name]) - 1e-12).sum())
    return {
        name: {
            "difference": seen[name],
            "interval": tuple(np.percentile(np.concatenate(drawn[name]), [2.5, 97.5]).tolist()),
            "p_value": (as_large[name] + 1) / (draws + 1),
        }
        for name in names
    }
