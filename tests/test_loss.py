"""The caption loss in chunks equals cross-entropy over the whole logits, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models import loss

pytestmark = pytest.mark.usefixtures("one_thread")


def whole(layer, hidden, labels):
    return F.cross_entropy(layer(hidden).float() if hidden.dtype == torch.float32 else layer(hidden), labels, reduction="sum")


def value_and_gradients(function, layer, hidden, labels):
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    value = function(layer, hidden, labels)
    (value / max(1, len(labels))).backward()
    return [value.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(2, 30), st.integers(1, 9), st.integers(1, 300), st.booleans(), st.integers(0, 999))
def test_chunked_loss_and_gradients_equal_those_of_the_whole(predictions, vocabulary, width, chunk, trains_table, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, vocabulary, bias=False).double().requires_grad_(trains_table)
    hidden = torch.randn(predictions, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (predictions,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        ours = value_and_gradients(loss.caption_loss, layer, hidden, labels)
    for one, other in zip(ours, value_and_gradients(whole, layer, hidden, labels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_in_bf16_the_loss_is_that_of_the_whole_within_its_rounding(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 700)
    layer, hidden, labels = nn.Linear(32, 100, bias=False), torch.randn(50, 32), torch.randint(100, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(loss.caption_loss, layer, hidden, labels)
        theirs = value_and_gradients(whole, layer, hidden, labels)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()
    assert abs(ours[0] - theirs[0]) <= 1e-3 * theirs[0]


def test_the_logits_are_never_whole(monkeypatch):
    largest = []
    gather = torch.Tensor.gather
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(torch.Tensor, "gather", lambda self, *words: largest.append(self.numel()) or gather(self, *words))
    loss.caption_loss(nn.Linear(8, 100, bias=False), torch.randn(95, 8), torch.zeros(95, dtype=torch.long)).backward()
    assert len(largest) == 10
    assert max(largest) <= 1000


def test_an_output_layer_with_a_bias_counts_its_bias():
    layer, hidden, labels = nn.Linear(4, 7), torch.randn(5, 4), torch.arange(5)
    ours = value_and_gradients(loss.caption_loss, layer, hidden, labels)
    for one, other in zip(ours, value_and_gradients(whole, layer, hidden, labels), strict=True):
        torch.testing.assert_close(one, other)
