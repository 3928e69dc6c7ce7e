"""Captioners trained on texts alone: captions stand in for their pictures, in the space that an encoder's two towers share.

Training sees embeddings of captions, with Gaussian noise that makes up for the gap between the two (CapDec, arXiv:2211.00575). Captioning
brings embeddings of pictures near those of texts: normalised, less the difference of the means where it was measured, and projected onto
a memory of texts where there is one (DeCap, arXiv:2303.03032). B pictures, D width of their embeddings, J width of the shared space, M
texts of a memory.
"""

import torch
from torch.nn.functional import normalize

from models.encoders.text import require_text_tower

NOISE_VARIANCE = 0.016  # CapDec's, per coordinate of a normalised embedding
TEMPERATURE = 1 / 100  # of the softmax over a memory, as DeCap's released code has it
NORM_TOLERANCE = 0.01  # half precision is far closer


def add_noise(embedding, variance):
    """Normalise embeddings, add Gaussian noise to every coordinate, and normalise again.

    Args:
        embedding: [B, J] float.
        variance: of the noise; 0 for none.

    Returns:
        [B, J], of L2 norm 1.
    """
    embedding = normalize(embedding, dim=-1)
    return normalize(embedding + variance**0.5 * torch.randn_like(embedding), dim=-1) if variance else embedding


def project_onto_memory(embedding, memory, temperature=TEMPERATURE):
    """Replace embeddings by means of the memory's, weighted by the softmax of cosine / temperature (DeCap, section 3.3).

    Args:
        embedding: [B, J], of L2 norm 1.
        memory: [M, J], of L2 norm 1.
        temperature: of the softmax.

    Returns:
        [B, J], of L2 norm 1.
    """
    weights = (embedding @ memory.T / temperature).softmax(dim=-1)  # [B, M]
    return normalize(weights @ memory, dim=-1)


def to_text_space(model, clip_embedding):
    """Bring embeddings of pictures to where the mapper of a captioner trained on texts expects its input.

    Args:
        model: ClipCaptionModel; others than those trained on texts take embeddings as they are.
        clip_embedding: [B, D], as the encoder gives them.

    Returns:
        [B, J] float32 of L2 norm 1, on the model's device; vectors of zeros stay zeros.
    """
    settings = model.config.text_training
    if settings is None:
        return clip_embedding
    shared = clip_embedding.float()
    if settings["picture_width"]:
        if model.tower is None:
            model.tower = require_text_tower(model.config.encoder, model.clip_device, "a captioner trained on its texts")
        shared = model.tower.project(shared)
    shared = normalize(shared.to(model.clip_device), dim=-1)
    if settings["modality_offset"]:
        shared = normalize(shared - torch.tensor(settings["modality_offset"], device=shared.device), dim=-1)
    return shared if model.memory is None else project_onto_memory(shared, model.memory.to(shared.device))


def unnormalized_row(embedding):
    """Find the first row of [N, J] whose L2 norm is not 1. Returns its number, or None."""
    wrong = (embedding.float().norm(dim=-1) - 1).abs() > NORM_TOLERANCE
    return int(wrong.nonzero()[0]) if wrong.any() else None
