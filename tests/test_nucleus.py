"""Draws from the nucleus of a distribution, against a slow reference: sort, cut, and go along the sum."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import nucleus


def draw_slowly(log_probs, top_p, uniform):
    """The token that is drawn from one row, in plain Python, and how near the draw is to another one."""
    order = range(len(log_probs)) if top_p == 1 else sorted(range(len(log_probs)), key=lambda token: -log_probs[token])
    probs = [torch.tensor(log_probs[token]).exp().item() for token in order]
    kept = 1
    while sum(probs[:kept]) < top_p and kept < len(probs):
        kept += 1
    sums = [sum(probs[: place + 1]) for place in range(kept)]
    target = uniform * sums[-1]
    place = next(place for place, reached in enumerate(sums) if reached > target)
    margins = [abs(reached - target) for reached in sums[:-1]] + [abs(sum(probs[:place]) - top_p) for place in range(1, kept + 1)]
    return order[place], min(margins, default=1.0)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.sampled_from([1, 2, 40, nucleus.FIRST, nucleus.FIRST + 1, 900]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.95, 0.999, 1.0]),
    forbidden=st.sampled_from([0.0, 0.5]),
)
@example(seed=0, tokens=900, spread=0.1, top_p=0.95, forbidden=0.0)  # a nucleus of more than FIRST tokens
def test_draws_are_those_of_a_slow_reference(seed, tokens, spread, top_p, forbidden):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, tokens, generator=generator, dtype=torch.float64) * spread
    logits += torch.rand(4, tokens, generator=generator, dtype=torch.float64) * 1e-3  # no two alike
    out = torch.rand(4, tokens, generator=generator) < forbidden
    out[:, seed % tokens] = False
    log_probs = logits.masked_fill(out, -torch.inf).log_softmax(-1)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    found = nucleus.draw_from_nucleus(log_probs, top_p, uniform)
    assert not out.gather(1, found[:, None]).any()
    for row, of_row in enumerate(found.tolist()):
        expected, margin = draw_slowly(log_probs[row].tolist(), top_p, uniform[row].item())
        assert of_row == expected or margin < 1e-9


def test_the_largest_and_the_smallest_random_number_draw_a_token_that_may_be_drawn():
    probs = torch.tensor([0.0, 0.3, 0.2, 0.5, 0.0])
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for top_p, first, last in ((1.0, 1, 3), (0.999, 3, 2), (0.6, 3, 1), (0.1, 3, 3)):
        drawn = nucleus.draw_from_nucleus(probs.log().expand(2, -1), top_p, torch.stack([torch.tensor(0.0), largest]))
        assert drawn.tolist() == [first, last]
