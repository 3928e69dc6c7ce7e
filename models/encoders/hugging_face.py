"""Vision towers of the Hugging Face hub: hf:REPO_OR_DIR for CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 and other vision transformers."""

import contextlib
from pathlib import Path

from common import UserError
from models.encoders.configs import check_folder, weights_size
from models.encoders.encoder import MOST_SIDE, Family, TextParts, call_module, image_encoder
from models.encoders.preprocess import Preprocess
from models.weights import load_from_library, refuse_oversized

VISION_FILES = "config.json, preprocessor_config.json and model.safetensors"
TEXT_FILES = "config.json, model.safetensors, tokenizer.json and tokenizer_config.json"
ONE_TOWER = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "clap_audio_model")


def build(name, pooling):
    """Build the vision tower of hf:REPO_OR_DIR, or of a folder with config.json: pooler_output, which for CLIP precedes the projection.

    Models whose weights come without a pooler give their class token. Without pooling: last_hidden_state.
    Looked up at data/weights/REPO/, in the library's cache, then on the hub.
    """
    model, processor, class_token = load_from_library(_load_vision, name.removeprefix("hf:"), "vision model", VISION_FILES)
    settings = processor.to_dict()
    packed = model.config.model_type == "siglip2_vision_model"
    cropped = bool(settings.get("do_center_crop"))
    if packed:
        if not 0 < settings["max_num_patches"] * settings["patch_size"] ** 2 <= MOST_SIDE**2:
            raise UserError(f"{name} asks for {settings['max_num_patches']} patches of {settings['patch_size']} pixels. Check its config.")
        size = resize = f"at most {settings['max_num_patches']} patches of {settings['patch_size']}"
    else:
        resize = _side(settings["size"])
        size = _side(settings["crop_size"]) if cropped else resize
    preprocessing = {
        "image_size": size,
        "resize": resize,
        "interpolation": _interpolation(settings.get("resample")),
        "crop": "center" if cropped else "none",
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
    }
    short_side = (resize if isinstance(resize, int) else min(resize)) if cropped and not packed else None
    preprocess = Preprocess(PackedTransform(processor) if packed else Transform(processor), short_side)
    return image_encoder(name, vision_module(model, pooling, class_token, packed), preprocess, preprocessing, pooling)


class Transform:
    """An RGB PIL image to [3, H, W], by an image processor of transformers."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image):
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()


class PackedTransform(Transform):
    """An RGB PIL image to [L, patch + 3]: SigLIP 2's patches of an image in its own shape, each with its mask and the rows and columns."""

    def __call__(self, image):
        import torch

        given = self.processor(images=image, return_tensors="pt")
        patches, mask, shape = (given[key][0].float() for key in ("pixel_values", "pixel_attention_mask", "spatial_shapes"))
        return torch.cat([patches, mask[:, None], shape.expand(len(patches), 2)], 1)


@contextlib.contextmanager
def quiet():
    """Keep transformers from listing the weights of the other tower, one line each, and from drawing progress bars."""
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
    """Turn a failure to load `files` from a folder into a UserError that names them; other sources raise as they do."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not Path(source).is_dir():
            raise
        raise UserError(f"{source} has no {files} that transformers reads. Put the model's own there.") from error


def refuse_larger(build, source):
    """Refuse a folder whose config describes a larger model than its weight files can fill; names of the hub pass."""
    size = weights_size(source)
    if size is not None:
        refuse_oversized(build, size)


def check_keys(source, what, info, but=()):
    """Raise UserError when weights are missing or of another shape.

    Args:
        source: folder or repository, for the message.
        what: the model, for the message.
        info: transformers' loading report.
        but: beginnings of keys that may be missing.
    """
    wrong = [key for key in info["missing_keys"] if not key.startswith(tuple(but))] + [str(key) for key in info["mismatched_keys"]]
    if wrong or info["error_msgs"]:
        raise UserError(
            f"{source} does not hold the weights of a {what}: {len(wrong)} keys missing or of another shape, as "
            f"{', '.join([*wrong, *info['error_msgs']][:2])}. Give the folder or repository of the whole model."
        )


def _load_vision(source, local_files_only):
    """Load a vision model and its image processor; the third value tells whether the class token replaces a pooler without weights."""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    with quiet():
        check_folder(source)
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
        if config.model_type.startswith("clap"):
            raise UserError(f"{source} is a sound encoder ({config.model_type}): write clap:{source}.")
        if "vision_config" in config.sub_configs:
            config = config.vision_config
        refuse_larger(lambda: AutoModel.from_config(config, trust_remote_code=False), source)
        model, info = AutoModel.from_pretrained(
            source, config=config, local_files_only=local_files_only, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        if model.main_input_name != "pixel_values":
            raise UserError(f"{source} is no vision model but a {config.model_type}; expected a CLIP, SigLIP, DINO or other vision tower.")
        check_keys(source, "vision tower", info, but=("pooler.",))
        with expected_in(source, "preprocessor_config.json"):
            processor = AutoImageProcessor.from_pretrained(
                source, backend="pil", local_files_only=local_files_only, trust_remote_code=False
            )
    return model, processor, any(key.startswith("pooler.") for key in info["missing_keys"])


def _side(size):
    """Read a size as image processors give it: int where one number says it, else [H, W]."""
    if size.get("shortest_edge"):
        return size["shortest_edge"]
    if size.get("height"):
        return size["height"] if size["height"] == size["width"] else [size["height"], size["width"]]
    return size["longest_edge"]


def _interpolation(resample):
    from PIL import Image

    return None if resample is None else Image.Resampling(int(resample)).name.lower()


def vision_module(model, pooling="pooled", class_token=False, packed=False):
    """Wrap a transformers vision tower in a plain module.

    It maps [B, 3, H, W], or packed patches [B, L, patch + 3], to pooler_output or the class token, [B, D]; without pooling to all
    tokens, [B, L, D].
    """

    def encode(model, batch):
        if packed:
            shapes, mask = batch[:, 0, -2:].long(), batch[..., -3]
            given = model(pixel_values=batch[..., :-3], pixel_attention_mask=mask.long(), spatial_shapes=shapes)
        else:
            given = model(pixel_values=batch)
        if pooling == "none":  # an image with fewer patches than others has zeros in their place
            return given.last_hidden_state * mask[..., None] if packed else given.last_hidden_state
        if class_token or given.pooler_output is None:
            return given.last_hidden_state[:, 0]
        return given.pooler_output.flatten(1)  # convolutional models keep two axes of length 1

    return call_module(encode, model)


def load_text(name):
    """Load the text tower of hf:REPO_OR_DIR, clap:REPO_OR_DIR or a folder, as TextParts; None where there is none."""
    found = load_from_library(_load_pair, name.removeprefix("hf:").removeprefix("clap:"), "model with a text tower", TEXT_FILES)
    if found is None:
        return None
    model, tokenizer, longest = found
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # SigLIP was trained on padded texts only
    projection = model._modules.get("visual_projection")

    def tokenize(texts):
        tokens = tokenizer(texts, padding=padding, max_length=longest, truncation=True, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}

    def encode(model, **tokens):
        return model.get_text_features(**tokens).pooler_output

    return TextParts(tokenize, call_module(encode, model), projection)


def _load_pair(source, local_files_only):
    """Load a model of two towers, its tokenizer and its context in tokens; None where the model has no text side."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with quiet():
        check_folder(source)
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
        if config.model_type in ONE_TOWER:
            raise UserError(f"{source} holds one tower alone ({config.model_type}), no text tower. Give the folder or repository of both.")
        if "text_config" not in config.sub_configs:
            return None
        refuse_larger(lambda: AutoModel.from_config(config, trust_remote_code=False), source)
        model, info = AutoModel.from_pretrained(
            source, config=config, local_files_only=local_files_only, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        check_keys(source, "text tower", info)
        if not hasattr(model, "get_text_features"):  # other models of two towers
            return None
        with expected_in(source, "tokenizer.json and tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                raise ValueError("a tokenizer without words: what transformers builds for some models where there are no files")
    for other in {"vision_model", "audio_model"} & set(model._modules):
        setattr(model, other, None)
    longest = config.text_config.max_position_embeddings
    if config.model_type == "clap":
        longest -= config.text_config.pad_token_id + 1  # RoBERTa counts positions from there
    return model, tokenizer, longest


FAMILY = Family(
    pattern="hf:REPO_OR_DIR",
    about="vision towers of Hugging Face: CLIP (before its projection), SigLIP, SigLIP 2, DINOv2, DINOv3, ViT and others; "
    "`pooler_output`, else the class token",
    width="the model's; base 768",
    build=build,
    load_text=load_text,
    takes_folder=lambda config: True,
)
