"""What rebuilds a captioner: one dataclass, which `{prefix}.json` holds."""

import dataclasses
import functools

from models.mappers import MAPPERS
from models.tuning import TUNINGS

MOST_NESTED = 3  # configs of base models in one another
MOST_RETRIEVED = 100  # captions in a prompt


@dataclasses.dataclass
class CaptionConfig:
    """Everything that rebuilds a captioner and its input."""

    encoder: str | None  # name of the image encoder ("ViT-B/32"); None when a feature file did not say
    clip_width: int  # D
    prefix_length: int = 10  # P, tokens
    clip_length: int = 10  # K, tokens; the transformer mapper's only
    mapping_type: str = "mlp"
    num_layers: int = 8
    normalize_prefix: bool = False  # divide each embedding by its L2 norm
    gpt2_type: str = "gpt2"
    gpt_config: dict | None = None  # the language model's own config, so that a full checkpoint needs no look-up
    stop_token: str | None = None  # text; None means the tokenizer's end-of-text token
    tune: str = "full"  # what of the language model is trained: one of models.tuning.TUNINGS ("mapper": nothing)
    lora: dict | None = None  # rank, alpha, dropout and targets of the adapters
    freeze_mapper: bool = False  # the mapper is kept as it was
    embeddings_per_image: int = 1  # L; more than 1: features are [N, L, D]
    prompt: str | None = None  # text between prefix and caption; {base} in it stands for the base model's caption, {retrieved} for others
    retrieval: dict | None = None  # captions: how many {retrieved} stands for; datastore: its files at training, and their digest
    base: dict | None = None  # config of the base model as a dict, and the path and digest of its checkpoint
    pooling: str = "pooled"  # of the encoder; "none": every token, or every window of a sound
    audio: dict | None = None  # how sounds became the encoder's input (features.audio); None for pictures
    text_training: dict | None = None  # of one trained on texts alone: noise_variance, modality_offset, picture_width (models/texts.py)
    mapper_heads: int | None = None  # attention heads of the encoder mapper; None means 16
    mapper_dropout: float = 0.1  # of the encoder mapper, in training
    decoding_style: str | None = None  # "clipxgpt": the published loop of these weights (models/published/clipxgpt.py)


@functools.cache
def config_schema(required=True):
    """Build the schema of the "model" part of a config file.

    Args:
        required: whether encoder and width must be there; without them the fields are hints for a published file, and n_head may be one.

    Returns:
        pydantic.TypeAdapter of a dict.
    """
    from typing import Annotated as With
    from typing import Literal

    from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter
    from typing_extensions import NotRequired, Required, TypedDict

    def size(most):
        return With[StrictInt, Field(ge=1, le=most)]

    def between(least, most):
        return With[StrictFloat | StrictInt, Field(ge=least, le=most, allow_inf_nan=False)]

    text = With[StrictStr, Field(max_length=4096, pattern=r"^[^\x00]*$")]
    name = With[StrictStr, Field(min_length=1, max_length=4096, pattern=r"^[^\x00\r\n]+$")]
    lora = TypedDict("lora", {
        "rank": size(10_000), "alpha": between(0, 1e6), "dropout": between(0, 0.999),
        "targets": name | With[list[name], Field(min_length=1)],
    })  # fmt: skip
    audio = TypedDict("audio", {
        "sample_rate": NotRequired[size(10**6)], "spectrogram": NotRequired[Literal["mel", "published", "waveform"]],
        "windows": NotRequired[dict[name, size(10**9)] | None],
    })  # fmt: skip
    audio.__pydantic_config__ = {"extra": "allow"}
    retrieval = TypedDict("retrieval", {"captions": size(MOST_RETRIEVED), "datastore": list[text], "digest": text})
    text_training = TypedDict("text_training", {
        "noise_variance": between(0, 1e6), "modality_offset": list[between(-2, 2)] | None, "picture_width": size(2**20) | None,
    })  # fmt: skip
    language_model = TypedDict("language_model", {"model_type": Required[name]})
    language_model.__pydantic_config__ = {"extra": "allow"}
    base = type(None)
    for _ in range(MOST_NESTED):
        fields = {
            "prefix_length": size(10_000), "clip_length": size(10_000), "mapping_type": Literal[tuple(MAPPERS)], "num_layers": size(1000),
            "normalize_prefix": StrictBool, "gpt2_type": name, "gpt_config": language_model | None, "stop_token": name | None,
            "tune": Literal[tuple(TUNINGS)], "lora": lora | None, "freeze_mapper": StrictBool, "embeddings_per_image": size(100_000),
            "prompt": text | None, "base": base | None, "pooling": Literal["pooled", "none"], "audio": audio | None,
            "retrieval": retrieval | None, "text_training": text_training | None, "mapper_heads": size(1024) | None,
            "mapper_dropout": between(0, 0.999), "decoding_style": Literal["clipxgpt"] | None,
        }  # fmt: skip
        fields = {field: NotRequired[kind] for field, kind in fields.items()}
        main = {"encoder": name | None, "clip_width": size(2**20)}
        base = TypedDict("base", main | fields | {"path": NotRequired[text], "digest": NotRequired[text]})
        base.__pydantic_config__ = {"extra": "forbid"}
    if required:
        schema = TypedDict("model", main | fields)
    else:
        schema = TypedDict("model", fields | {"encoder": NotRequired[name | None], "n_head": NotRequired[size(1024)]})
    schema.__pydantic_config__ = {"extra": "forbid"}
    return TypeAdapter(TypedDict("config", {"model": schema}))
