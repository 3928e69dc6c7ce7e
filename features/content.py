"""What a run learns from, wherever it was stored: embeddings with their captions; several files joined. N images, D width, C captions."""

import dataclasses
import hashlib
import re

import numpy as np

from common import UserError
from features.captions import LazyCaptions, rows_of
from features.embeddings import MappedEmbeddings, byte_view


@dataclasses.dataclass(frozen=True)
class EmbeddingKind:
    """What embeddings must have in common to be used together.

    Attributes:
        encoder: name of the encoder; None where it is not known.
        width: D.
        several: whether an image has several embeddings, [N, L, D].
        normalized: whether they are divided by their L2 norm; None where both are accepted.
        audio: how sounds became the encoder's input (features.audio); None for pictures.
        are_texts: whether the embeddings are those of captions, by the encoder's text tower (parse_text.py).
    """

    encoder: str | None
    width: int
    several: bool = False
    normalized: bool | None = False
    audio: dict | None = None
    are_texts: bool = False


def checkpoint_kind(config, encoder=None):
    """Describe the embeddings that a checkpoint captions: of pictures or sounds, also where it was trained on texts.

    Args:
        config: models.config.CaptionConfig.
        encoder: name of its encoder, where the user or the weights say it better than the config.
    """
    # A model that normalises accepts both kinds: dividing by the norm twice changes nothing.
    normalized = None if config.normalize_prefix else False
    width = (config.text_training or {}).get("picture_width") or config.clip_width
    return EmbeddingKind(encoder or config.encoder, width, config.embeddings_per_image > 1, normalized, config.audio)


def text_kind(config):
    """Describe the texts that a checkpoint was trained on; config: models.config.CaptionConfig with text_training."""
    return EmbeddingKind(config.encoder, config.clip_width, False, None, config.audio, are_texts=True)


def check_compatible(found, expected, found_name, expected_name):
    """Check that embeddings are what a checkpoint or another file needs.

    Args:
        found: EmbeddingKind.
        expected: EmbeddingKind of the checkpoint or the other file.
        found_name: what `found` is called in an error.
        expected_name: what `expected` is called in an error.

    Raises:
        UserError: they differ in width, encoder, number of embeddings per image, normalization or sound settings.
    """
    again = f"Parse again with --clip_model_type {expected.encoder}" if expected.encoder else "Parse again with the same encoder"
    wrong = None
    if found.are_texts != expected.are_texts:
        words = {True: "embeddings of texts", False: f"embeddings of {'sounds' if expected.audio or found.audio else 'pictures'}"}
        wrong = (words[found.are_texts], words[expected.are_texts])
        again = f"Parse with {'parse_text.py' if expected.are_texts else 'parse_coco.py or the like'}"
    elif found.width != expected.width:
        wrong = (f"{found.width}-wide embeddings ({found.encoder or 'encoder unknown'})",
                 f"{expected.width}-wide ones ({expected.encoder or 'encoder unknown'})")  # fmt: skip
    elif found.encoder and expected.encoder and _plain_encoder(found.encoder) != _plain_encoder(expected.encoder):
        wrong = (f"embeddings of {found.encoder}", f"those of {expected.encoder}, which are as wide but mean something else")
    elif found.several != expected.several:
        words = {True: "several embeddings per image (--pooling none)", False: "one embedding per image (--pooling pooled)"}
        wrong, again = (words[found.several], words[expected.several]), "Parse again with that --pooling"
    elif expected.normalized is not None and found.normalized is not None and found.normalized != expected.normalized:
        words = {True: "normalised embeddings", False: "unnormalised ones, as the encoder gives them"}
        wrong, again = (words[found.normalized], words[expected.normalized]), "Make the features again in the same way"
    elif (found.audio or expected.audio) and not _same_sounds(found.audio, expected.audio):
        wrong, again = _sound_difference(found.audio, expected.audio), "Parse again with the same --spectrogram"
    if wrong:
        raise UserError(f"{found_name} holds {wrong[0]}; {expected_name} needs {wrong[1]}. {again}, or use another file or checkpoint.")


def _plain_encoder(name):
    """Reduce an encoder's name to what its spellings share: "data/weights/ViT-B-32.pt" and "ViT-B/32" are one encoder."""
    return re.sub(r"[/:_@]", "-", re.sub(r"^(.*[/\\])?([^/\\]+)\.(pt|pth|safetensors)$", r"\2", name)).lower()


def _same_sounds(a, b):
    """Whether two sound settings agree, as far as both give a fact."""
    return bool(a) == bool(b) and all(a[key] == b[key] for key in a.keys() & b.keys())


def _sound_difference(found, expected):
    """Describe how two sound settings differ."""
    if not found or not expected:
        words = {True: "embeddings of sounds", False: "embeddings of pictures"}
        return words[bool(found)], words[bool(expected)]
    key = next(key for key in sorted(found.keys() & expected.keys()) if found[key] != expected[key])
    return f"sounds under different settings ({key} {found[key]})", f"{key} {expected[key]}"


@dataclasses.dataclass
class Features:
    """What a feature file or directory holds. L: embeddings per image, where there are several; a vector of zeros means none.

    Attributes:
        clip_embedding: tensor [N, D] or [N, L, D], dtype as stored; of a directory a MappedEmbeddings, indexed like a tensor.
        captions: list of dicts with image_id, caption and clip_embedding (the row), and perhaps more; of a directory a LazyCaptions.
        meta: dict; of published files only an encoder, where the width or the file name tells it.
    """

    clip_embedding: object
    captions: list
    meta: dict

    @property
    def kind(self):
        """What these embeddings are: EmbeddingKind."""
        meta = self.meta
        audio = meta.get("audio") if isinstance(meta.get("audio"), dict) else None
        several = len(self.clip_embedding.shape) == 3 and self.embeddings_per_image > 1
        are_texts = meta.get("modality") == "text"
        return EmbeddingKind(meta.get("encoder"), self.width, several, bool(meta.get("normalized")), audio, are_texts)

    @property
    def image_kind(self):
        """What embeddings of images go with these: the same kind, or of texts the EmbeddingKind that their encoder gives for images."""
        if not self.kind.are_texts:
            return self.kind
        return dataclasses.replace(self.kind, width=self.meta.get("picture_width") or self.width, normalized=None, are_texts=False)

    @property
    def width(self):
        """D, the width of an embedding."""
        return self.clip_embedding.shape[-1]

    @property
    def embeddings_per_image(self):
        """L; 1 for [N, D]."""
        return self.clip_embedding.shape[1] if len(self.clip_embedding.shape) == 3 else 1

    @property
    def caption_rows(self):
        """The row of each caption: int64 [C]."""
        return rows_of(self.captions)

    @property
    def texts(self):
        """The captions' texts: a sequence of str, whose slices are lists."""
        return [caption["caption"] for caption in self.captions] if isinstance(self.captions, list) else self.captions.texts

    def image_ids(self):
        """The image_id of each caption: an iterator."""
        return (caption["image_id"] for caption in self.captions) if isinstance(self.captions, list) else self.captions.image_ids()

    def digest(self):
        """Return a short name for the content: SHA-256 over all embeddings, rows and texts, 16 hexadecimal digits.

        This reads a directory once from end to end. Its digest differs from that of a .pkl with the same content.
        """
        if isinstance(self.clip_embedding, MappedEmbeddings):
            digest = hashlib.sha256(self.clip_embedding.digest())
        else:
            digest = hashlib.sha256(byte_view(self.clip_embedding))
        digest.update(self.caption_rows.tobytes())
        for number, text in enumerate(self.texts):
            digest.update(("\0" * (number > 0) + text).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def group_by_image(features):
    """Let captions of the same image share one row, as packing needs, where a published file has a row per caption.

    Rows are joined only where image_id is the same and the embeddings are equal bit for bit. Returns Features.
    """
    rows = features.caption_rows
    if len(np.unique(rows)) < len(rows):
        return features
    # Hashes first: of three million images, only those whose id occurs twice are looked at.
    hashes = np.fromiter((hash(str(image_id)) for image_id in features.image_ids()), np.int64, len(rows))
    _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = times[which] > 1
    if not repeated.any():
        return features
    first, same_as = {}, np.arange(len(rows))  # the first caption with this picture
    for number in np.flatnonzero(repeated):
        embedding = byte_view(features.clip_embedding[int(rows[number])]).tobytes()
        key = (str(features.captions[int(number)]["image_id"]), hashlib.blake2b(embedding, digest_size=16).digest())
        same_as[number] = first.setdefault(key, number)
    kept = np.flatnonzero(same_as == np.arange(len(rows)))
    if len(kept) == len(rows):
        return features
    new_rows = np.searchsorted(kept, same_as)
    return Features(_select_rows(features.clip_embedding, rows[kept]), _with_rows(features.captions, new_rows), features.meta)


def join_features(several, names):
    """Join feature files, such as those of train and restval.

    Args:
        several: list of Features.
        names: what each is called in an error.

    Returns:
        Features with the meta of the first.

    Raises:
        UserError: their embeddings do not go together (check_compatible), or have different numbers per image.
    """
    import torch

    first = several[0]
    for other, name in zip(several[1:], names[1:]):
        check_compatible(other.kind, first.kind, name, names[0])
        shapes = [list(features.clip_embedding.shape[1:]) for features in (other, first)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} holds {shapes[0]} numbers per image, {names[0]} {shapes[1]}. Parse one of them again.")
    if len(several) == 1:
        return first
    starts = np.cumsum([0, *(len(features.clip_embedding) for features in several)]).tolist()
    lists = [features.captions for features in several]
    embeddings = [features.clip_embedding for features in several]
    if any(isinstance(captions, LazyCaptions) for captions in lists):
        captions = LazyCaptions.join(lists, starts)
    else:
        moved = zip(lists, starts)
        captions = [{**caption, "clip_embedding": caption["clip_embedding"] + start} for some, start in moved for caption in some]
    mapped = any(isinstance(embedding, MappedEmbeddings) for embedding in embeddings)
    return Features(MappedEmbeddings.join(embeddings) if mapped else torch.cat(embeddings), captions, first.meta)


def drop_empty_captions(features):
    """Leave out captions that are empty or blank. Returns Features, and how many were left out."""
    kept = np.flatnonzero(np.fromiter((bool(text.strip()) for text in features.texts), bool, len(features.captions)))
    dropped = len(features.captions) - len(kept)
    if not dropped:
        return features, 0
    captions = features.captions
    captions = captions.select(kept) if isinstance(captions, LazyCaptions) else [captions[number] for number in kept]
    return Features(features.clip_embedding, captions, features.meta), dropped


def _select_rows(embeddings, rows):
    """Rows of a tensor, or of mapped embeddings, which stay in their files."""
    import torch

    return embeddings.select(rows) if isinstance(embeddings, MappedEmbeddings) else embeddings[torch.from_numpy(rows)]


def _with_rows(captions, rows):
    if isinstance(captions, LazyCaptions):
        return captions.with_rows(rows)
    return [{**caption, "clip_embedding": row} for caption, row in zip(captions, rows.tolist())]
