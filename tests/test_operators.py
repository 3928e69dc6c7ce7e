"""Faster operators give the numbers and gradients of torch's and transformers' own, and stand in only where they are told to pay."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

import tiny
import tiny_towers
from features.packing import Tokens, pack_captions
from models import operators
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")


@pytest.fixture
def everything(onednn, monkeypatch):
    """As on a processor where oneDNN is faster, and for products of every size."""
    monkeypatch.setattr(operators, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(operators, "SMALLEST", 1)
    calls = []
    multiply = operators._multiply
    monkeypatch.setattr(operators, "_multiply", lambda *given: calls.append(1) or multiply(*given))
    return calls


def both_ways(layer, x):
    """A layer and its copy through oneDNN on the same input → two dicts of the output and all gradients."""
    found = []
    for module in (layer, operators.accelerate_model(copy.deepcopy(layer))):
        own = x.clone().requires_grad_()
        out = module(own)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        found.append({"out": out.detach(), "x": own.grad} | {name: each.grad for name, each in module.named_parameters()})
    return found


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), outputs=st.integers(1, 40), has_bias=st.booleans())
def test_layer_gives_the_same_numbers_and_gradients(onednn, kind, shape, outputs, has_bias):
    torch.manual_seed(sum(shape) + outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "onednn_is_faster", lambda: True)
        patch.setattr(operators, "SMALLEST", 1)
        layer = nn.Linear(shape[-1], outputs, bias=has_bias) if kind is nn.Linear else Conv1D(outputs, shape[-1])
        theirs, ours = both_ways(layer, torch.randn(shape))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert ours[name].shape == theirs[name].shape
        # Two libraries add a row's products in different orders: they differ in proportion to the largest sum.
        assert torch.allclose(ours[name], theirs[name], atol=1e-5 * max(1.0, theirs[name].abs().max().item())), name


def test_gelu_is_one_operation_with_the_numbers_of_gpt2():
    gpt = operators.accelerate_model(tiny.random_gpt2(20))
    gelu = gpt.transformer.h[1].mlp.act
    x = torch.randn(1000)
    assert torch.equal(gelu(x), nn.functional.gelu(x, approximate="tanh"))
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = gelu(x), NewGELUActivation()(y)
    (ours.sum() + theirs.sum()).backward()
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)
    assert torch.allclose(x.grad, y.grad, atol=1e-12, rtol=0)


def test_captioner_gives_the_same_loss_and_gradients(everything):
    def loss_and_gradients():
        gpt = tiny.random_gpt2(50, dropout=0.0)
        torch.manual_seed(0)
        model = ClipCaptionModel(CaptionConfig(None, 8, 4, clip_length=4, mapping_type="transformer", num_layers=2), gpt)
        operators.accelerate_model(model)
        tokens = Tokens(np.arange(40, dtype=np.int32), np.array([0, 7, 12, 25, 40]))
        batch = pack_captions([0, 1, 2, 3], tokens, np.array([0, 0, 1, 1]), 4)
        batch.clip_embedding = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
        loss = model(batch)
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}

    ours = loss_and_gradients()
    assert len(everything) > 40, "layers of GPT-2 and of the mapper, and the chunked loss, in both directions"
    everything.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "onednn_is_faster", lambda: False)
        theirs = loss_and_gradients()
    assert not everything
    assert abs(ours[0] - theirs[0]) < 1e-4
    for name, gradient in theirs[1].items():
        assert torch.allclose(ours[1][name], gradient, atol=1e-4), name


def test_clip_attention_gives_the_same_embeddings(everything, tmp_path):
    pictures = torch.randn(3, 3, 64, 64)
    path = tiny.save_clip(tmp_path / "clip.pt", 32, "vit")
    ours = load_encoder(path)
    operators.accelerate_model(ours.module)
    assert any(isinstance(layer, operators.OneDNNAttention) for layer in ours.module.modules())
    found = ours.encode(pictures)
    assert everything
    everything.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "onednn_is_faster", lambda: False)
        theirs = load_encoder(path)
        assert theirs.digest() == ours.digest()
        assert torch.allclose(found, theirs.encode(pictures), atol=1e-5)
    assert not everything


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_attention_gives_the_same_under_every_mask(everything, batch_first, kind):
    later = torch.ones(5, 5).triu(1).bool()
    mask = {"none": None, "float": torch.zeros(5, 5).masked_fill(later, -torch.inf), "bool": later}[kind]
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    ours = operators.accelerate_model(copy.deepcopy(layer))
    x = torch.randn((3, 5, 8) if batch_first else (5, 3, 8))
    for wants_weights in (False, True):
        theirs = layer(x, x, x, need_weights=wants_weights, attn_mask=mask)
        found = ours(x, x, x, need_weights=wants_weights, attn_mask=mask)
        assert torch.allclose(found[0], theirs[0], atol=1e-6)
        assert (found[1] is None) == (theirs[1] is None)
    assert bool(everything) == (kind != "bool")
    y = torch.randn_like(x)
    assert torch.allclose(ours(x, y, y)[0], layer(x, y, y)[0], atol=1e-6)


def test_other_precisions_and_small_products_stay_with_torch(everything, monkeypatch):
    layer = operators.accelerate_model(nn.Linear(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 16)).dtype == torch.bfloat16
    copy.deepcopy(layer).double()(torch.randn(4, 16).double())
    copy.deepcopy(layer).bfloat16()(torch.randn(4, 16).bfloat16())
    assert not everything
    layer(torch.randn(4, 16))
    assert len(everything) == 1
    monkeypatch.setattr(operators, "SMALLEST", 4 * 16 * 16 + 1)
    layer(torch.randn(4, 16))
    assert len(everything) == 1


@pytest.mark.parametrize("processor, capability, faster", [
    ("vendor_id : AuthenticAMD", "AVX512", True),
    ("vendor_id : AuthenticAMD", "AVX2", False),
    ("vendor_id : GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_the_library_goes_by_the_processor(monkeypatch, processor, capability, faster):
    monkeypatch.setattr(operators, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert operators.onednn_is_faster.__wrapped__() == (faster and torch.backends.mkl.is_available())


@pytest.mark.parametrize("family", ["openai", "clip", "siglip", "siglip2", "dinov2", "timm"])
def test_rounding_weights_once_changes_nothing(family, workdir):
    if family == "openai":
        name = tiny.save_clip("clip.pt", 32, "vit")
    elif family == "timm":
        name = f"timm:{tiny_towers.TIMM_VIT}"
        tiny_towers.save_timm(f"data/weights/{tiny_towers.TIMM_VIT}")
    else:
        getattr(tiny_towers, f"save_hf_{family}")("tower")
        name = "hf:./tower"
    plain, rounded = load_encoder(name), load_encoder(name, mixed_precision="bf16")
    pictures = torch.stack([plain.preprocess(Image.effect_noise((70, 60), 90).convert("RGB")) for _ in range(3)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.module(pictures).float()
    assert torch.equal(rounded.encode(pictures), expected)
    assert not torch.equal(plain.encode(pictures), expected)
    assert rounded.digest() == plain.digest()
    assert {each.dtype for each in rounded.module.parameters()} == {torch.float32, torch.bfloat16}
