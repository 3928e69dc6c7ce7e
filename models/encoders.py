"""Encoder name → what turns pictures into embeddings: its preprocessing, its weights, its width.

Letters: B batch, D width of an embedding, H and W height and width of what the encoder sees, in pixels.

load_encoder("ViT-B/32")            one of OpenAI's nine CLIP models
load_encoder("weights/mine.pt")     a CLIP weight file
load_encoder("tinyvit")             TinyViT-21M, its features before the classifier
load_encoder("clipxgpt:FILE.pt")    the vision tower inside a CLIPxGPT weight file

Weights are looked up under data/weights/ first, then in the library's own cache, then downloaded. A new family is one more entry in
BUILDERS; a key that ends in ":" takes every name that begins with it.
"""

import dataclasses
import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

from common import UserError

from .images import read_image
from .weights import find_weights, hub_is_reachable, weights_folder

# The names OpenAI gave its models, in the order of their library.
CLIP_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
TINYVIT = "tiny_vit_21m_224.dist_in22k_ft_in1k"  # timm's name of the nearest public weights
# A 1 x 8000 picture grows enormous when its short side is scaled up; beyond this many pixels its ends, cropped later anyway, go first.
MOST_RESIZED_PIXELS = 2**26
# What torch and CLIP's own code raise on a file that holds something else.
NOT_WEIGHTS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


class Preprocess:
    """Picture (path, bytes or PIL) → float32 [3, H, W]. Holds no weights: loader workers get a copy of it."""

    def __init__(self, transform, short_side):
        """transform: PIL RGB → tensor; short_side: what it scales a picture's shorter side to, in pixels."""
        self.transform = transform
        self.short_side = short_side

    def __call__(self, picture):
        """Raises UnreadableImage when the picture cannot be read."""
        return self.transform(self._without_far_ends(read_image(picture)))

    def _without_far_ends(self, image):
        """Crop an extremely long picture around its middle so that scaling it up stays affordable."""
        short, long = sorted(image.size)
        longest = short * max(1, MOST_RESIZED_PIXELS // self.short_side**2)
        longest += (long - longest) % 2  # so that the middle stays the middle
        if long <= longest:
            return image
        start = (long - longest) // 2
        box = (start, 0, start + longest, short) if image.width == long else (0, start, short, start + longest)
        return image.crop(box)


@dataclasses.dataclass
class Encoder:
    """A frozen encoder. Weights are float32 in eval mode whatever the device."""

    name: str  # as given to load_encoder
    width: int  # D
    device: object  # torch.device
    preprocess: Preprocess  # picture → float32 [3, H, W]
    preprocessing: dict  # the same in words and numbers, for the feature file
    module: object  # [B, 3, H, W] → [B, D]
    mixed_precision: str = "no"  # or bf16, fp16: the precision of the matrix products

    def encode(self, batch):
        """batch: [B, 3, H, W] float32, on any device → [B, D] float32 on the encoder's device, without gradient."""
        import torch

        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.module(batch.to(self.device, non_blocking=True)).float()  # [B, D]

    def digest(self):
        """A short name for the weights: SHA-256 over their names and bytes, 16 hexadecimal digits."""
        import numpy as np

        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).reshape(-1).view(np.uint8))
        return digest.hexdigest()[:16]


def load_encoder(name, device="cpu", mixed_precision="no"):
    """Load an encoder by name, or CLIP weights by path → Encoder.

    device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
    Raises UserError for a name it does not know (listing those it does), a device this machine lacks, a file that is not
    weights, and weights that are neither here nor within reach (saying what to download and where to put it).
    """
    name = os.fspath(name)
    builder = BUILDERS.get(name)
    if builder is None:
        builder = next((build for key, build in BUILDERS.items() if key.endswith(":") and name.startswith(key)), None)
    if builder is None and Path(name).is_file():
        builder = _build_clip
    if builder is None:
        raise UserError(f"no encoder and no file named {name}. Known: {', '.join(BUILDERS)}, or the path of a CLIP weight file.")
    device = pick_device(device)  # before minutes of loading
    module, preprocess, preprocessing, width = builder(name)
    module = module.float().eval().requires_grad_(False).to(device)
    return Encoder(name, width, device, preprocess, preprocessing, module, mixed_precision)


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


# -- CLIP ----------------------------------------------------------------------------------------------------------------


def _build_clip(name):
    """OpenAI's name or a path → (vision tower, Preprocess, preprocessing, D)."""
    from clip import clip

    path = _find_clip(name)
    model = _read_clip(path)
    size = model.visual.input_resolution
    preprocessing = {
        "image_size": size,
        "resize": size,
        "interpolation": "bicubic",
        "crop": "center",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    # The library's own transform: clip.load hands out the same, but opens files by itself.
    return model.visual, Preprocess(clip._transform(size), size), preprocessing, model.visual.output_dim


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
    if not hub_is_reachable(address):
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
        return build_model(dict(state))
    except NOT_WEIGHTS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "nothing in it"
        raise UserError(
            f"{path} does not hold CLIP weights ({type(error).__name__}: {reason[:120]}); "
            "expected OpenAI's archive or a state dict of its model. Download it again, or give another file."
        ) from error


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


# -- TinyViT -------------------------------------------------------------------------------------------------------------


def _build_tinyvit(name):
    """TinyViT-21M with its pooled, normalised features, D = 576, and timm's own preprocessing for it."""
    import timm

    folder = find_weights("tinyvit", "tinyvit.pt")
    if folder is not None:
        model = timm.create_model(TINYVIT, pretrained=False, num_classes=0)
        _fill_timm(model, _weight_file(folder))
    else:
        model = _download_timm(TINYVIT, "tinyvit")
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    size = config["input_size"][-1]
    short_side = int(size / config["crop_pct"])
    preprocessing = {
        "image_size": size,
        "resize": short_side,
        "interpolation": config["interpolation"],
        "crop": config["crop_mode"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    return model, Preprocess(transform, short_side), preprocessing, model.num_features


def _weight_file(found):
    """A weight file, or the folder that holds one as timm saves it for the hub → the file."""
    for path in (found, found / "model.safetensors", found / "pytorch_model.bin"):
        if path.is_file():
            return path
    raise UserError(f"{found} holds neither model.safetensors nor pytorch_model.bin. Put the weights timm publishes there.")


def _fill_timm(model, path):
    """Load the weights in `path` into a timm model without a classifier. Raises UserError when they are another model's."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        state = {key: value for key, value in state.items() if not key.startswith("head.fc.") and not key.endswith("attention_bias_idxs")}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (*NOT_WEIGHTS, SafetensorError) as error:
        raise UserError(f"{path} does not hold weights of {TINYVIT} ({type(error).__name__}). Download it again.") from error
    missing = [key for key in missing if not key.endswith("attention_bias_idxs")]
    if missing or unexpected:
        wrong = (missing + unexpected)[:3]
        raise UserError(f"{path} is of another model: {len(missing)} keys missing, {len(unexpected)} not known, as {', '.join(wrong)}.")


def _download_timm(timm_name, local_name):
    """A pretrained timm model without classifier, from its cache or the hub. Raises UserError when neither has it."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    repository = f"timm/{timm_name}"
    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in ("model.safetensors", "pytorch_model.bin"))
    reason = "the hub cannot be reached"
    if cached or not constants.HF_HUB_OFFLINE and hub_is_reachable(constants.ENDPOINT):
        try:
            return timm.create_model(timm_name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            reason = f"the download failed ({' '.join(str(error).split())[:120]})"
    place, file = weights_folder() / local_name, "model.safetensors"
    raise UserError(
        f"no weights of {local_name}: looked in {place} and the hub's cache, and {reason}. "
        f"Download {constants.ENDPOINT}/{repository}/resolve/main/{file} and put it at {place / file}."
    )


def _build_clipxgpt(name):
    """The vision tower inside a CLIPxGPT weight file."""
    from .clipxgpt import build_encoder

    return build_encoder(name)


BUILDERS = {**dict.fromkeys(CLIP_NAMES, _build_clip), "tinyvit": _build_tinyvit, "clipxgpt:": _build_clipxgpt}
