"""The published optimiser and learning-rate schedule (arXiv:2111.09734 trains with both)."""


def learning_rate(step, peak, warmup_steps, total_steps):
    """The rate of optimiser step `step`, counted from 0: linear up from 0 over `warmup_steps`, then linear down to 0 at `total_steps`."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def build_optimizer(parameters, lr, fused=False):
    """AdamW as published: betas (0.9, 0.999), eps 1e-6, no weight decay (torch's own defaults differ)."""
    import torch

    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=fused)
