"""What an encoder's name says, and which encoder a file without a name comes from."""

import os
from pathlib import Path

# The encoder that embeddings of a width most likely come from, in published files, which do not name it.
ENCODER_OF_WIDTH = {512: "ViT-B/32", 640: "RN50x4", 576: "tinyvit"}
UNMISTAKABLE_WIDTHS = (640, 576)  # no other encoder of the published systems has these
# CLIPxGPT's files: vision towers of transformers, before their projection.
CLIPXGPT_ENCODERS = {768: "hf:openai/clip-vit-base-patch32", 1024: "hf:openai/clip-vit-large-patch14"}
# The names that published feature files carry, longer ones before those they begin with.
ENCODERS_IN_FILE_NAMES = (
    "ViT-L/14@336px", "ViT-L/14", "ViT-B/32", "ViT-B/16", "RN50x64", "RN50x16", "RN50x4", "RN101", "RN50", "tinyvit",
)  # fmt: skip


def file_stem(name):
    """Turn an encoder's name into a part of a file name.

    As published, "ViT-B/32" becomes "ViT-B_32", "hf:openai/clip" "hf_openai_clip"; a path, also after a family's name, becomes its stem.
    """

    def stem(path):
        path = Path(os.path.abspath(path))
        return path.name if path.is_dir() else path.stem

    if Path(name).exists():
        return stem(name)
    family, _, rest = name.partition(":")
    before, _, path = rest.partition("/")
    if family.isidentifier() and rest and Path(rest).exists():
        return f"{family}_{stem(rest)}"
    if family.isidentifier() and path and Path(path).is_file():  # open_clip:ARCH/PATH
        return f"{family}_{before.replace(':', '_')}_{stem(path)}"
    return name.replace("/", "_").replace(":", "_")


def guess_encoder(path, width):
    """Guess the encoder of a feature file that does not name it.

    Args:
        path: the file; published files carry the encoder in their names.
        width: D, width of an embedding.

    Returns:
        The encoder's name, or None where neither the file's name nor the width settles it.
    """
    for name in ENCODERS_IN_FILE_NAMES:
        if file_stem(name) in Path(path).name:
            return name
    return ENCODER_OF_WIDTH[width] if width in UNMISTAKABLE_WIDTHS else None
