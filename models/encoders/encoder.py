"""What an encoder is, and what the files of the encoder families share.

Letters: B batch, D width of an embedding, L tokens of an image, H and W height and width of the encoder's input in pixels.
"""

import dataclasses
import hashlib

from common import UserError

MOST_SIDE = 4096  # pixels; encoders in use take at most some 1,000


@dataclasses.dataclass
class Encoder:
    """A frozen encoder of images or sounds, float32 and in eval mode.

    Attributes:
        name: as given to load_encoder.
        width: D, of an embedding or of a token.
        device: torch.device.
        preprocess: Preprocess: an image, or a window of a waveform, to a float32 tensor.
        preprocessing: what `preprocess` does, as plain values for the feature file.
        module: torch.nn.Module from [B, ...] to [B, D], or to [B, L, D] without pooling.
        mixed_precision: "no", "bf16" or "fp16": the precision of matrix products.
        modality: "image" or "audio".
        pooling: "pooled", or "none" for [B, L, D].
        dtype: of what `encode` returns.
        known_digest: digest of the weights as they were read, where they have been rounded since.
        many_views: whether `preprocess` returns several views, whose embeddings are averaged (features.audio).
        audio: how a sound becomes the input, as plain values; None for images.
    """

    name: str
    width: int
    device: object
    preprocess: object
    preprocessing: dict
    module: object
    mixed_precision: str = "no"
    modality: str = "image"
    pooling: str = "pooled"
    dtype: str = "float32"
    known_digest: str | None = None
    many_views: bool = False
    audio: dict | None = None

    def encode(self, batch):
        """Encode a batch without gradients.

        Args:
            batch: [B, ...] float32, stacked outputs of `preprocess`, on any device.

        Returns:
            [B, D] float32 on the encoder's device; [B, L, D] with pooling "none".
        """
        import torch

        dtype = self._low_precision()
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.module(batch.to(self.device, non_blocking=True)).float()

    def round_weights(self):
        """Round the weights of matrix products to the precision they are multiplied in.

        Autocast would round frozen weights again in every call.
        """
        from torch import nn

        self.known_digest = self.digest()
        for layer in self.module.modules():
            if isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._low_precision())

    def _low_precision(self):
        """The dtype of matrix products; None for float32."""
        import torch

        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    def digest(self):
        """Return a short name for the weights: SHA-256 over their names and bytes, 16 hexadecimal digits."""
        import numpy as np

        if self.known_digest:
            return self.known_digest
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).reshape(-1).view(np.uint8))
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Family:
    """An entry of models.encoders.ENCODERS: encoders that one file here builds.

    Attributes:
        pattern: how its names are written, for help, errors and docs.
        about: what it is and which embedding it gives, for docs/encoders.md.
        width: D, in words, for docs/encoders.md.
        build: function(name, pooling) that returns an Encoder on the CPU.
        load_text: function(name) that returns TextParts, or None where this encoder has no text tower. None: no encoder of the family has.
        names: the names it takes; () for every name that begins with its key in ENCODERS and a colon.
        takes_files: whether it takes the path of a weight file.
        takes_folder: function(config) that tells from a folder's config.json whether the folder is its own.
        modality: "image" or "audio".
    """

    pattern: str
    about: str
    width: str
    build: object
    load_text: object = None
    names: tuple = ()
    takes_files: bool = False
    takes_folder: object = None
    modality: str = "image"


@dataclasses.dataclass
class TextParts:
    """What a family's load_text returns.

    Attributes:
        tokenize: a list of texts to a dict of tensors on the CPU, truncated to the context.
        module: torch.nn.Module that takes these tensors as keywords and returns [N, J].
        projection: torch.nn.Linear from D to J, for encoders whose embeddings stand before it.
    """

    tokenize: object
    module: object
    projection: object = None


def check_side(name, preprocessing):
    """Refuse an encoder whose settings ask for images that would fill the memory."""
    for what in ("image_size", "resize"):
        sides = preprocessing[what] if isinstance(preprocessing[what], list) else [preprocessing[what]]
        for side in sides:
            if not isinstance(side, str) and not 1 <= side <= MOST_SIDE:  # str: SigLIP 2's packed patches
                raise UserError(f"{name} asks for images of {side} pixels a side; expected 1 to {MOST_SIDE}. Check its config.")


def image_encoder(name, module, preprocess, preprocessing, pooling):
    """Make an Encoder of an image tower; one blank image through it tells its width.

    Raises:
        UserError: pooling is "none" and the tower has no tokens, or it asks for enormous images.
    """
    import torch
    from PIL import Image

    check_side(name, preprocessing)
    module = module.float().eval()
    with torch.no_grad():
        shape = module(preprocess(Image.new("RGB", (64, 64)))[None]).shape
    if pooling == "none" and len(shape) != 3:
        raise no_tokens(name)
    assert len(shape) == (3 if pooling == "none" else 2), f"{name} gives {tuple(shape)}"
    return Encoder(name, shape[-1], torch.device("cpu"), preprocess, preprocessing, module, pooling=pooling)


def call_module(function, model, name="model"):
    """Wrap a model, under a name, in a torch module whose forward calls function(model, *inputs, **inputs)."""
    import torch

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, model)

        def forward(self, *inputs, **named):
            return function(self.get_submodule(name), *inputs, **named)

    return Call()


def no_tokens(name):
    """Return the error of a tower that cannot do without pooling."""
    return UserError(
        f'{name} has no patch tokens: pooling "none" needs a vision transformer of OpenAI, open_clip, timm or Hugging Face. '
        'Take another encoder, or pooling "pooled".'
    )
