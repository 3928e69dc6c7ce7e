"""The mappers: what turns an image embedding into a prefix of the language model.

To add one, write a file here with a function build(config, width) and add an entry to MAPPERS. Options, help texts, error messages and
checkpoints read the registry. This file imports no torch, so that `train.py --help` stays fast.
"""

import dataclasses
import importlib


@dataclasses.dataclass(frozen=True)
class Mapper:
    """An entry of MAPPERS."""

    build: str  # "module:function"; the function takes a CaptionConfig and the language model's width E, and returns an nn.Module
    help: str  # completes the sentence "the mapper is ..." in --help
    shaped_by: tuple = ("prefix_length",)  # fields of CaptionConfig that shape its weights, besides clip_width
    takes_several: bool = False  # whether it reads several embeddings per image, [B, L, D]


MAPPERS = {
    "mlp": Mapper("models.mappers.mlp:build_mlp", "two linear layers with a tanh between them"),
    "transformer": Mapper(
        "models.mappers.transformer:build_transformer",
        "a transformer over the embedding and learned constants; best with a frozen language model",
        ("prefix_length", "clip_length", "num_layers"),
        takes_several=True,
    ),
    "encoder": Mapper(
        "models.mappers.encoder:build_encoder", "CLIPxGPT's transformer encoder and a linear layer", ("prefix_length", "num_layers")
    ),
    "linear": Mapper("models.mappers.mlp:build_linear", "one linear layer, as in some older published weights"),
}


def build_mapper(config, width):
    """Build the mapper that a config names.

    Args:
        config: CaptionConfig; its mapping_type is a key of MAPPERS.
        width: E, width of the language model's embeddings.

    Returns:
        nn.Module from [B, D] (or [B, L, D]) to [B, P, E] or [B, P·E].

    Raises:
        ValueError: unknown mapping_type; several embeddings per image for a mapper that reads one; a width that its heads do not divide.
    """
    if config.mapping_type not in MAPPERS:
        raise ValueError(f"mapping_type is {config.mapping_type!r}; expected one of {', '.join(MAPPERS)}")
    mapper = MAPPERS[config.mapping_type]
    if config.embeddings_per_image > 1 and not mapper.takes_several:
        able = " or ".join(name for name, one in MAPPERS.items() if one.takes_several)
        raise ValueError(
            f"these features hold {config.embeddings_per_image} embeddings per image, and the {config.mapping_type} mapper reads one; "
            f"take --mapping_type {able}, or features with one embedding per image"
        )
    module, function = mapper.build.split(":")
    return getattr(importlib.import_module(module), function)(config, width)
