"""The MLP mapper (arXiv:2111.09734, section 3.2), and the single linear layer of some older published weights.

B batch, D width of the embedding, E width of the language model, P prefix_length. Modules carry the published names.
"""

from torch import nn


class MLP(nn.Module):
    """Linear, Tanh, Linear, with biases, of widths D, E · P / 2 and E · P. It maps clip_embedding [B, D] to [B, E · P]."""

    def __init__(self, clip_width, prefix_width):
        super().__init__()
        hidden = prefix_width // 2
        self.model = nn.Sequential(nn.Linear(clip_width, hidden), nn.Tanh(), nn.Linear(hidden, prefix_width))

    def forward(self, clip_embedding):
        return self.model(clip_embedding)


def build_mlp(config, width):
    """Build the MLP for a CaptionConfig and a language model of this width."""
    return MLP(config.clip_width, width * config.prefix_length)


def build_linear(config, width):
    """Build the single linear layer from D to E · P that the published predict.py uses above ten prefix tokens (UPSTREAM 0)."""
    return nn.Linear(config.clip_width, width * config.prefix_length)
