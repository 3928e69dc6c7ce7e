"""What rebuilds a captioner: one dataclass, which `{prefix}.json` holds."""

import dataclasses


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
    prompt: str | None = None  # text between prefix and caption; {base} in it stands for the base model's caption
    base: dict | None = None  # config of the base model as a dict, and the path and digest of its checkpoint
    pooling: str = "pooled"  # of the encoder; "none": every token, or every window of a sound
    audio: dict | None = None  # how sounds became the encoder's input (features.audio); None for pictures
    mapper_heads: int | None = None  # attention heads of the encoder mapper; None means 16
    mapper_dropout: float = 0.1  # of the encoder mapper, in training
    decoding_style: str | None = None  # "clipxgpt": the published loop of these weights (models/published/clipxgpt.py)
