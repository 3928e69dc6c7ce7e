"""timm's image models without their classifier, each with its own preprocessing; `tinyvit` among them."""

import difflib
import os
from pathlib import Path

from common import UserError
from models.encoders.configs import read_config
from models.encoders.encoder import Family, call_module, image_encoder
from models.encoders.preprocess import Preprocess
from models.tensors import READ_ERRORS, read_state
from models.weights import find_weights, first_line, hub_file, pick_file, refuse_oversized, weights_folder

TINYVIT = "tiny_vit_21m_224.dist_in22k_ft_in1k"  # timm's name of the nearest public weights
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm names them on the hub


def build_tinyvit(name, pooling):
    """Build TinyViT-21M: its pooled, normalized features."""
    return _build(name, TINYVIT, find_weights("tinyvit", "tinyvit.pt"), weights_folder() / "tinyvit", pooling)


def build(name, pooling):
    """Build timm:NAME, or a folder that timm saved: the features before the classifier, or forward_features' tokens without pooling.

    Weights of a named model are looked up at data/weights/NAME/, data/weights/NAME.safetensors and .pt, then in the hub's cache, then on
    the hub. A folder holds config.json and model.safetensors.
    """
    import timm

    timm_name = name.removeprefix("timm:")
    folder = Path(timm_name).expanduser()
    if (folder / "config.json").is_file():
        read_config(folder / "config.json")
        return _build(name, f"local-dir:{folder}", folder, folder, pooling)
    if folder.exists():
        raise UserError(f"{folder} is no folder of timm's: expected config.json with an architecture, and model.safetensors.")
    if "/" in timm_name:  # no name of timm's has one
        raise UserError(f"no folder {folder.absolute()}; expected one that timm saved (config.json, model.safetensors). Check the path.")
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(timm_name, timm.list_models() + timm.list_models(pretrained=True), 3, 0.5)
        raise UserError(f"timm has no model {timm_name}. Near: {', '.join(near) or 'none'}; all: timm.list_models().")
    try:
        timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        arch = timm_name.partition(".")[0]
        known = ", ".join(timm.list_models(f"{arch}.*", pretrained=True)) or arch
        raise UserError(f"timm has {arch}, but no weights named {timm_name}. Known: {known}.") from error
    found = find_weights(timm_name, f"{timm_name}.safetensors", f"{timm_name}.pt")
    return _build(name, timm_name, found, weights_folder() / timm_name, pooling)


def _build(name, timm_name, found, place, pooling):
    """Build a model from `found`, a weight file or its folder; None: from the hub. `place` is where a user may put the file."""
    import timm

    file = _hub_weights(name, timm_name, place) if found is None else pick_file(found, WEIGHT_FILES)
    model = _fill(timm_name, file)
    config = timm.data.resolve_data_config({}, model=model)
    size = config["input_size"][1:]
    size = size[0] if size[0] == size[1] else list(size)
    cropped = config["crop_mode"] == "center"
    short_side = int(min(config["input_size"][1:]) / config["crop_pct"])
    preprocessing = {
        "image_size": size,
        "resize": short_side if cropped else size,
        "interpolation": config["interpolation"],
        "crop": config["crop_mode"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    preprocess = Preprocess(timm.data.create_transform(**config, is_training=False), short_side if cropped else None)
    if pooling == "none":
        model = call_module(lambda model, images: model.forward_features(images), model)
    return image_encoder(name, model, preprocess, preprocessing, pooling)


def _hub_weights(name, timm_name, place):
    """Find the weight file that timm publishes for a model, in the hub's cache or on the hub."""
    import timm

    config = timm.get_pretrained_cfg(timm_name)
    if not (config and config.hf_hub_id):
        raise UserError(f"timm publishes no weights for {timm_name}. Put your own at {place / WEIGHT_FILES[0]}, or give a folder.")
    return hub_file(config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_FILES, name, place)


def _fill(timm_name, file):
    """Make the timm model without classifier and fill it from `file`. Raises UserError when these are another model's weights."""
    import timm

    try:
        state = read_state(file)
        state = state.get("state_dict", state.get("model", state))
        # timm translates older layouts. The overlay says that the weights have no classes either, so that every other key must be there.
        model = refuse_oversized(lambda: timm.create_model(timm_name, pretrained=False, num_classes=0), os.path.getsize(file))
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        state = {key: value for key, value in state.items() if not key.startswith(heads) and not key.endswith("attention_bias_idxs")}
        overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "source": "", "custom_load": False}
        model = timm.create_model(timm_name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except READ_ERRORS as error:
        another = any(words in str(error) for words in ("Missing key", "size mismatch", "Unexpected key", "a model of"))
        what = "is of another model" if another else "does not hold weights of the model"
        details = " ".join(str(error).split())[:160]
        raise UserError(f"{file} {what}: expected {timm_name} ({details or first_line(error)}). Download it again.") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model


TINYVIT_FAMILY = Family(
    pattern="tinyvit",
    about="TinyViT-21M, features before the classifier",
    width="576",
    build=build_tinyvit,
    names=("tinyvit",),
)
FAMILY = Family(
    pattern="timm:NAME",
    about="any image model of timm, or a folder that timm saved; features before the classifier",
    width="the model's",
    build=build,
    takes_folder=lambda config: "architecture" in config and "model_type" not in config,
)
