"""Encoder name → what turns pictures (or sounds) into embeddings: its preprocessing, its weights, its width.

Letters: B batch, D width of an embedding, L patch tokens of a picture, H and W height and width of what the encoder sees, in pixels.

load_encoder("ViT-B/32")                                  one of OpenAI's nine CLIP models
load_encoder("weights/mine.pt")                           a CLIP weight file
load_encoder("tinyvit")                                   TinyViT-21M, its features before the classifier
load_encoder("timm:vit_small_patch14_dinov2.lvd142m")     any model of timm, without its classifier
load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")      open_clip: architecture, then tag or weight file
load_encoder("hf:google/siglip2-base-patch16-224")        a vision tower of the Hugging Face hub, or of a folder
load_encoder("clap:laion/clap-htsat-unfused")             CLAP, for sounds
load_encoder("clipxgpt:FILE.pt")                          the vision tower inside a CLIPxGPT weight file

Weights are looked up under data/weights/ first, then in the library's own cache, then downloaded. docs/encoders.md has the families in a
table. A new family is one more entry in BUILDERS; a key that ends in ":" takes every name that begins with it.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from common import UserError
from models.encoders.clap import build_clap
from models.encoders.hugging_face import build_hf
from models.encoders.open_clip import build_openclip
from models.encoders.openai import CLIP_NAMES, build_clip
from models.encoders.preprocess import Preprocess
from models.encoders.timm import TINYVIT, build_timm, build_tinyvit

__all__ = ["BUILDERS", "CLIP_NAMES", "TINYVIT", "Encoder", "Preprocess", "find_builder", "load_encoder", "pick_device"]


def _build_clipxgpt(name, pooling):
    from models.published.clipxgpt import build_encoder  # imports torch, without which --help is fast

    return build_encoder(name, pooling)


# Name, or beginning of a name → builder(name, pooling) → models.encoders.encoder.Tower.
BUILDERS = {
    **dict.fromkeys(CLIP_NAMES, build_clip),
    "tinyvit": build_tinyvit,
    "timm:": build_timm,
    "open_clip:": build_openclip,
    "hf:": build_hf,
    "clap:": build_clap,
    "clipxgpt:": _build_clipxgpt,
}
POOLINGS = ("pooled", "none")


@dataclasses.dataclass
class Encoder:
    """A frozen encoder. Weights are float32 in eval mode whatever the device."""

    name: str  # as given to load_encoder
    width: int  # D, of an embedding or of a token
    device: object  # torch.device
    preprocess: object  # picture → float32 tensor, [3, H, W] as a rule; for modality "audio" a window of a mono waveform → [C, T, F]
    preprocessing: dict  # the same in words and numbers, for the feature file
    module: object  # [B, …] → [B, D], or [B, L, D]
    mixed_precision: str = "no"  # or bf16, fp16: the precision of the matrix products
    modality: str = "image"  # or "audio"
    pooling: str = "pooled"  # or "none": [B, L, D]
    dtype: str = "float32"  # of what encode gives
    known_digest: str | None = None  # of the weights as they were read, where they have been rounded since

    def encode(self, batch):
        """batch: [B, …] float32, stacked from preprocess, on any device → [B, D] float32 on the encoder's device, without gradient.

        With pooling "none": [B, L, D].
        """
        import torch

        dtype = self._low_precision()
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.module(batch.to(self.device, non_blocking=True)).float()  # [B, D]

    def round_weights(self):
        """Round the weights of matrix products to the precision they are multiplied in, once: autocast rounds frozen ones at every call."""
        from torch import nn

        self.known_digest = self.digest()
        for layer in self.module.modules():
            if isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._low_precision())

    def _low_precision(self):
        """torch's dtype of the matrix products; None: float32."""
        import torch

        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    def digest(self):
        """A short name for the weights: SHA-256 over their names and bytes, 16 hexadecimal digits."""
        import numpy as np

        if self.known_digest:
            return self.known_digest
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).reshape(-1).view(np.uint8))
        return digest.hexdigest()[:16]


def load_encoder(name, device="cpu", mixed_precision="no", pooling="pooled"):
    """Load an encoder by name, or by the path of CLIP weights or of a folder of transformers' or timm's → Encoder.

    device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is. pooling: "pooled" for one vector a picture, "none" for the
    tokens of a vision transformer.
    Raises UserError for a name it does not know (listing those it does), a device this machine lacks, a file that is not
    weights, tokens asked of a tower without any, and weights that are neither here nor within reach (saying what to download and where to
    put it).
    """
    name = os.fspath(name)
    if pooling not in POOLINGS:
        raise UserError(f"no pooling {pooling}: expected {' or '.join(POOLINGS)}.")
    builder = find_builder(name)
    device = pick_device(device)  # before minutes of loading
    tower = builder(name, pooling)
    module = tower.module.float().eval().requires_grad_(False).to(device)
    encoder = Encoder(name, tower.width, device, tower.preprocess, tower.preprocessing, module, mixed_precision, tower.modality, pooling)
    if mixed_precision != "no":
        encoder.round_weights()
    return encoder


def find_builder(name):
    """The builder of an encoder's name or path. Raises UserError, listing the families, for one that is neither."""
    builder = BUILDERS.get(name)
    if builder is None:
        builder = next((build for key, build in BUILDERS.items() if key.endswith(":") and name.startswith(key)), None)
    if builder is None and Path(name).is_file():
        builder = build_clip
    if builder is None and (Path(name) / "config.json").is_file():
        builder = _builder_of_folder(Path(name))
    if builder is None:
        known = ", ".join(f"{key}…" if key.endswith(":") else key for key in BUILDERS)
        raise UserError(
            f"no encoder and no file named {name}. Known: {known}, "
            "or the path of a CLIP weight file or of a folder that save_pretrained wrote (docs/encoders.md)."
        )
    return builder


def _builder_of_folder(folder):
    """Of a folder with config.json: CLAP's, timm's (which names an architecture and no model_type), else transformers'."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}. Expected what save_pretrained writes.") from error
    if "model_type" not in config and "architecture" in config:
        return build_timm
    return build_clap if str(config.get("model_type")).startswith("clap") else build_hf


def pick_device(name="auto"):
    """Device name, or "auto" for CUDA, then MPS, then the CPU → torch.device. Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name} here ({str(error).splitlines()[0]}). Take cpu, cuda, mps or auto.") from error
    return device
