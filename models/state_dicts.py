"""From a captioner to a state dict, and from the tensors of a file into a captioner."""

import torch

from common import UserError
from models.published.recognise import PUBLISHED_ALPHA
from models.tuning import beneath_adapters, is_adapter, kept_names, merged_state, output_names, untie_output

BASE = "original_model."  # the published name of the captioner whose captions a prompted one quotes
PARTS = ("clip_project.", "gpt.")


def trained_state(model, full=False):
    """Collect the state dict that a checkpoint holds.

    Args:
        model: ClipCaptionModel.
        full: take everything, adapters merged in; else the mapper and what was trained of the language model.

    Returns:
        dict of name to tensor, on the model's device; a base captioner's names begin with original_model.
    """
    if full:
        state = merged_state(model)
    else:
        kept = kept_names(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name in kept}
    if model.base_captioner is not None:
        base = model.base_captioner.model
        of_base = trained_state(base, full=base.origin.held_language_model)
        state |= {f"{BASE}{name}": tensor for name, tensor in of_base.items()}
    return state


def fill_captioner(model, found, parts=PARTS, complete=False):
    """Load the tensors of a file into a captioner. What the captioner's tuning does not train may be absent.

    Args:
        model: ClipCaptionModel; its weights are changed in place. Published adapters are merged into them.
        found: Recognised.
        parts: beginnings of the names to fill.
        complete: require everything that the tuning trains. Otherwise the language model may be absent altogether.

    Returns:
        set of the model's names that were filled.

    Raises:
        UserError: lists every missing, unexpected and misshapen key.
    """
    others = tuple(set(PARTS) - set(parts))
    state = {name: tensor for name, tensor in found.state.items() if not name.startswith(others)}
    if model.config.tune != "lora" and any(is_adapter(name) for name in state):
        raise UserError(
            f"{found.path} holds adapters. Train with --tune lora, or start from a file written with --save_full, which merges them."
        )
    _untie_trained_output(model.gpt, state)
    names = beneath_adapters(model, {name: name for name in state})  # the model's name -> the project's
    state = beneath_adapters(model, state)
    changes = _adapter_changes(model.gpt, found) if "gpt." in parts else {}
    changes = beneath_adapters(model, changes)
    expected = {name for name in _expected_names(model, state, complete) if name.startswith(parts)}
    own = model.state_dict()

    def in_file(name):
        return found.name_in_file(names.get(name, name.replace(".base_layer.", ".")))

    faults = [f"missing {in_file(name)}" for name in sorted(expected - set(state))]
    faults += [f"unexpected {in_file(name)}" for name in sorted(set(state) - set(own))]
    faults += [
        f"{in_file(name)} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    faults += _change_faults(changes, own, found)
    if faults:
        raise UserError(f"{found.path} does not fit the model: {'; '.join(faults)}. Take the checkpoint's own config and options.")
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, change in changes.items():
            own[name] += change
    return set(state) | set(changes)


def _untie_trained_output(gpt, state):
    """Give the output layer its own weight where the file has one that differs from the token table; tied, the table would replace it."""
    table, head = (state.get(f"gpt.{name}") for name in output_names(gpt))
    if head is not None and table is not None and head.shape == table.shape and not torch.equal(head, table):
        untie_output(gpt, head)


def _expected_names(model, state, complete):
    """The model's names that a file with the tensors `state` must hold: what is trained, or everything."""
    kept = kept_names(model)
    of_gpt = {name for name in state if name.startswith("gpt.")}
    if model.config.tune != "full" and of_gpt <= kept:
        expected, holds_gpt = kept, bool(of_gpt) or complete
    else:
        expected = {name for name in model.state_dict() if not is_adapter(name) or name in state}
        holds_gpt = bool(of_gpt)
    expected = {name for name in expected if holds_gpt or not name.startswith("gpt.")}
    head_name = f"gpt.{output_names(model.gpt)[1]}"
    tied = model.gpt.config.tie_word_embeddings and head_name not in state
    return expected - {head_name} if tied else expected


def _adapter_changes(gpt, found):
    """What a file's LoRA adapters add to the weights: alpha / rank · B A (arXiv:2106.09685); dict of name to float32 [out, in].

    A published file does not hold alpha, which is 16 as published. GPT-2's matrices are stored as [in, out].
    """
    from transformers.pytorch_utils import Conv1D

    alpha = (found.config.lora or {}).get("alpha") or PUBLISHED_ALPHA
    transposed = {name for name, module in gpt.named_modules() if isinstance(module, Conv1D)}
    changes = {}
    for name, (a, b) in found.adapters.items():
        change = (b.float() @ a.float()) * (alpha / len(a))  # [out, in]
        changes[f"gpt.{name}.weight"] = change.T if name in transposed else change
    return changes


def _change_faults(changes, own, found):
    """Adapters whose change does not fit the weight beneath, as messages."""
    faults = []
    for name, change in changes.items():
        weight = own.get(name)
        if weight is None or change.shape != weight.shape:
            module = name.removesuffix(".weight").removesuffix(".base_layer")
            keys = " and ".join(found.name_in_file(f"{module}.lora_{side}") for side in "AB")
            faults.append(f"{keys} change {tuple(change.shape)} of {tuple(weight.shape) if weight is not None else 'nothing'}")
    return faults
