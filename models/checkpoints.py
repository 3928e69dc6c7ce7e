"""Checkpoints: bare state dicts under the published names, with a readable config beside them.

`{prefix}-{epoch:03d}.pt`, `{prefix}_latest.pt`, `{prefix}_best.pt` and `{prefix}_average.pt` hold weights. `{prefix}.json` holds
everything that rebuilds the model, and how it was made. The weights carry a copy of the model's part in the state dict's `_metadata`, which
load_state_dict ignores, so that a later run of the same name cannot change what they mean. A frozen language model is left out unless
asked for. A published file has no config: models/published/recognise.py finds out what it is.
"""

import collections
import dataclasses
import json
import re
import zipfile
from pathlib import Path

import torch

from common import UserError, replace_file
from features.schema import check_structure
from models.base_captioner import BaseCaptioner
from models.captioner import ClipCaptionModel, Origin, stop_token_id
from models.config import CaptionConfig, config_schema
from models.encoders.clipxgpt import check_vision
from models.encoders.configs import check_numbers, read_object
from models.mappers import build_mapper
from models.published.downloads import find_published
from models.published.recognise import plain_state, recognise
from models.published.shapes import find_differing
from models.state_dicts import BASE, fill_captioner, trained_state
from models.tensors import read_tensors, refuse_compressed, save_tensors
from models.tuning import is_adapter, output_names
from models.weights import build_language_model, find_weights, load_language_model, load_tokenizer, refuse_oversized

OWN_CONFIG = "prefixcap"  # where a state dict's _metadata has the config, as JSON
RUN_SUFFIX = re.compile(r"(-\d{3,}|_latest|_best|_average)$")


def config_path(checkpoint):
    """Return where the config of a checkpoint file is: coco_prefix-009.pt -> coco_prefix.json."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(RUN_SUFFIX.sub("", checkpoint.stem) + ".json")


def save_checkpoint(model, path, full=False):
    """Write a model's weights as a bare state dict, with its config in `_metadata`.

    Args:
        model: ClipCaptionModel.
        path: the file.
        full: include the language model even where it is frozen, with adapters merged in.
    """
    save_state(trained_state(model, full), model.config, path)


def save_state(state, config, path):
    """Write a state dict with its config in `_metadata`.

    Args:
        state: dict of name to tensor, on any device.
        config: CaptionConfig.
        path: the file.
    """
    state = collections.OrderedDict((name, tensor.detach().cpu()) for name, tensor in state.items())
    state._metadata = {OWN_CONFIG: {"model": json.dumps(dataclasses.asdict(config))}}
    save_tensors(state, path)


def save_config(config, made_by, path):
    """Write `{prefix}.json`.

    Args:
        config: CaptionConfig, written as "model".
        made_by: dict of plain values on how the model was made (arguments, versions, seed, data).
        path: the file.
    """
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps({"model": dataclasses.asdict(config), "made_by": made_by}, indent=2) + "\n", encoding="utf-8")


def read_config(path):
    """Read the "model" part of a `{prefix}.json`, which may come from a stranger.

    Returns:
        CaptionConfig; or a dict of hints where the embeddings' width is left out.

    Raises:
        UserError: it is neither; the message names the field.
    """
    return check_config(read_object(path, "the config that train.py writes"), path)


def read_own_config(content, path):
    """Read the config that a state dict carries. Returns CaptionConfig, or None where it carries none. Raises as read_config does."""
    metadata = getattr(content, "_metadata", None)
    own = metadata.get(OWN_CONFIG) if isinstance(metadata, dict) else None
    if own is None:
        return None
    try:
        model = json.loads(own["model"])
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"{path} carries a config that is not JSON ({str(error)[:100]}). Copy or download it again.") from error
    return check_config({"model": model}, path)


def find_config(content, path):
    """Read the config of weights: their own, else that of the file beside. Returns what read_config does, or {} where there is none."""
    beside = config_path(path)
    return read_own_config(content, path) or (read_config(beside) if beside.is_file() else {})


def carries_config(path):
    """Tell whether a file of weights carries its config, without reading the weights."""
    try:
        refuse_compressed(path)
        with zipfile.ZipFile(path) as file:
            return any(OWN_CONFIG.encode() in file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))
    except (UserError, OSError, zipfile.BadZipFile):  # load_checkpoint says what is wrong with it
        return False


def check_config(content, path):
    """Check what a config file holds. Arguments: a dict, and the file for errors. Returns and raises as read_config does."""
    model = content.get("model")
    whole = not isinstance(model, dict) or "clip_width" in model
    fields = check_structure(config_schema(whole), content, path, "the config that train.py writes")["model"]
    check_numbers(fields, path)
    if not whole:
        return fields
    if fields.get("tune") == "lora" and fields.get("lora") is None:
        raise UserError(f"{path} has tune lora and no lora; expected its rank, alpha, dropout and targets. Take the one train.py wrote.")
    return CaptionConfig(**fields)


def read_state_dict(path):
    """Read a checkpoint's state dict, without the buffers of old transformers. Raises UserError when it holds something else."""
    return plain_state(read_tensors(path), path)


def open_checkpoint(path, gpt2_type=None):
    """Read a checkpoint file and find out what it is, without building a model.

    Args:
        path: a .pt file, a name under data/weights/, or the name of published weights.
        gpt2_type: a language model that knows its number of heads, asked where the file's width does not settle it.

    Returns:
        Recognised, on the CPU.

    Raises:
        UserError: the file cannot be read or is not recognised.
    """
    found = find_weights(str(path), f"{path}.pt")
    path = found if found is not None and found.is_file() else find_published(str(path)) or Path(path)
    content = read_tensors(path)
    return recognise(content, path, find_config(content, path), gpt2_type)


def load_checkpoint(path, gpt2_type=None, device="cpu"):
    """Build a captioner from a checkpoint file, ours or a published one.

    Args:
        path: a .pt file, a name under data/weights/, or the name of published weights (models/published/downloads.py).
        gpt2_type: overrides where the language model's weights or tokenizer come from.
        device: where to put the model.

    Returns:
        ClipCaptionModel in eval mode, with .config, .tokenizer and .origin; prompted ones come with their .base_captioner, and published
        LoRA adapters are merged.

    Raises:
        UserError: the file cannot be read, is not recognised, or does not fit.
    """
    return build_captioner(open_checkpoint(path, gpt2_type), gpt2_type).to(device).eval()


def build_captioner(found, gpt2_type=None, tokenizer=None, model_class=ClipCaptionModel):
    """Build the captioner that a file was recognised as; what the file lacks of the language model is loaded by its name.

    Args:
        found: Recognised.
        gpt2_type: overrides the config's.
        tokenizer: used in place of the one that the config names.
        model_class: ClipCaptionModel or a subclass.

    Returns:
        The captioner, on the CPU.

    Raises:
        UserError: the file is incomplete or does not fit.
    """
    config = found.config if gpt2_type is None else dataclasses.replace(found.config, gpt2_type=gpt2_type)
    if config.tune == "lora" and not any(is_adapter(name) for name in found.state):
        config = dataclasses.replace(config, tune="full", lora=None)  # written with its adapters merged in
    if config.tune == "full" and not any(name.startswith("gpt.") for name in found.state) and not found.adapters:
        raise UserError(f"{found.path} lacks the language model that was trained with its mapper (gpt.*). Take the whole file.")
    whole, beside = False, config_path(found.path)
    try:
        tokenizer = tokenizer or load_tokenizer(config.gpt2_type)
        whole = bool(config.gpt_config) and holds_language_model(found.state, config)
        size = sum(tensor.nbytes for tensor in found.state.values())
        gpt = build_language_model(config.gpt_config, size) if whole else load_language_model(config.gpt2_type)
        width = gpt.get_input_embeddings().weight.shape[1]
        differing = [f"{field} {said} and the weights have {shown}" for field, (said, shown) in find_differing(found, width).items()]
        if differing:
            raise UserError(f"{beside} says {', '.join(differing)}. Take the config that was written with them.")
        refuse_oversized(lambda: build_mapper(config, width), size)
        model = model_class(config, gpt, tokenizer)
        if config.stop_token is not None:
            stop_token_id(tokenizer, config.stop_token)
        fill_captioner(model, found, complete=True)
    except ValueError as error:
        message = (str(error) if str(found.path) in str(error) else f"{found.path}: {error}").removesuffix(".") + "."
        source = "gpt_config" if whole else f"gpt2_type {config.gpt2_type}"
        raise UserError(f"{message} Its language model is {source} of {beside}." if beside.is_file() else message) from error
    if found.base is not None:
        alike = found.base.config.gpt2_type == found.config.gpt2_type
        base = build_captioner(found.base, gpt2_type if alike else None, tokenizer if alike else None)
        model.base_captioner = BaseCaptioner(base)
    elif config.base is not None:
        raise UserError(f"{found.path} lacks the base captioner that its prompt quotes ({BASE}*). Take the whole file.")
    encoder = None
    if found.vision is not None:
        check_vision(found.vision, found.path)
        encoder = f"clipxgpt:{found.path}"
    model.origin = Origin(found.path, found.kind, whole, encoder)
    return model


def holds_language_model(state, config):
    """Tell whether a state dict holds the whole language model, so that its weights need not come from elsewhere."""
    of_gpt = {name.removeprefix("gpt.") for name in state if name.startswith("gpt.")}
    if config.tune in ("full", "mapper") or not of_gpt:
        return bool(of_gpt)
    with torch.device("meta"):
        skeleton = build_language_model(config.gpt_config)
    return set(skeleton.state_dict()) - {output_names(skeleton)[1]} <= of_gpt
