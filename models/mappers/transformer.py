"""The transformer mapper (arXiv:2111.09734, section 3.2).

B batch, D width of the embedding, E width of the language model, P prefix_length, K clip_length, L embeddings of one image. Modules and
parameters carry the published names, so that published weights load without renaming.
"""

import torch
from torch import nn
from torch.nn import functional as F

HEADS = 8  # as published; the number of heads cannot be read off the weights
MLP_RATIO = 2.0  # as published


class MapperAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values without bias, the output projection with one."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """Attend over x [B, length, E]; mask is bool [B, 1, 1, length], true where a vector may be attended to."""
        batch, length, width = x.shape
        keys, values = self.to_keys_values(x).chunk(2, dim=-1)  # each [B, length, E]; keys come first
        queries, keys, values = (
            t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in (self.to_queries(x), keys, values)
        )  # each [B, heads, K + P, E / heads]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)  # [B, heads, length, E / heads]
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class MapperMLP(nn.Module):
    """The feed-forward half of a mapper layer: from E to 2 E to E, with ReLU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class MapperLayer(nn.Module):
    """One pre-norm transformer block: no dropout, no positions."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = MapperAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MapperMLP(width, int(width * mlp_ratio))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class MapperLayers(nn.Module):
    """The stack of layers, without a final norm (as published)."""

    def __init__(self, width, heads, num_layers, mlp_ratio):
        super().__init__()
        self.layers = nn.ModuleList(MapperLayer(width, heads, mlp_ratio) for _ in range(num_layers))

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TransformerMapper(nn.Module):
    """A transformer over the embedding, expanded to K vectors, and P learned constants; its last P outputs are the prefix.

    It maps clip_embedding [B, D] to [B, P, E]. With several embeddings per image, [B, L, D], each of them is projected to width E in place
    of the expansion. A vector of zeros means "no vector here" and is not attended to.
    """

    def __init__(self, clip_width, width, prefix_length, clip_length, num_layers, embeddings_per_image=1):
        super().__init__()
        self.reads_sequence = embeddings_per_image > 1
        self.clip_length = clip_length
        self.linear = nn.Linear(clip_width, width if self.reads_sequence else clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.transformer = MapperLayers(width, HEADS, num_layers, MLP_RATIO)

    def forward(self, clip_embedding):
        batch = clip_embedding.shape[0]
        constants = self.prefix_const.expand(batch, -1, -1)  # [B, P, E]
        mask = None
        if self.reads_sequence:
            clip_tokens = self.linear(clip_embedding)  # [B, L, E]
            present = (clip_embedding != 0).any(-1)  # [B, L]
            mask = F.pad(present, (0, constants.shape[1]), value=True)[:, None, None]  # [B, 1, 1, L + P]
        else:
            clip_tokens = self.linear(clip_embedding).view(batch, self.clip_length, -1)  # [B, K, E]
        mixed = self.transformer(torch.cat([clip_tokens, constants.to(clip_tokens.dtype)], dim=1), mask)  # [B, K + P, E]
        return mixed[:, clip_tokens.shape[1] :]  # [B, P, E]


def build_transformer(config, width):
    """Build the transformer for a CaptionConfig and a language model of this width.

    Raises:
        ValueError: the width is not a multiple of the 8 published heads.
    """
    if width % HEADS:
        raise ValueError(f"the transformer mapper has {HEADS} heads; the language model's width {width} is not a multiple of {HEADS}")
    return TransformerMapper(
        config.clip_width, width, config.prefix_length, config.clip_length, config.num_layers, config.embeddings_per_image
    )
