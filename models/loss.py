"""The caption loss in chunks: output layer and cross-entropy together, a few hundred predictions at a time.

T predictions, E width, V vocabulary. With V = 50,257 the logits of one batch of 40 captions take 100 MB, and so does their gradient. Here
neither holds more than CHUNK_ELEMENTS numbers at once. The gradient of a chunk is computed while its logits exist, so nothing is computed
twice.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.operators import OneDNNLinear, fast_matmul

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


def cross_entropy(logits, labels, reduction="sum"):
    """Compute the cross-entropy of logits [T, V] against labels [T], in nats, in float32 or better; reduction "sum" or "none" ([T])."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(logits, labels, reduction=reduction)


def caption_loss(output_layer, hidden, labels, reduction="sum"):
    """Compute the cross-entropy of output_layer(hidden) against labels, in nats.

    Only the sum is computed in chunks, and only for a bare nn.Linear. Any other layer (an adapter, say) is called whole. So is every layer
    under fp16, whose gradients have to be scaled before they are rounded.

    Args:
        output_layer: nn.Module from E to V.
        hidden: [T, E].
        labels: [T] int64.
        reduction: "sum" or "none".

    Returns:
        scalar, float32 or better; with reduction "none" [T].
    """
    device = hidden.device.type
    is_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if reduction != "sum" or type(output_layer) not in (nn.Linear, OneDNNLinear) or output_layer.bias is not None or is_half:
        return cross_entropy(output_layer(hidden), labels, reduction)
    return _ChunkedLoss.apply(hidden, output_layer.weight, labels)


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, in the same pass, its gradients, chunk by chunk over the predictions."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        with torch.autocast(device, enabled=False):
            table = weight.to(dtype)
            total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
            step = max(1, CHUNK_ELEMENTS // len(weight))
            for rows in (slice(start, start + step) for start in range(0, len(labels), step)):
                inputs, target = hidden[rows].to(dtype), labels[rows, None]
                logits = fast_matmul(inputs, table.T)  # [t, V]
                logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
                log_sum = logits.logsumexp(-1, keepdim=True)
                total += (log_sum - logits.gather(1, target)).sum()
                if not (wants_hidden or wants_weight):
                    continue
                grad_logits = logits.sub_(log_sum).exp_()  # softmax, in place
                grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
                grad_logits = grad_logits.to(dtype)
                if wants_hidden:
                    grad_hidden[rows] = fast_matmul(grad_logits, table)
                if wants_weight:
                    if grad_weight.dtype == dtype:
                        grad_weight.addmm_(grad_logits.T, inputs)
                    else:
                        grad_weight += grad_logits.T @ inputs
        ctx.gradients = grad_hidden, grad_weight
        return total

    @staticmethod
    def backward(ctx, grad):
        # In place: they are as large as the parameters, and needed once.
        gradients = [None if own is None else own.mul_(grad.to(own.dtype)) for own in ctx.gradients]
        ctx.gradients = None
        return *gradients, None
