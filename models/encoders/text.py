"""Text towers: how well a text fits a stored embedding, where the encoder was trained together with one.

Letters: N texts or embeddings, D width of an embedding, J width of the space that images (or sounds) and texts share.

    tower = load_text_tower("ViT-B/32")
    cosines = tower.project(clip_embedding) @ tower.encode_text(captions).T          [N, N]
"""

import dataclasses
import os

from common import UserError
from models.encoders import find_family, loading, pick_device

TEXTS_TOGETHER = 256  # texts encoded in one batch
TEXT_PREFIX = "A photo depicts "  # CLIPScore, arXiv:2104.08718, section 3.1: put before every caption


@dataclasses.dataclass
class TextTower:
    """The text side of an encoder, float32 in eval mode.

    Attributes:
        name: the encoder's, as given to load_text_tower.
        modality: the encoder's, "image" or "audio".
        device: torch.device.
        width: J.
        parts: models.encoders.encoder.TextParts.
    """

    name: str
    modality: str
    device: object
    width: int
    parts: object

    def encode_text(self, texts):
        """Encode texts; those longer than the context are truncated.

        Args:
            texts: N texts.

        Returns:
            [N, J] float32, L2-normalized, on the tower's device.
        """
        import torch

        texts, rows = list(texts), [torch.empty(0, self.width, device=self.device)]
        with torch.no_grad():
            for start in range(0, len(texts), TEXTS_TOGETHER):
                tokens = self.parts.tokenize(texts[start : start + TEXTS_TOGETHER])
                given = self.parts.module(**{key: value.to(self.device) for key, value in tokens.items()})
                rows.append(torch.nn.functional.normalize(given.float(), dim=-1))
        return torch.cat(rows)

    def project(self, clip_embedding):
        """Carry stored embeddings into the shared space.

        Args:
            clip_embedding: [N, D], any float type.

        Returns:
            [N, J] float32, L2-normalized, on the tower's device.

        Raises:
            UserError: another width than D.
        """
        import torch

        projection = self.parts.projection
        expected = self.width if projection is None else projection.in_features
        if clip_embedding.dim() != 2 or clip_embedding.shape[1] != expected:
            raise UserError(f"embeddings of shape {tuple(clip_embedding.shape)}; those of {self.name} are [N, {expected}], pooled.")
        with torch.no_grad():
            shared = clip_embedding.to(self.device).float()
            return torch.nn.functional.normalize(shared if projection is None else projection(shared), dim=-1)


def load_text_tower(name, device="cpu"):
    """Load the text tower of an encoder's name or path, as load_encoder takes it.

    Returns:
        TextTower, or None where that encoder has no text side (tinyvit, timm:, DINO).

    Raises:
        UserError: as load_encoder does, or the encoder had a text tower but these weights lack it.
    """
    name = os.fspath(name)
    family = find_family(name)
    device = pick_device(device)
    with loading(name):
        parts = family.load_text(name) if family.load_text else None
    if parts is None:
        return None
    parts.module.float().eval().requires_grad_(False)
    with loading(name):
        try:
            width = parts.module(**parts.tokenize(["a"])).shape[1]
        except IndexError as error:
            raise UserError(f"the tokenizer of {name} knows more tokens than its text tower: they do not belong together.") from error
    if parts.projection is not None:
        parts.projection.to(device)
    parts.module.to(device)
    return TextTower(name, family.modality, device, width, parts)


def require_text_tower(name, device, wish):
    """Load the text tower of an encoder that must have one.

    Args:
        name: the encoder's name or path.
        device: as load_encoder takes it.
        wish: what wants the tower, for the error.

    Raises:
        UserError: the encoder has no text tower.
    """
    tower = load_text_tower(name, device)
    if tower is None:
        raise UserError(f"{name} has no text tower, which {wish} needs. Take a CLIP's features and checkpoint, or leave it out.")
    return tower


def load_projection(name, device="cpu"):
    """Load what carries an encoder's stored embeddings into the space of its texts: the `project` of its text tower."""
    return require_text_tower(name, device, "a comparison of images with texts").project


def embed_captions(tower, captions):
    """Embed captions in the space they share with images, with CLIPScore's words before them; those of sounds stand alone.

    Args:
        tower: TextTower.
        captions: N texts.

    Returns:
        [N, J] float32, L2-normalized, on the CPU.
    """
    import torch

    prefix = "" if tower.modality == "audio" else TEXT_PREFIX
    batches = [captions[start : start + TEXTS_TOGETHER] for start in range(0, len(captions), TEXTS_TOGETHER)]
    rows = [tower.encode_text([prefix + caption for caption in batch]).cpu() for batch in batches]
    return torch.cat([torch.empty(0, tower.width), *rows])
