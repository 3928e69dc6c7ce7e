"""timm's image models, without their classifier, each with its own preprocessing; `tinyvit` among them."""

import json
from pathlib import Path

from common import UserError
from models.encoders.encoder import finish_tower
from models.encoders.preprocess import Preprocess
from models.weights import NOT_WEIGHTS, find_weights, first_line, hub_file, pick_file, read_state, weights_folder

TINYVIT = "tiny_vit_21m_224.dist_in22k_ft_in1k"  # timm's name of the nearest public weights
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm names them on the hub


def build_tinyvit(name, pooling):
    """TinyViT-21M → Tower: its pooled, normalised features, D = 576."""
    return _build(name, TINYVIT, find_weights("tinyvit", "tinyvit.pt"), weights_folder() / "tinyvit", pooling)


def build_timm(name, pooling):
    """timm:NAME → Tower: what the model gives without a classifier (num_classes=0), or forward_features' tokens without pooling.

    NAME is timm's, or a folder as timm saves for the hub (config.json, model.safetensors). Weights of a named model are looked up at
    data/weights/NAME/, data/weights/NAME.safetensors and .pt, then in the hub's cache, then on the hub.
    """
    import timm

    timm_name = name.removeprefix("timm:")
    folder = Path(timm_name).expanduser()
    if (folder / "config.json").is_file():
        return _build(name, f"local-dir:{folder}", folder, folder, pooling)
    if folder.exists():
        raise UserError(f"{folder} is no folder of timm's: expected config.json with an architecture, and model.safetensors.")
    if not timm.is_model(timm_name):
        import difflib

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
    """found: a weight file, a folder with one, or None for the hub; place: where a user may put it, for the message."""
    import timm

    if found is None:
        config = timm.get_pretrained_cfg(timm_name)
        repository = config and config.hf_hub_id
        if not repository:
            raise UserError(f"timm publishes no weights for {timm_name}. Put your own at {place / WEIGHT_FILES[0]}, or give a folder.")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_FILES
        file = hub_file(repository, names, name, place)
    else:
        file = pick_file(found, WEIGHT_FILES)
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
    return finish_tower(name, _token_module(model) if pooling == "none" else model, preprocess, preprocessing, pooling)


def _fill(timm_name, file):
    """The timm model without classifier, holding the weights in `file`, all of them. Raises UserError when they are another model's."""
    import timm

    try:
        state = read_state(file)
        state = state.get("state_dict", state.get("model", state))
        # timm itself translates older layouts; told that the weights have no classes either, it insists on every other key.
        model = timm.create_model(timm_name, pretrained=False, num_classes=0)
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        state = {key: value for key, value in state.items() if not key.startswith(heads) and not key.endswith("attention_bias_idxs")}
        overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "source": "", "custom_load": False}
        model = timm.create_model(timm_name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (*NOT_WEIGHTS, json.JSONDecodeError) as error:
        another = "Missing key" in str(error) or "size mismatch" in str(error) or "Unexpected key" in str(error)
        what = "is of another model" if another else "does not hold weights of the model"
        details = " ".join(str(error).split())[:160]
        raise UserError(f"{file} {what}: expected {timm_name} ({details or first_line(error)}). Download it again.") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model


def _token_module(model):
    import torch

    class Tokens(torch.nn.Module):
        """The model's last features, unpooled: [B, L, D] from a vision transformer."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pictures):
            return model.forward_features(pictures)

    return Tokens()
