"""CLIPxGPT's mapper: torch's own transformer encoder over the single embedding, then one linear layer.

B batch, D width of the embedding, E width of the language model, P prefix_length.
"""

from torch import nn

HEADS = 16  # as published by CLIPxGPT, small and large
FEED_FORWARD_RATIO = 4  # as published by CLIPxGPT


class EncoderMapper(nn.Module):
    """torch's own transformer encoder (post-norm, ReLU) over the embedding, then one Linear: CLIPxGPT's mapper.

    An embedding is a sequence of length one. Initialised as published: Kaiming normal weights, biases 0.
    It maps clip_embedding [B, D] to [B, E · P].
    """

    def __init__(self, clip_width, prefix_width, num_layers, heads, dropout):
        super().__init__()
        layer = nn.TransformerEncoderLayer(clip_width, heads, FEED_FORWARD_RATIO * clip_width, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.mapper = nn.Linear(clip_width, prefix_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, clip_embedding):
        return self.mapper(self.transformer_encoder(clip_embedding[:, None])[:, 0])  # [B, E · P]


def build_encoder(config, width):
    """Build the encoder mapper for a CaptionConfig and a language model of this width.

    Raises:
        ValueError: the width of the embeddings is not a multiple of the number of heads.
    """
    heads = HEADS if config.mapper_heads is None else config.mapper_heads
    if config.clip_width % heads:
        raise ValueError(f"the encoder mapper has {heads} heads; the embeddings' width {config.clip_width} is not a multiple of {heads}")
    return EncoderMapper(config.clip_width, width * config.prefix_length, config.num_layers, heads, config.mapper_dropout)
