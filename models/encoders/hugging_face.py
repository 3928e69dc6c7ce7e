"""Vision towers of the Hugging Face hub: hf:REPO_OR_DIR for CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 and other vision transformers."""

import contextlib
from pathlib import Path

from common import UserError
from models.encoders.encoder import finish_tower
from models.encoders.preprocess import Preprocess
from models.weights import load_from_library

VISION_FILES = "config.json, preprocessor_config.json and model.safetensors"
VISION_TOWERS_ONLY = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")


def build_hf(name, pooling):
    """hf:REPO_OR_DIR, or a folder with config.json → Tower, D wide: pooler_output, which for CLIP stands before the projection.

    Models whose weights come without a pooler give their class token. Without pooling: last_hidden_state.
    Looked up at data/weights/REPO/, in the library's cache, then on the hub.
    """
    model, processor, class_token = load_from_library(_load_vision, name.removeprefix("hf:"), "vision model", VISION_FILES)
    told = processor.to_dict()
    packed = model.config.model_type == "siglip2_vision_model"
    cropped = bool(told.get("do_center_crop"))
    if packed:
        size = resize = f"at most {told['max_num_patches']} patches of {told['patch_size']}"
    else:
        resize = _side(told["size"])
        size = _side(told["crop_size"]) if cropped else resize
    preprocessing = {
        "image_size": size,
        "resize": resize,
        "interpolation": _interpolation(told.get("resample")),
        "crop": "center" if cropped else "none",
        "mean": list(told["image_mean"]),
        "std": list(told["image_std"]),
    }
    short_side = (resize if isinstance(resize, int) else min(resize)) if cropped and not packed else None
    preprocess = Preprocess(PackedTransform(processor) if packed else Transform(processor), short_side)
    return finish_tower(name, vision_module(model, pooling, class_token, packed), preprocess, preprocessing, pooling)


class Transform:
    """PIL RGB → [3, H, W], by an image processor of transformers."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image):
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()


class PackedTransform(Transform):
    """PIL RGB → [L, patch + 3]: SigLIP 2's patches of a picture in its own shape, each with its mask and the picture's rows and columns."""

    def __call__(self, image):
        import torch

        given = self.processor(images=image, return_tensors="pt")
        patches, mask, shape = (given[key][0].float() for key in ("pixel_values", "pixel_attention_mask", "spatial_shapes"))
        return torch.cat([patches, mask[:, None], shape.expand(len(patches), 2)], 1)


@contextlib.contextmanager
def quiet():
    """Keep transformers from listing the weights of the other tower, one line each, and from drawing bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def expected_in(source, files):
    """Turn a failure to load `files` from a folder into a UserError that names them; those of the hub's cache go on to the hub."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not Path(source).is_dir():
            raise
        raise UserError(f"{source} has no {files} that transformers reads. Put the model's own there.") from error


def check_keys(source, what, info, but=()):
    """Raise UserError when weights that `info` (transformers' loading report) misses, but those that begin with one of `but`."""
    wrong = [key for key in info["missing_keys"] if not key.startswith(tuple(but))] + [str(key) for key in info["mismatched_keys"]]
    if wrong or info["error_msgs"]:
        raise UserError(
            f"{source} does not hold the weights of a {what}: {len(wrong)} keys missing or of another shape, as "
            f"{', '.join([*wrong, *info['error_msgs']][:2])}. Give the folder or repository of the whole model."
        )


def _load_vision(source, local_files_only):
    """→ model, image processor, whether its class token stands in for a pooler without weights"""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    with quiet():
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if config.model_type.startswith("clap"):
            raise UserError(f"{source} is a sound encoder ({config.model_type}): write clap:{source}.")
        config = getattr(config, "vision_config", config)
        model, info = AutoModel.from_pretrained(
            source, config=config, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True
        )
        if model.main_input_name != "pixel_values":
            raise UserError(f"{source} is no vision model but a {config.model_type}; expected a CLIP, SigLIP, DINO or other vision tower.")
        check_keys(source, "vision tower", info, but=("pooler.",))
        with expected_in(source, "preprocessor_config.json"):
            processor = AutoImageProcessor.from_pretrained(source, backend="pil", local_files_only=local_files_only)
    return model, processor, any(key.startswith("pooler.") for key in info["missing_keys"])


def _side(size):
    """A size as image processors tell it → int where one number says it, else [H, W]."""
    if size.get("shortest_edge"):
        return size["shortest_edge"]
    if size.get("height"):
        return size["height"] if size["height"] == size["width"] else [size["height"], size["width"]]
    return size["longest_edge"]


def _interpolation(resample):
    from PIL import Image

    return None if resample is None else Image.Resampling(int(resample)).name.lower()


def vision_module(model, pooling="pooled", class_token=False, packed=False):
    """A transformers vision tower as a plain module: pooler_output, or the class token, or without pooling all tokens."""
    import torch

    class Vision(torch.nn.Module):
        """[B, 3, H, W], or packed patches [B, L, patch + 3] → [B, D], or [B, L, D] without pooling."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            if packed:
                shapes, mask = batch[:, 0, -2:].long(), batch[..., -3]
                given = model(pixel_values=batch[..., :-3], pixel_attention_mask=mask.long(), spatial_shapes=shapes)
            else:
                given = model(pixel_values=batch)
            if pooling == "none":  # where a picture has fewer patches than others, zeros: no token here
                return given.last_hidden_state * mask[..., None] if packed else given.last_hidden_state
            if class_token or given.pooler_output is None:
                return given.last_hidden_state[:, 0]
            return given.pooler_output.flatten(1)  # convolutional models keep two axes of length 1

    return Vision()
