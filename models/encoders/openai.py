"""OpenAI's CLIP: its nine models by name, and weight files in its layout."""

import hashlib
import os
from pathlib import Path

from common import UserError
from models import weights
from models.encoders.encoder import Encoder, Family, TextParts, call_module, check_side, no_tokens
from models.encoders.preprocess import Preprocess
from models.encoders.torchscript import is_torchscript, read_torchscript
from models.tensors import READ_ERRORS, read_state
from models.weights import find_weights, first_line, refuse_oversized, weights_folder

# The names OpenAI gave its models, in the order of their library.
CLIP_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


def build(name, pooling):
    """Build the vision tower of one of OpenAI's names, or of a weight file.

    Pooled: what encode_image gives. Without pooling: what leaves the last block of a ViT, before its last norm and projection; the class
    token first, then the patches row by row, as in Hugging Face's last_hidden_state.
    """
    import torch
    from clip.model import VisionTransformer

    visual = load_clip(name).visual
    preprocess, preprocessing = openai_preprocess(visual.input_resolution)
    check_side(name, preprocessing)
    width = visual.output_dim
    if pooling == "none":
        if not isinstance(visual, VisionTransformer):
            raise no_tokens(f"{name}, a ResNet,")
        width, visual = len(visual.class_embedding), call_module(_encode_tokens, visual, "visual")
    return Encoder(name, width, torch.device("cpu"), preprocess, preprocessing, visual, pooling=pooling)


def openai_preprocess(size):
    """Return the Preprocess of every CLIP of OpenAI, `size` pixels a side, and what it does as plain values."""
    from clip import clip

    preprocessing = {
        "image_size": size,
        "resize": size,
        "interpolation": "bicubic",
        "crop": "center",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    return Preprocess(clip._transform(size), size), preprocessing  # clip.load returns the same transform


def load_clip(name):
    """Load both towers of one of OpenAI's names, or of a weight file, as clip.model.CLIP in eval mode.

    Raises:
        UserError: as load_encoder does.
    """
    return _read_clip(_find_clip(name))


def load_text(name):
    """Load the text tower of an encoder that `build` takes, as TextParts."""
    import torch
    from clip import clip

    model = load_clip(name).float()
    model.visual = torch.nn.Module()  # the vision tower is not needed, except for a weight whose dtype encode_text asks for
    model.visual.conv1 = torch.nn.Linear(1, 1)

    def tokenize(texts):
        return {"text": clip.tokenize(texts, context_length=model.context_length, truncate=True)}

    return TextParts(tokenize, call_module(lambda model, text: model.encode_text(text), model))


def _encode_tokens(visual, images):
    """CLIP's vision transformer up to its last block: [B, 3, H, W] to [B, L, D]."""
    import torch

    patches = visual.conv1(images).flatten(2).transpose(1, 2)  # [B, L - 1, D]
    first = visual.class_embedding.expand(len(patches), 1, -1)
    tokens = visual.ln_pre(torch.cat([first.to(patches.dtype), patches], 1) + visual.positional_embedding)
    return visual.transformer(tokens.transpose(0, 1)).transpose(0, 1)  # its blocks take [L, B, D]


def _find_clip(name):
    """Find the weight file of a name or path: data/weights/, the library's cache, then a checked download into that cache."""
    if name not in CLIP_NAMES:
        return Path(name)
    from clip import clip

    address = clip._MODELS[name]
    file_name, checksum = address.split("/")[-1], address.split("/")[-2]
    found = find_weights(file_name)
    if found is not None:
        return found
    cached = Path("~/.cache/clip").expanduser() / file_name
    if cached.is_file():
        with open(cached, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == checksum:
                return cached
    advice = f"Download {address} and put it at {weights_folder() / file_name}."
    if not weights.hub_is_reachable(address):
        raise UserError(f"no weights of {name}: looked in {weights_folder()} and {cached.parent}; their host cannot be reached. {advice}")
    try:
        return Path(clip._download(address, str(cached.parent)))
    except (OSError, RuntimeError) as error:
        raise UserError(f"no weights of {name}: the download failed ({error}). {advice}") from error


def _read_clip(path):
    """Read a weight file as clip.model.CLIP in eval mode. As in clip.load, weights are rounded to fp16 first."""
    from clip.model import build_model

    try:
        state = read_torchscript(path) if is_torchscript(path) else dict(read_state(path))
        if "visual.conv1.weight" in state and "token_embedding.weight" not in state:
            raise ValueError("only a vision tower, the text tower is missing")
        size = os.path.getsize(path)
        refuse_oversized(lambda: build_model(dict(state)), size)
        if len(state["positional_embedding"]) ** 2 > max(size, 2**20):  # its causal mask
            raise ValueError(f"a context of {len(state['positional_embedding']):,} tokens")
        return build_model(state)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(
            f"{path} does not hold CLIP weights ({type(error).__name__}: {first_line(error, 120)}); "
            "expected OpenAI's archive or a state dict of its model. Download it again, or give another file."
        ) from error


FAMILY = Family(
    pattern=f"{' '.join(CLIP_NAMES)}, or FILE.pt in their layout",
    about="OpenAI's CLIP, `encode_image`",
    width="1024, 512, 640, 768, 1024, 512, 512, 768, 768",
    build=build,
    load_text=load_text,
    names=CLIP_NAMES,
    takes_files=True,
)
