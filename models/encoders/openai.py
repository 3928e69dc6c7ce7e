"""OpenAI's CLIP: its nine models by name, and weight files in its layout."""

import hashlib
import zipfile
from pathlib import Path

from common import UserError
from models import weights
from models.encoders.encoder import Tower, no_tokens
from models.encoders.preprocess import Preprocess
from models.weights import NOT_WEIGHTS, find_weights, first_line, weights_folder

# The names OpenAI gave its models, in the order of their library.
CLIP_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


def build_clip(name, pooling):
    """OpenAI's name, or the path of a weight file → Tower, D wide as encode_image gives it.

    Without pooling: what leaves the last block of a ViT, before its last norm and projection; the class token first, then the patches row
    by row, as Hugging Face's last_hidden_state.
    """
    model = load_clip(name)
    preprocess, preprocessing = openai_preprocess(model.visual.input_resolution)
    if pooling == "pooled":
        return Tower(model.visual, preprocess, preprocessing, model.visual.output_dim)
    if not hasattr(model.visual, "class_embedding"):
        raise no_tokens(f"{name}, a ResNet,")
    return Tower(_token_module(model.visual), preprocess, preprocessing, model.visual.class_embedding.shape[0])


def openai_preprocess(size):
    """What every CLIP of OpenAI is shown, `size` pixels a side → Preprocess, the same in words and numbers."""
    from clip import clip

    preprocessing = {
        "image_size": size,
        "resize": size,
        "interpolation": "bicubic",
        "crop": "center",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    # The library's own transform: clip.load hands out the same, but opens files by itself.
    return Preprocess(clip._transform(size), size), preprocessing


def load_clip(name):
    """OpenAI's name, or the path of a weight file → clip.model.CLIP, both towers, in eval mode. Raises UserError as load_encoder does."""
    return _read_clip(_find_clip(name))


def _token_module(visual):
    import torch

    class Tokens(torch.nn.Module):
        """CLIP's vision transformer up to its last block: [B, 3, H, W] → [B, L, D]."""

        def __init__(self):
            super().__init__()
            self.visual = visual

        def forward(self, pictures):
            patches = visual.conv1(pictures).flatten(2).transpose(1, 2)  # [B, L - 1, D]
            first = visual.class_embedding.expand(len(patches), 1, -1)
            tokens = visual.ln_pre(torch.cat([first.to(patches.dtype), patches], 1) + visual.positional_embedding)
            return visual.transformer(tokens.transpose(0, 1)).transpose(0, 1)  # its blocks take [L, B, D]

    return Tokens()


def _find_clip(name):
    """OpenAI's name or a path → a path: data/weights/, the library's cache, then a checked download into that cache."""
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
    """Weight file → clip.model.CLIP in eval mode.

    The file is a plain state dict, read without running anything in it, or a TorchScript archive as OpenAI publishes, which torch.jit
    reads: take such archives from their publisher only. As in clip.load, weights are rounded to fp16 before anything else.
    """
    import torch
    from clip.model import build_model

    try:
        if _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state)
        if "visual.conv1.weight" in state and "token_embedding.weight" not in state:
            raise ValueError("only a vision tower, the text tower is missing")
        return build_model(state)
    except NOT_WEIGHTS as error:
        raise UserError(
            f"{path} does not hold CLIP weights ({type(error).__name__}: {first_line(error, 120)}); "
            "expected OpenAI's archive or a state dict of its model. Download it again, or give another file."
        ) from error


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())
