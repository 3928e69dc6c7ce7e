"""Draw tokens from the nucleus of a distribution (arXiv:1904.09751). R rows, V vocabulary."""

import torch

FIRST = 256  # likeliest tokens among which the nucleus is looked for before all are sorted, which takes eight times as long on a CPU


def draw_from_nucleus(log_probs, top_p, uniform):
    """Draw one token per row from the smallest set of likeliest tokens whose probabilities reach top_p.

    Args:
        log_probs: float [R, V]; -inf for what is forbidden.
        top_p: float above 0 and at most 1, which takes all tokens.
        uniform: float [R] in [0, 1), the random numbers.

    Returns:
        int64 [R] token ids.
    """
    probs = log_probs.exp()
    if top_p == 1:
        return _draw(probs, uniform)
    likeliest, order = probs.topk(min(FIRST, probs.shape[1]), dim=-1)  # [R, FIRST]
    token = _draw_sorted(likeliest, order, top_p, uniform)
    wide = likeliest.sum(-1) < top_p  # [R], where the nucleus is larger
    if wide.any():
        token[wide] = _draw_sorted(*probs[wide].sort(dim=-1, descending=True), top_p, uniform[wide])
    return token


def _draw_sorted(probs, order, top_p, uniform):
    """Draw from the nucleus of probabilities [R, N], likeliest first, of the tokens `order`. The likeliest always belongs to it."""
    before = probs.cumsum(-1) - probs  # [R, N], sum over the likelier tokens
    probs = probs.masked_fill(before >= top_p, 0.0)
    probs[:, 0] = probs[:, 0].clamp_min(torch.finfo(probs.dtype).tiny)
    return order.gather(1, _draw(probs, uniform)[:, None]).squeeze(1)


def _draw(probs, uniform):
    """Draw one place per row from probabilities [R, N] up to a factor, by uniform [R] in [0, 1). Never one of probability 0."""
    cumulative = probs.cumsum(-1)
    target = uniform.to(probs.dtype)[:, None] * cumulative[:, -1:]
    place = (cumulative <= target).sum(-1)  # [R]
    last = probs.shape[1] - 1 - (probs > 0).flip(-1).int().argmax(-1)  # where rounding made the target the sum itself
    return torch.minimum(place, last)
