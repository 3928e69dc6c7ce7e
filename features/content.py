"""What a run learns from, wherever it was stored: embeddings with their captions; several put together. N images, D width, C captions."""

import dataclasses
import hashlib

import numpy as np

from common import UserError
from features.captions import LazyCaptions, rows_of
from features.embeddings import MappedEmbeddings, byte_view


@dataclasses.dataclass
class Features:
    """What a feature file or directory holds. L embeddings an image, where there are several; a vector of zeros there is none."""

    clip_embedding: object  # tensor [N, D] or [N, L, D], dtype as stored; from a directory a MappedEmbeddings, indexed like one
    captions: list  # dicts with image_id, caption and clip_embedding (the row), maybe more; from a directory a LazyCaptions, read like one
    meta: dict  # empty for published files, but for an encoder known from width or file name

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
        """A short name for the content: SHA-256 over all embeddings, rows and texts, 16 hexadecimal digits.

        A directory is read once from end to end for it; its digest is another than that of a .pkl with the same content.
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
    """Let captions of the same image share one row, as packing wants, where a published file has a row a caption → Features.

    Rows are joined only where image_id is the same and the embeddings are equal bit for bit.
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
    """Put several feature files (train and restval, say) behind one another → Features with the meta of the first.

    Raises UserError when their encoders, widths or numbers of embeddings an image differ.
    """
    import torch

    first = several[0]
    for other, name in zip(several[1:], names[1:]):
        if (other.width, other.meta.get("encoder")) != (first.width, first.meta.get("encoder")):
            raise UserError(
                f"{name} holds {other.width}-wide embeddings ({other.meta.get('encoder')}), {names[0]} holds {first.width} "
                f"({first.meta.get('encoder')}); files given together need one encoder. Parse one of them again."
            )
        shapes = [list(features.clip_embedding.shape[1:]) for features in (other, first)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} holds {shapes[0]} numbers an image, {names[0]} {shapes[1]}: parse one of them again.")
        normalized = [bool(features.meta.get("normalized")) for features in (other, first)]
        if normalized[0] != normalized[1]:
            found = ["normalised" if yes else "unnormalised" for yes in normalized]
            raise UserError(f"{name} holds {found[0]} embeddings, {names[0]} {found[1]} ones: they do not go together. Parse one again.")
        if other.meta.get("audio") != first.meta.get("audio"):
            raise UserError(f"{name} and {names[0]} hold sounds under different settings (see meta's audio). Parse one of them again.")
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
    """Leave out captions that are empty or blank → Features, how many were left out."""
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
