"""open_clip's models: open_clip:ARCH/PRETRAINED, or a folder with open_clip_config.json."""

import difflib
import os
from pathlib import Path

from common import UserError
from models.encoders.configs import read_config
from models.encoders.encoder import Family, TextParts, call_module, image_encoder
from models.encoders.preprocess import Preprocess
from models.tensors import READ_ERRORS, refuse_compressed
from models.weights import find_weights, first_line, hub_file, load_from_library, pick_file, refuse_oversized, weights_folder

TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "language"}
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


def build(name, pooling):
    """Build the vision tower of open_clip:ARCH/PRETRAINED or open_clip:FOLDER, as encode_image gives it, not normalized.

    PRETRAINED is one of open_clip's tags, or the path of a weight file. A tag's weights are looked up at data/weights/ARCH/TAG/,
    data/weights/ARCH/TAG.safetensors and .pt, in the library's cache, then on the hub. FOLDER is laid out as open_clip does on the hub.
    """
    import open_clip
    from open_clip.timm_model import TimmModel

    visual = load_openclip(name)[0].visual
    settings = visual.preprocess_cfg
    size = settings["size"]
    size = size if isinstance(size, int) else size[0] if size[0] == size[1] else list(size)
    cropped = settings["resize_mode"] == "shortest"
    preprocessing = {
        "image_size": size,
        "resize": size,
        "interpolation": settings["interpolation"],
        "crop": "center" if cropped else settings["resize_mode"],
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
    }

    def encode(visual, images):
        if pooling == "none" and isinstance(visual, TimmModel):
            return visual.trunk.forward_features(images)
        given = visual(images)
        if isinstance(given, tuple):  # pooled, tokens
            return given[1] if pooling == "none" else given[0]
        return given

    if pooling == "none":
        visual.output_tokens = True  # read by open_clip's vision transformers, ignored by its other towers
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=False)
    short_side = (size if isinstance(size, int) else min(size)) if cropped else None
    return image_encoder(name, call_module(encode, visual, "visual"), Preprocess(transform, short_side), preprocessing, pooling)


def load_openclip(name):
    """Load both towers of a name as `build` takes.

    Returns:
        open_clip's model in eval mode, and the name that its tokenizer goes by.

    Raises:
        UserError: unknown architecture or tag; the weights are not available, or belong to another model.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    rest = name.removeprefix("open_clip:")
    folder = Path(rest).expanduser()
    if (folder / "open_clip_config.json").is_file():
        read_config(folder / "open_clip_config.json")
        return _create(f"local-dir:{folder}", pick_file(folder, WEIGHT_FILES)), f"local-dir:{folder}"
    arch, _, pretrained = rest.partition("/")
    if open_clip.get_model_config(arch) is None:
        near = difflib.get_close_matches(arch, open_clip.list_models(), 3, 0.4)
        raise UserError(
            f"open_clip has no model {arch}. Near: {', '.join(near) or 'none'}; all: open_clip.list_models(). "
            "Write open_clip:ARCH/PRETRAINED, or open_clip:FOLDER with open_clip_config.json."
        )
    path, tag = Path(pretrained).expanduser(), get_pretrained_cfg(arch, pretrained)
    if pretrained and path.is_file():
        file = path
    elif tag:
        file = _find_tag(arch, pretrained, tag, name)
    else:
        tags = list_pretrained_tags_by_model(arch)
        raise UserError(
            f"{name} names no weights: {pretrained or 'nothing after the architecture'} is neither a file nor one of open_clip's tags "
            f"for {arch} ({', '.join(tags[:6]) or 'none'}{', ...' * (len(tags) > 6)}). Write open_clip:{arch}/TAG or open_clip:{arch}/PATH."
        )
    # A tag also says how its images were preprocessed, and which activation it was trained with.
    settings = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}
    return _create(arch, file, force_preprocess_cfg=settings, force_quick_gelu=bool(tag.get("quick_gelu"))), arch


def _find_tag(arch, tag, config, name):
    """Find the weight file of one of open_clip's tags: data/weights/, the cache, the hub."""
    place = weights_folder() / arch / tag
    found = find_weights(f"{arch}/{tag}", f"{arch}/{tag}.safetensors", f"{arch}/{tag}.pt")
    if found is not None:
        return pick_file(found, WEIGHT_FILES)
    repository, file = os.path.split(config.get("hf_hub", ""))
    if repository:
        return hub_file(repository, (str(Path(file).with_suffix(".safetensors")), file) if file else WEIGHT_FILES[:2], name, place)
    address = config.get("url", "")
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(address)
    if cached.is_file():
        return cached
    raise UserError(
        f"no weights of {name}: looked in {place} and {cached.parent}. Download {address} and put it at {place}{Path(address).suffix}."
    )


def _create(source, file, **options):
    """Make open_clip's model and fill it from a weight file."""
    import open_clip

    def make(device):
        return open_clip.create_model(source, load_weights=False, pretrained_text=False, device=device, **options)

    try:
        refuse_compressed(file)
        refuse_oversized(lambda: make("meta"), os.path.getsize(file))
        model = make("cpu")
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
        return model.float().eval()
    except UserError:
        raise
    except READ_ERRORS as error:
        details = " ".join(str(error).split())[:160] or first_line(error)
        raise UserError(
            f"{file} does not hold weights of {source}, vision and text tower ({details}). Give the file of that architecture."
        ) from error


def load_text(name):
    """Load the text tower of an encoder that `build` takes, as TextParts."""
    model, source = load_openclip(name)
    tokenizer = _load_tokenizer(source)
    model.visual = None

    def tokenize(texts):
        return {"text": tokenizer(texts)}

    return TextParts(tokenize, call_module(lambda model, text: model.encode_text(text), model))


def _load_tokenizer(source):
    """Load a tokenizer by the second value of load_openclip: a callable from a list of texts to int64 [N, T]."""
    import open_clip

    folder = source.removeprefix("local-dir:")
    whole = open_clip.get_model_config(source) if folder == source else read_config(Path(folder) / "open_clip_config.json")["model_cfg"]
    config = whole["text_cfg"]
    more = config.get("tokenizer_kwargs", {})
    if not isinstance(more, dict) or not set(more) <= TOKENIZER_SETTINGS:  # others reach transformers, "trust_remote_code" among them
        raise UserError(f"{source} has tokenizer_kwargs {more}; expected some of {', '.join(sorted(TOKENIZER_SETTINGS))}.")
    if source.startswith("local-dir:") or not config.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(source)

    def load(folder, local_files_only):
        return open_clip.tokenizer.HFTokenizer(
            folder, context_length=config.get("context_length", 77), tokenizer_mode=config.get("tokenizer_mode"),
            local_files_only=local_files_only, **more,
        )  # fmt: skip

    return load_from_library(load, config["hf_tokenizer_name"], "tokenizer", "tokenizer.json and tokenizer_config.json")


FAMILY = Family(
    pattern="open_clip:ARCH/PRETRAINED",
    about="open_clip's models by architecture and tag, architecture and weight file, or folder; `encode_image`",
    width="the model's; ViT-B-32 512",
    build=build,
    load_text=load_text,
)
