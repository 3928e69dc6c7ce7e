"""The published optimiser and learning-rate schedule (arXiv:2111.09734 trains with both)."""


def learning_rate(step, peak, warmup_steps, total_steps):
    """The rate of optimiser step `step`, counted from 0: linear up from 0 over `warmup_steps`, then linear down to 0 at `total_steps`."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def settle_warmup(steps, ratio, total_steps):
    """Steps of warm-up: `ratio` of the run where one is given, else `steps`."""
    return steps if ratio is None else round(ratio * total_steps)


def parameter_groups(trained, lr, mapper_lr=None, weight_decay=0.0):
    """Sort trained parameters into groups for the optimiser: the mapper apart where it has a rate of its own, decayed or not.

    trained: dict of name → parameter. mapper_lr: peak rate of the mapper (None: lr). weight_decay falls on matrices only, never on
    biases and norms. → list of dicts with "params", "peak" (the rate that the schedule reaches) and "weight_decay".
    """
    groups = {}
    for name, parameter in trained.items():
        peak = lr if mapper_lr is None or not name.startswith("clip_project.") else mapper_lr
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": group, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), group in groups.items()]


def build_optimizer(parameters, lr, fused=False):
    """AdamW as published: betas (0.9, 0.999), eps 1e-6, no weight decay (torch's own defaults differ)."""
    import torch

    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=fused)
