"""Checkpoints: bare state dicts under the published names, with a readable config beside them.

`{prefix}-{epoch:03d}.pt`, `{prefix}_latest.pt`, `{prefix}_best.pt` hold weights, `{prefix}.json` everything that rebuilds the model and
says how it was made. A frozen language model is left out unless asked for. A published file has no config:
models/published/recognise.py tells what it is.

  python -m models.checkpoints describe FILE        what a file is
  python -m models.checkpoints export FILE DIR      config.json and model.safetensors, for ClipCaptionModel.from_pretrained(DIR)
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

from common import UserError, replace_file
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig
from models.encoders.clipxgpt import check_vision
from models.published.downloads import find_published
from models.published.recognise import PUBLISHED_ALPHA, plain_state, recognise
from models.tensors import read_tensors, save_tensors
from models.tuning import beneath_adapters, is_adapter, kept_names, merged_state, output_names, untie_output
from models.weights import find_weights, load_language_model, load_tokenizer

BASE = "original_model."  # the published name of the model whose captions a prompted one reads
RUN_SUFFIX = re.compile(r"(-\d{3,}|_latest|_best)$")


def config_path(checkpoint):
    """Where the config of a checkpoint file stands: coco_prefix-009.pt → coco_prefix.json."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(RUN_SUFFIX.sub("", checkpoint.stem) + ".json")


def trained_state(model, full=False):
    """The state dict a checkpoint holds: mapper and what else was trained, or all of it with `full` (adapters merged in)."""
    if full:
        state = merged_state(model)
    else:
        kept = kept_names(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name in kept}
    if model.base_model is not None:
        of_base = trained_state(model.base_model, full=model.base_model.read_whole)
        state |= {f"{BASE}{name}": tensor for name, tensor in of_base.items()}
    return state


def save_checkpoint(model, path, full=False):
    """Write a model's weights as a bare state dict. full: with the language model, even where it is frozen."""
    save_tensors({name: tensor.detach().cpu() for name, tensor in trained_state(model, full).items()}, path)


def remove_old_checkpoints(out_dir, run_name, keep_last):
    """Remove numbered checkpoints of a run but the latest `keep_last`; None keeps all."""
    if keep_last is None:
        return
    numbered = re.compile(re.escape(run_name) + r"-\d{3,}\.pt")
    found = [path for path in Path(out_dir).iterdir() if numbered.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))[:-keep_last]:
        path.unlink()


def save_config(config, made_by, path):
    """Write `{prefix}.json`: "model" rebuilds the captioner; "made_by" says how it came to be (arguments, versions, seed, data)."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps({"model": dataclasses.asdict(config), "made_by": made_by}, indent=2) + "\n", encoding="utf-8")


def read_config(path):
    """Read the "model" part of a `{prefix}.json` → CaptionConfig, or a dict of hints where the embeddings' width is left out.

    Raises UserError when it is neither.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
        return CaptionConfig(**fields) if "clip_width" in fields else dict(fields)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a config this version reads ({reason}). Take the one train.py wrote.") from error


def read_state_dict(path):
    """Read a checkpoint's state dict, without the buffers of old transformers. Raises UserError when it is something else."""
    return plain_state(read_tensors(path), path)


def open_checkpoint(path, gpt2_type=None):
    """Read a checkpoint file and tell what it is → Recognised, on the CPU; no model is built.

    path: a .pt file, a name under data/weights/, or the name of published weights. gpt2_type: a language model that knows its number of
    heads, asked where the file's width does not settle it. Raises UserError when the file cannot be read or is not recognised.
    """
    found = find_weights(str(path), f"{path}.pt")
    path = found if found is not None and found.is_file() else find_published(str(path)) or Path(path)
    content = read_tensors(path)
    beside = config_path(path)
    config = read_config(beside) if beside.is_file() else {}
    return recognise(content, path, config, gpt2_type)


def load_state(model, found, parts=("clip_project.", "gpt."), complete=False):
    """Load what was recognised into a captioner; what its tuning does not train may be absent → names of the model's tensors it filled.

    found: Recognised; parts: what of the model to fill. complete: what its tuning trains must be there; else the language model may be
    absent altogether, as from a mapper to start with. Published adapters are merged.
    Raises UserError listing every missing, unexpected and misshapen key.
    """
    left_out = tuple({"clip_project.", "gpt."} - set(parts))
    state = {name: tensor for name, tensor in found.state.items() if not name.startswith(left_out)}
    if model.config.tune != "lora" and any(is_adapter(name) for name in state):
        raise UserError(
            f"{found.path} holds adapters. Train with --tune lora, or start from a file written with --save_full, which merges them."
        )
    table_name, head_name = (f"gpt.{name}" for name in output_names(model.gpt))
    head, table = state.get(head_name), state.get(table_name)
    if head is not None and table is not None and head.shape == table.shape and not torch.equal(head, table):
        # An output layer trained apart from the token table would be overwritten by it while the two are tied.
        untie_output(model.gpt, head)
    names = beneath_adapters(model, {name: name for name in state})  # the model's name → the project's
    state = beneath_adapters(model, state)
    own, kept = model.state_dict(), kept_names(model)
    of_gpt = {name for name in state if name.startswith("gpt.")}
    if of_gpt <= kept and model.config.tune != "full":
        expected = {name for name in kept if of_gpt or complete or not name.startswith("gpt.")}
    else:
        expected = {name for name in own if of_gpt or not name.startswith("gpt.")}
        expected = {name for name in expected if not is_adapter(name) or name in state}
    expected = {name for name in expected if name.startswith(parts)}
    if head_name not in state and model.gpt.config.tie_word_embeddings:
        expected.discard(head_name)

    def in_file(name):
        return found.name_in_file(names.get(name, name.replace(".base_layer.", ".")))

    faults = [f"missing {in_file(name)}" for name in sorted(expected - set(state))]
    faults += [f"unexpected {in_file(name)}" for name in sorted(set(state) - set(own))]
    faults += [
        f"{in_file(name)} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(expected & set(state))
        if state[name].shape != own[name].shape
    ]
    changes = adapter_changes(model.gpt, found) if "gpt." in parts else {}
    changes = beneath_adapters(model, {f"gpt.{name}.weight": change for name, change in changes.items()})
    for name, change in changes.items():
        weight = own.get(name)
        if weight is None or change.shape != weight.shape:
            module = name.removesuffix(".weight").removesuffix(".base_layer")
            keys = " and ".join(found.name_in_file(f"{module}.lora_{side}") for side in "AB")
            faults.append(f"{keys} change {tuple(change.shape)} of {tuple(weight.shape) if weight is not None else 'nothing'}")
    if faults:
        raise UserError(f"{found.path} does not fit the model: {'; '.join(faults)}. Take the checkpoint's own config and options.")
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, change in changes.items():
            own[name] += change
    return set(state) | set(changes)


def adapter_changes(gpt, found):
    """What LoRA's adapters add to the weights: alpha / rank · B A (arXiv:2106.09685) → dict of module name → float32 tensor.

    A published file does not hold alpha: 16, as published.
    """
    from transformers.pytorch_utils import Conv1D

    alpha = (getattr(found.config, "lora", None) or {}).get("alpha") or PUBLISHED_ALPHA
    turned = {name for name, module in gpt.named_modules() if isinstance(module, Conv1D)}  # GPT-2 keeps [in, out]
    changes = {name: (b.float() @ a.float()) * (alpha / len(a)) for name, (a, b) in found.adapters.items()}  # [out, in]
    return {name: change.T if name in turned else change for name, change in changes.items()}


def load_checkpoint(path, gpt2_type=None, device="cpu"):
    """Build a captioner from a checkpoint file, ours or a published one → ClipCaptionModel in eval mode, with .config and .tokenizer.

    path: a .pt file, a name under data/weights/, or the name of published weights (models.published.downloads). gpt2_type: overrides where
    the language model's weights or tokenizer come from. Prompted checkpoints come with their .base_model; published LoRA's are merged.
    Raises UserError when the file cannot be read, is not recognised, or does not fit.
    """
    return build_captioner(open_checkpoint(path, gpt2_type), gpt2_type).to(device).eval()


def build_captioner(found, gpt2_type=None, tokenizer=None):
    """What was recognised → ClipCaptionModel on the CPU; what the file has not of the language model comes by its name.

    tokenizer: in place of the one that the config names.
    """
    config = found.config if gpt2_type is None else dataclasses.replace(found.config, gpt2_type=gpt2_type)
    if config.tune == "lora" and not any(is_adapter(name) for name in found.state):
        config = dataclasses.replace(config, tune="full", lora=None)  # written with its adapters merged in
    if config.tune == "full" and not any(name.startswith("gpt.") for name in found.state) and not found.adapters:
        raise UserError(f"{found.path} lacks the language model that was trained with its mapper (gpt.*). Take the whole file.")
    tokenizer = tokenizer or load_tokenizer(config.gpt2_type)
    whole = bool(config.gpt_config) and holds_language_model(found.state, config)
    gpt = build_language_model(config.gpt_config) if whole else load_language_model(config.gpt2_type)
    try:
        model = ClipCaptionModel(config, gpt, tokenizer)
    except ValueError as error:
        raise UserError(f"{found.path}: {error}") from error
    load_state(model, found, complete=True)
    model.recognised_as, model.read_whole, model.read_from = found.kind, whole, found.path
    if found.base is not None:
        alike = found.base.config.gpt2_type == found.config.gpt2_type
        model.base_model = build_captioner(found.base, gpt2_type if alike else None, tokenizer if alike else None)
    elif config.base is not None:
        raise UserError(f"{found.path} lacks the base captioner that its prompt quotes ({BASE}*). Take the whole file.")
    if found.vision is not None:
        check_vision(found.vision, found.path)
        model.encoder_source = f"clipxgpt:{found.path}"
    return model


def holds_language_model(state, config):
    """Whether a state dict holds the whole language model, so that its weights need not come from elsewhere."""
    of_gpt = {name.removeprefix("gpt.") for name in state if name.startswith("gpt.")}
    if config.tune in ("full", "mapper") or not of_gpt:
        return bool(of_gpt)
    with torch.device("meta"):
        skeleton = build_language_model(config.gpt_config)
    return set(skeleton.state_dict()) - {output_names(skeleton)[1]} <= of_gpt


def build_language_model(gpt_config):
    """Make a causal language model from its config as a dict; its weights are to be loaded, and are not drawn at random first."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {name: value for name, value in gpt_config.items() if name not in ("model_type", "transformers_version", "dtype")}
    config = AutoConfig.for_model(gpt_config["model_type"], **fields)
    with no_init_weights():  # drawing 124M numbers takes seconds
        try:
            gpt = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        except ValueError:  # a language model without SDPA
            gpt = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    gpt.tie_weights()
    return gpt


if __name__ == "__main__":
    from models.hub import main

    sys.exit(main())
