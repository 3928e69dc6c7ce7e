"""Encoders: from a name to what turns images or sounds into embeddings.

    load_encoder("ViT-B/32")                                  one of OpenAI's nine CLIP models
    load_encoder("weights/mine.pt")                           a CLIP weight file
    load_encoder("timm:vit_small_patch14_dinov2.lvd142m")     any model of timm, without its classifier

ENCODERS lists all families; docs/encoders.md shows them as a table. Weights are looked up under data/weights/ first, then in the
library's own cache, then downloaded. To add a family, write a file here and add its Family to ENCODERS. Help texts, errors and the table
in docs/encoders.md read the registry. Nothing here imports torch before an encoder is loaded.
"""

import contextlib
import dataclasses
import os
from pathlib import Path

from common import UserError
from models.encoders import clap, clipxgpt, hugging_face, open_clip, openai, timm
from models.encoders.configs import read_config
from models.encoders.encoder import Encoder, Family
from models.weights import first_line

__all__ = ["ENCODERS", "ENCODER_HELP", "Encoder", "Family", "find_family", "load_encoder", "loading", "pick_device"]

ENCODERS = {
    "openai": openai.FAMILY,
    "tinyvit": timm.TINYVIT_FAMILY,
    "timm": timm.FAMILY,
    "open_clip": open_clip.FAMILY,
    "clap": clap.FAMILY,
    "hf": hugging_face.FAMILY,
    "clipxgpt": clipxgpt.FAMILY,
}
KNOWN = "; ".join(family.pattern for family in ENCODERS.values())
ENCODER_HELP = f"Encoder: {KNOWN}; or a folder that save_pretrained wrote. See docs/encoders.md"
POOLINGS = ("pooled", "none")


def load_encoder(name, device="cpu", mixed_precision="no", pooling="pooled"):
    """Load an encoder.

    Args:
        name: a name of one of ENCODERS' families, or the path of CLIP weights or of a folder of transformers or timm.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
        mixed_precision: "no", "bf16" or "fp16".
        pooling: "pooled" for one vector per image, "none" for the tokens of a vision transformer.

    Returns:
        Encoder.

    Raises:
        UserError: the name is unknown (lists the known ones), this machine lacks the device, or the file holds no weights. Or the tower
            has no tokens, or the weights are not available (says what to download and where to put it).
    """
    name = os.fspath(name)
    if pooling not in POOLINGS:
        raise UserError(f"no pooling {pooling}: expected {' or '.join(POOLINGS)}.")
    family = find_family(name)
    device = pick_device(device)  # before minutes of loading
    with loading(name):
        encoder = family.build(name, pooling)
    module = encoder.module.float().eval().requires_grad_(False).to(device)
    encoder = dataclasses.replace(encoder, module=module, device=device, mixed_precision=mixed_precision)
    if mixed_precision != "no":
        encoder.round_weights()
    return encoder


def find_family(name):
    """Find the family of an encoder's name or path. Raises UserError, listing the families, where there is none."""
    for key, family in ENCODERS.items():
        if name in family.names or not family.names and name.startswith(f"{key}:"):
            return family
    if Path(name).is_file():
        return next(family for family in ENCODERS.values() if family.takes_files)
    if (Path(name) / "config.json").is_file():
        config = read_config(Path(name) / "config.json")
        return next(family for family in ENCODERS.values() if family.takes_folder and family.takes_folder(config))
    raise UserError(
        f"no encoder and no file named {name}. Known: {KNOWN}; or the path of a folder that save_pretrained wrote (docs/encoders.md)."
    )


@contextlib.contextmanager
def loading(name):
    """Turn what libraries raise on the files of an encoder into a UserError that names the encoder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"{name} cannot be loaded ({type(error).__name__}: {first_line(error)}). "
            "Expected the whole files of an encoder; download them again."
        ) from error


def pick_device(name="auto"):
    """Find a device by name; "auto" takes CUDA, then MPS, then the CPU.

    Returns:
        torch.device.

    Raises:
        UserError: it is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name} here ({str(error).splitlines()[0]}). Take cpu, cuda, mps or auto.") from error
    return device
