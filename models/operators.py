"""Faster operators in place of those that torch and transformers choose; results change by rounding only.

GELU in one pass           GPT-2's GELU is written as eight operations in transformers; training keeps five large results per layer.
Linear layers by oneDNN    torch multiplies float32 matrices through MKL, which uses AVX-512 on Intel's processors only. On AMD's, oneDNN
                           is twice as fast (benchmarks/README.md).
"""

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.pytorch_utils import Conv1D

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_FREED = 2**29  # bytes
SMALLEST = 2**21  # multiplications; below this MKL finishes in the 15 microseconds that oneDNN needs to start


def accelerate_model(model):
    """Switch a model to faster operators in place, and keep freed memory where it runs on a CPU.

    Only scripts call this, after they have placed the model. GPT-2's GELU is replaced by transformers' own fused one, and every layer that
    has a faster twin gets the twin's class. Parameters, their names and the state dict stay as they are.

    Args:
        model: nn.Module, on its device.

    Returns:
        The same model.
    """
    twins = {nn.Linear: OneDNNLinear, nn.MultiheadAttention: OneDNNAttention, Conv1D: OneDNNConv1D} if onednn_is_faster() else {}
    for layer in list(model.modules()):
        layer.__class__ = twins.get(type(layer), type(layer))
        for name, child in layer.named_children():
            if type(child) is NewGELUActivation:
                setattr(layer, name, ACT2FN["gelu_pytorch_tanh"])
    first = next(model.parameters(), None)
    if first is not None and first.device.type == "cpu":
        keep_freed_memory()
    return model


def keep_freed_memory():
    """Let the C library keep up to 512 MiB that large tensors free, for the tensors that come next.

    By default glibc returns blocks of more than a few megabytes to the system, which zeroes them page by page when they are needed again.
    That takes a fifth of a training step on a CPU. Does nothing under another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**28)
    mallopt(M_TRIM_THRESHOLD, KEPT_FREED)


@functools.cache
def onednn_is_faster():
    """Tell whether this is an AMD processor with AVX-512, under a torch with both libraries.

    This goes by the processor's name and is not timed, because two equal runs, or a run and its continuation, must round alike.
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor():
    """The system's description of its processor; on Linux and Windows it names the maker."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()


def fast_matmul(a, b):
    """Multiply matrices a [M, K] and b [K, N], through oneDNN where that is faster. Gradients do not flow through it."""
    return _multiply(a, b.T) if onednn_is_faster() and _pays(a, b.shape[1]) else a @ b


def _pays(x, outputs):
    """Whether oneDNN is faster for a product of x with `outputs` columns."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * outputs >= SMALLEST


def _multiply(x, weight, bias=None):
    """Multiply x [..., in] by weight [out, in] of any strides, to [..., out]; torch.compile uses this operator for linear layers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in], or [in, out] where `transposed`, plus bias [out], to [..., out]."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed):
        ctx.transposed = transposed
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight.T if transposed else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        inputs, outputs = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [rows, in], [rows, out]
        grad_x = _multiply(grad, weight if ctx.transposed else weight.T) if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = _multiply(inputs.T, outputs.T) if ctx.transposed else _multiply(outputs.T, inputs.T)
        return grad_x, grad_weight, outputs.sum(0) if wants_bias else None, None


def _takes(x, weight, outputs):
    """Whether x times this weight goes through oneDNN."""
    is_left_to_torch = weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return not is_left_to_torch and _pays(x, outputs)


def _linear(x, weight, bias, transposed=False):
    """Apply _Linear, recorded for gradients only where they are needed."""
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, transposed)
    return _multiply(x, weight.T if transposed else weight, bias)


class OneDNNLinear(nn.Linear):
    """nn.Linear through oneDNN."""

    def forward(self, input):
        return _linear(input, self.weight, self.bias) if _takes(input, self.weight, self.out_features) else super().forward(input)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is [in, out], through oneDNN."""

    def forward(self, x):
        return _linear(x, self.weight, self.bias, transposed=True) if _takes(x, self.weight, self.nf) else super().forward(x)


class OneDNNAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose self-attention at inference, as in CLIP, runs through oneDNN."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **others):
        one_sequence = query is key and key is value and query.dim() == 3 and key_padding_mask is None
        ordinary = self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn and not self.training
        additive = attn_mask is None or attn_mask.dim() == 2 and attn_mask.dtype == torch.float32
        if need_weights or not (one_sequence and ordinary and additive and _takes(query, self.out_proj.weight, self.embed_dim)):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **others)
        x = query if self.batch_first else query.transpose(0, 1)  # [B, L, E]
        batch, length, width = x.shape
        mixed = _linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, length, 3, self.num_heads, -1)
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4)  # each [B, heads, L, E / heads]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask)  # [B, heads, L, E / heads]
        out = _linear(mixed.transpose(1, 2).reshape(batch, length, width), self.out_proj.weight, self.out_proj.bias)
        return out if self.batch_first else out.transpose(0, 1), None
