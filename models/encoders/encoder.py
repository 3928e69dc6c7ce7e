"""What the builders of all encoder families give, and what they share.

A builder takes a name and a pooling ("pooled" or "none") and gives a Tower, on the CPU. Letters as in encoders.py.
"""

import dataclasses

from common import UserError


@dataclasses.dataclass
class Tower:
    """One encoder as its library made it."""

    module: object  # torch.nn.Module: a batch → [B, D], or [B, L, D] without pooling
    preprocess: object  # picture, or waveform → float32 tensor
    preprocessing: dict  # the same in words and numbers
    width: int  # D
    modality: str = "image"  # or "audio"


def finish_tower(name, module, preprocess, preprocessing, pooling):
    """Put an image tower in eval mode and send one blank picture through it, to know its width → Tower.

    Raises UserError when `pooling` is "none" and the tower has no patch tokens to give.
    """
    import torch
    from PIL import Image

    module = module.float().eval()
    with torch.no_grad():
        shape = module(preprocess(Image.new("RGB", (64, 64)))[None]).shape
    if pooling == "none" and len(shape) != 3:
        raise no_tokens(name)
    assert len(shape) == (3 if pooling == "none" else 2), f"{name} gives {tuple(shape)}"
    return Tower(module, preprocess, preprocessing, shape[-1])


def no_tokens(name):
    """The error of a tower that cannot do without pooling."""
    return UserError(
        f'{name} has no patch tokens: pooling "none" needs a vision transformer of OpenAI, open_clip, timm or Hugging Face. '
        'Take another encoder, or pooling "pooled".'
    )
