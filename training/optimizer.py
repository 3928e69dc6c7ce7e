"""The optimizer, its schedule and one optimizer step, as published (arXiv:2111.09734; UPSTREAM 0)."""

import contextlib
import dataclasses
import math

from training.device import compile_language_model

BETAS, EPS = (0.9, 0.999), 1e-6  # as published


@dataclasses.dataclass
class StepResult:
    """What one optimizer step gives the log."""

    loss_sum: object  # scalar tensor on the device: sum of the step's losses over all processes, in nats
    tokens: int  # tokens that the step predicts, over all processes
    lr: float  # learning rate of the language model
    stopping: bool  # whether some process was asked to stop


def learning_rate(step, peak, warmup_steps, total_steps):
    """Return the rate of a step: linear from 0 to `peak` over the warm-up, then linear to 0 at `total_steps`.

    Args:
        step: optimizer step, counted from 0.
        peak: the highest rate.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def published_eps(step):
    """Return torch's eps with which AdamW takes the published step.

    The published code used transformers' former AdamW, which adds EPS to the root of the squared average before its bias is corrected.
    In torch's form that is EPS / sqrt(1 - beta2^t).

    Args:
        step: optimizer step, counted from 0.
    """
    return EPS / math.sqrt(1 - BETAS[1] ** (step + 1))


def parameter_groups(trained, lr, mapper_lr=None, weight_decay=0.0):
    """Sort trained parameters into groups for the optimizer: the mapper apart where it has its own rate, decayed or not.

    Args:
        trained: dict of name to parameter.
        lr: peak rate.
        mapper_lr: peak rate of the mapper; None means `lr`.
        weight_decay: applies to matrices only, never to biases and norms.

    Returns:
        List of dicts with "params", "lr", "peak" (the rate that the schedule reaches) and "weight_decay".
    """
    groups = {}
    for name, parameter in trained.items():
        peak = lr if mapper_lr is None or not name.startswith("clip_project.") else mapper_lr
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": group, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), group in groups.items()]


def build_optimizer(parameters, lr, fused=False):
    """Build AdamW as published: betas (0.9, 0.999), eps 1e-6, no weight decay."""
    import torch

    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=fused)


def prepare_training(model, options, accelerator):
    """Make a captioner ready to train: gradient checkpointing, compilation, an optimizer over its trained parameters, dropout's seed.

    Args:
        model: ClipCaptionModel, whose language model is changed.
        options: options of train.py.
        accelerator: accelerate.Accelerator.

    Returns:
        Model and optimizer as accelerator.prepare gives them.
    """
    import torch

    from models.tuning import checkpoint_blocks

    device_type = accelerator.device.type
    if options.gradient_checkpointing:
        checkpoint_blocks(model.gpt)
    if options.compile:
        compile_language_model(model, device_type)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(trained, options.lr, options.mapper_lr, options.weight_decay)
    optimizer = build_optimizer(groups, options.lr, fused=device_type in ("cpu", "cuda"))
    prepared = accelerator.prepare(model, optimizer)
    torch.manual_seed(options.seed + 1 + accelerator.process_index)
    return prepared


def train_step(model, batch, optimizer, step, plan, options, accelerator, stop_asked=False):
    """Take one optimizer step.

    Args:
        model: ClipCaptionModel as accelerator.prepare gave it.
        batch: training.batches.StepBatch, this process's share of the step.
        optimizer: as accelerator.prepare gave it.
        step: optimizer steps done before this one.
        plan: training.batches.Plan.
        stop_asked: whether this process was asked to stop.

    Returns:
        StepResult, the same on every process. The loss is averaged over all tokens of the step, whatever the number of processes.
    """
    import torch

    processes = accelerator.num_processes
    tokens, stopping = batch.predicted, stop_asked
    if processes > 1:
        tokens, stopping = accelerator.reduce(torch.tensor([tokens, stopping], device=accelerator.device), "sum").tolist()
    loss_sum = 0.0
    for number, part in enumerate(batch.parts, start=1):
        with contextlib.nullcontext() if number == len(batch.parts) else accelerator.no_sync(model):
            part_sum = model(part.to(accelerator.device)) * batch.has_share
            # Gradients are averaged over processes: times their number, it is the mean over all tokens of the step.
            accelerator.backward(part_sum / max(tokens, 1) * processes)
        loss_sum = loss_sum + part_sum.detach()
    if options.clip_grad:
        accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["peak"], plan.warmup_steps, plan.total_steps)
        group["eps"] = published_eps(step) if options.published else EPS
    optimizer.step()
    optimizer.zero_grad()
    if processes > 1:
        loss_sum = accelerator.reduce(loss_sum, "sum")
    return StepResult(loss_sum, tokens, learning_rate(step, options.lr, plan.warmup_steps, plan.total_steps), bool(stopping))
