"""open_clip's models: open_clip:ARCH/PRETRAINED, or a folder with open_clip_config.json."""

import os
from pathlib import Path

from common import UserError
from models.encoders.encoder import finish_tower
from models.encoders.preprocess import Preprocess
from models.weights import NOT_WEIGHTS, find_weights, first_line, hub_file, load_from_library, pick_file, weights_folder

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


def build_openclip(name, pooling):
    """open_clip:ARCH/PRETRAINED → Tower, D wide as encode_image gives it, not normalised; the vision tower's own tokens without pooling.

    PRETRAINED: a tag of open_clip, looked up at data/weights/ARCH/TAG/, data/weights/ARCH/TAG.safetensors and .pt, in the library's cache,
    then on the hub; or the path of a weight file. open_clip:FOLDER takes a folder as open_clip publishes on the hub.
    """
    import open_clip
    import torch

    model, _ = load_openclip(name)
    visual = model.visual
    told = visual.preprocess_cfg
    size = told["size"]
    size = size if isinstance(size, int) or size[0] != size[1] else size[0]
    size = size if isinstance(size, int) else list(size)
    cropped = told["resize_mode"] == "shortest"
    preprocessing = {
        "image_size": size,
        "resize": size,
        "interpolation": told["interpolation"],
        "crop": "center" if cropped else told["resize_mode"],
        "mean": list(told["mean"]),
        "std": list(told["std"]),
    }

    class ImageSide(torch.nn.Module):
        """What encode_image gives: [B, D]; [B, L, D] without pooling where the tower has tokens."""

        def __init__(self):
            super().__init__()
            self.visual = visual

        def forward(self, pictures):
            if pooling == "none" and hasattr(visual, "trunk"):
                return visual.trunk.forward_features(pictures)  # one of timm's models
            given = visual(pictures)
            if not isinstance(given, tuple):
                return given
            return given[1] if pooling == "none" else given[0]

    if pooling == "none" and hasattr(visual, "output_tokens"):
        visual.output_tokens = True
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**told), is_train=False)
    short_side = (size if isinstance(size, int) else min(size)) if cropped else None
    return finish_tower(name, ImageSide(), Preprocess(transform, short_side), preprocessing, pooling)


def load_openclip(name):
    """A name as build_openclip takes → open_clip's model, both towers, eval mode; the name its tokenizer goes by.

    Raises UserError for an unknown architecture or tag, and for weights that are out of reach or of another model.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    rest = name.removeprefix("open_clip:")
    folder = Path(rest).expanduser()
    if (folder / "open_clip_config.json").is_file():
        pick_file(folder, WEIGHT_FILES)  # open_clip itself goes on with random weights
        return _create(f"local-dir:{folder}", folder), f"local-dir:{folder}"
    arch, _, pretrained = rest.partition("/")
    if open_clip.get_model_config(arch) is None:
        import difflib

        near = difflib.get_close_matches(arch, open_clip.list_models(), 3, 0.4)
        raise UserError(
            f"open_clip has no model {arch}. Near: {', '.join(near) or 'none'}; all: open_clip.list_models(). "
            "Write open_clip:ARCH/PRETRAINED, or open_clip:FOLDER with open_clip_config.json."
        )
    tags = list_pretrained_tags_by_model(arch)
    path, tag = Path(pretrained).expanduser(), get_pretrained_cfg(arch, pretrained)
    if pretrained and path.is_file():
        file = path
    elif not tag:
        raise UserError(
            f"{name} names no weights: {pretrained or 'nothing after the architecture'} is neither a file nor one of open_clip's tags "
            f"for {arch} ({', '.join(tags[:6]) or 'none'}{' …' * (len(tags) > 6)}). Write open_clip:{arch}/TAG or open_clip:{arch}/PATH."
        )
    else:
        file = _find_tag(arch, pretrained, tag, name)
    # A tag says more than where its weights are: how its pictures were prepared, and which activation it was trained with.
    told = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}
    return _create(arch, file, pretrained=str(file), force_preprocess_cfg=told, force_quick_gelu=bool(tag.get("quick_gelu"))), arch


def _find_tag(arch, tag, config, name):
    """The weight file of a tag of open_clip's: data/weights/, the cache, the hub."""
    place = weights_folder() / arch / tag
    found = find_weights(f"{arch}/{tag}", f"{arch}/{tag}.safetensors", f"{arch}/{tag}.pt")
    if found is not None:
        return pick_file(found, WEIGHT_FILES)
    repository, file = os.path.split(config.get("hf_hub", ""))
    if repository:
        alternative = (str(Path(file).with_suffix(".safetensors")),) if file else ()
        return hub_file(repository, (*alternative, file) if file else WEIGHT_FILES[:2], name, place)
    address = config.get("url", "")
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(address)
    if cached.is_file():
        return cached
    raise UserError(
        f"no weights of {name}: looked in {place} and {cached.parent}. Download {address} and put it at {place}{Path(address).suffix}."
    )


def _create(source, file, **options):
    import open_clip

    try:
        return open_clip.create_model(source, pretrained_text=False, **options).float().eval()
    except NOT_WEIGHTS as error:
        details = " ".join(str(error).split())[:160] or first_line(error)
        raise UserError(
            f"{file} does not hold weights of {source}, vision and text tower ({details}). Give the file of that architecture."
        ) from error


def load_openclip_tokenizer(source):
    """The second of what load_openclip gave → a callable: list of texts → int64 [N, T], truncated to the context."""
    import open_clip

    config = open_clip.get_model_config(source)["text_cfg"]
    if source.startswith("local-dir:") or not config.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(source)

    def load(folder, local_files_only):
        return open_clip.tokenizer.HFTokenizer(
            folder, context_length=config.get("context_length", 77), tokenizer_mode=config.get("tokenizer_mode"),
            local_files_only=local_files_only, **config.get("tokenizer_kwargs", {}),
        )  # fmt: skip

    return load_from_library(load, config["hf_tokenizer_name"], "tokenizer", "tokenizer.json and tokenizer_config.json")
