"""The vision tower inside a CLIPxGPT weight file: clipxgpt:FILE."""

from common import UserError
from models.encoders.encoder import Family, image_encoder
from models.encoders.hugging_face import vision_module
from models.encoders.openai import openai_preprocess

# Attention heads of CLIP's vision towers by width; others have heads 64 wide, as all of OpenAI's.
VISION_HEADS = {768: 12, 1024: 16}
VISION_HEAD_WIDTH = 64


def build(name, pooling):
    """Build clipxgpt:FILE: pooler_output, after the post layer norm and without any projection."""
    import torch

    from models.published.recognise import open_vision

    path = name.partition(":")[2]
    state = open_vision(path)
    tower = check_vision(state, path)
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    tower.load_state_dict({prefix + key: tensor.float() for key, tensor in state.items()}, assign=True)
    for module in tower.modules():
        if "position_ids" in module._buffers:  # a buffer outside the state dict, made on the meta device
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return image_encoder(name, vision_module(tower, pooling), *openai_preprocess(tower.config.image_size), pooling)


def check_vision(state, path):
    """Check that the vision tower of a CLIPxGPT file is whole.

    Args:
        state: its tensors under transformers' names, which follow `ie.model.` in the file.
        path: the file, for messages.

    Returns:
        transformers' CLIPVisionModel of that size, without weights.

    Raises:
        UserError: lists every missing, unexpected and misshapen key.
    """
    tower = _empty_tower(state, path)
    own = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    faults = [f"missing ie.model.{name}" for name in sorted(set(own) - set(state))]
    faults += [f"unexpected ie.model.{name.removeprefix('ie.')}" for name in sorted(set(state) - set(own))]
    faults += [
        f"ie.model.{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    if faults:
        raise UserError(f"{path} does not fit a vision tower: {'; '.join(faults)}. Download the file again.")
    return tower


def _empty_tower(state, path):
    """Make a CLIPVisionModel without weights, of the sizes of `state`. Raises UserError when they cannot be read off it."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    witnesses = {"embeddings.patch_embedding": 4, "embeddings.position_embedding": 2, "encoder.layers.0.mlp.fc1": 2}
    for name, dims in witnesses.items():
        tensor = state.get(f"{name}.weight")
        if tensor is None or tensor.dim() != dims:
            shown = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UserError(f"{path} does not fit a vision tower: ie.model.{name}.weight is {shown}. Download the file again.")
    patches, positions, first = (state[f"{name}.weight"] for name in witnesses)
    width, patch = patches.shape[0], patches.shape[-1]
    side = round(max(len(positions) - 1, 1) ** 0.5)
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.") and name.endswith((".weight", ".bias"))}
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=first.shape[0], image_size=side * patch, patch_size=patch,
        num_hidden_layers=len([layer for layer in layers if sum(name.startswith(f"encoder.layers.{layer}.") for name in state) >= 8]),
        num_attention_heads=VISION_HEADS.get(width, max(1, width // VISION_HEAD_WIDTH)),
    )  # fmt: skip
    try:
        with torch.device("meta"):
            return CLIPVisionModel(config)
    except ValueError as error:
        raise UserError(f"{path} holds a vision tower {width} wide, which cannot be built: {error}. Download the file again.") from error


FAMILY = Family(
    pattern="clipxgpt:FILE",
    about="the vision tower inside a CLIPxGPT weight file; `pooler_output`",
    width="768, 1024",
    build=build,
)
