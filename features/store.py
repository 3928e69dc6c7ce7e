"""The feature file: embeddings and captions of a data set, in the published layout plus `meta`.

A pickled dict: "clip_embedding" a tensor [N, D], one row an image; "captions" a list of dicts with image_id, caption, id and
clip_embedding (the caption's row); "meta" a dict of plain values. The published train.py reads ours (it looks at the first two
keys), and ours reads theirs, one row a caption, without meta, and CLIPxGPT's list of (name, array, caption). Reading runs nothing
that stands in the file.
"""

import dataclasses
import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

from common import UserError, file_stem, replace_file

from .unpickle import RefusedPickle, read_pickle

FORMAT_VERSION = 1
PICKLE_PROTOCOL = 4
# Widths that name their encoder, for published files, which do not say who made them.
ENCODER_OF_WIDTH = {640: "RN50x4", 576: "tinyvit"}
# Of CLIPxGPT's files: vision towers of transformers, before their projection.
CLIPXGPT_ENCODERS = {768: "hf:openai/clip-vit-base-patch32", 1024: "hf:openai/clip-vit-large-patch14"}
ENCODERS_IN_NAMES = ("ViT-L/14@336px", "ViT-L/14", "ViT-B/32", "ViT-B/16", "RN50x64", "RN50x16", "RN50x4", "RN101", "RN50", "tinyvit")


@dataclasses.dataclass
class Features:
    """What a feature file holds."""

    clip_embedding: object  # tensor [N, D], dtype as stored
    captions: list  # dicts with image_id, caption and clip_embedding (the row), maybe more
    meta: dict  # empty for published files, but for an encoder known from width or file name

    @property
    def width(self):
        """D, the width of an embedding."""
        return self.clip_embedding.shape[1]

    @property
    def caption_rows(self):
        """The row of each caption: int64 [C]."""
        return np.fromiter((caption["clip_embedding"] for caption in self.captions), np.int64, len(self.captions))

    def digest(self):
        """A short name for the content: SHA-256 over embeddings, rows and texts, 16 hexadecimal digits."""
        digest = hashlib.sha256(np.ascontiguousarray(self.clip_embedding.contiguous().view(-1).numpy()).view(np.uint8))
        digest.update(self.caption_rows.tobytes())
        digest.update("\0".join(caption["caption"] for caption in self.captions).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def save_features(path, clip_embedding, captions, meta):
    """Write a feature file, whole or not at all; equal content gives equal bytes.

    clip_embedding: [N, D] tensor; captions: list of dicts, each with image_id, caption and clip_embedding (a row below N);
    meta: dict of plain values (format version, dtype, width and counts are added).
    """
    clip_embedding = clip_embedding.detach().cpu().contiguous().clone()
    meta = {
        "format_version": FORMAT_VERSION,
        **meta,
        "width": int(clip_embedding.shape[1]),
        "dtype": str(clip_embedding.dtype).removeprefix("torch."),
        "images": int(clip_embedding.shape[0]),
        "captions": len(captions),
    }
    # pickle writes an object it has seen before as a reference: equal texts are made one object, so that bytes depend on content alone.
    known = {}

    def one(value):
        return known.setdefault(value, value) if isinstance(value, str) else value

    captions = [{one(key): one(value) for key, value in caption.items()} for caption in captions]
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        _FeaturePickler(file, protocol=PICKLE_PROTOCOL).dump({"clip_embedding": clip_embedding, "captions": captions, "meta": meta})


class _FeaturePickler(pickle.Pickler):
    """Writes a tensor's numbers without the memory address that torch's own pickling puts beside them."""

    def reducer_override(self, value):
        import torch

        if not isinstance(value, torch.storage.TypedStorage):
            return NotImplemented
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


def load_features(path):
    """Read a feature file, ours or a published one → Features. Nothing in the file is run.

    Raises UserError when the file is missing, damaged, not a feature file, or asks for code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no feature file {path}. Make one with a parse script, such as parse_coco.py --out {path}.")
    try:
        with open(path, "rb") as file:
            content = read_pickle(file)
    except RefusedPickle as error:
        raise UserError(f"{path} asks for {error}, which a feature file has no use for: refused, nothing in it was run.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).splitlines() or [""])[0][:100]
        raise _bad(path, f"cannot be read as a pickle ({type(error).__name__}: {reason})") from error
    return _checked(path, content)


def _bad(path, found):
    return UserError(
        f"{path} {found}; expected a feature file (a pickled dict with clip_embedding and captions). Make it again with a parse script."
    )


def _checked(path, content):
    """Check what was read and bring it to one form → Features. Raises UserError naming the first fault."""
    import torch

    if isinstance(content, list):
        content = _from_triples(path, content)
    if not isinstance(content, dict):
        raise _bad(path, f"holds a {type(content).__name__}")
    missing = [key for key in ("clip_embedding", "captions") if key not in content]
    if missing:
        raise _bad(path, f"has no {' and no '.join(missing)}")
    embedding, captions, meta = content["clip_embedding"], content["captions"], content.get("meta", {})
    if isinstance(embedding, np.ndarray) and embedding.dtype.kind == "f":
        embedding = torch.from_numpy(embedding)
    if not isinstance(embedding, torch.Tensor) or embedding.dim() != 2 or not embedding.is_floating_point():
        raise _bad(path, "has a clip_embedding that is not a float tensor [N, D]")
    if not isinstance(captions, list) or not isinstance(meta, dict):
        raise _bad(path, "has captions that are not a list, or meta that is not a dict")
    if not captions:
        raise UserError(f"{path} holds no caption: nothing to learn from. Parse again with annotations that have captions.")
    if not torch.isfinite(embedding).all():
        row = int((~torch.isfinite(embedding)).any(1).nonzero()[0])
        raise UserError(f"{path} holds NaN or infinity in row {row} of clip_embedding. Encode the images again.")
    captions = [_checked_caption(path, number, caption, len(embedding)) for number, caption in enumerate(captions)]
    if not meta.get("encoder"):
        meta = {**meta, "encoder": _guess_encoder(path, embedding.shape[1])}
    return Features(embedding, captions, meta)


def _from_triples(path, triples):
    """CLIPxGPT's file, a list of (picture's name, array [D] or [1, D], caption), in the dict that the others pickle."""
    import torch

    embeddings, captions = [], []
    for number, triple in enumerate(triples):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3 or not hasattr(triple[1], "shape"):
            raise _bad(path, f"holds a list whose item {number} is no (name, array, caption)")
        name, array, caption = triple
        array = torch.as_tensor(array).detach().reshape(-1)
        if not array.is_floating_point() or embeddings and array.shape != embeddings[0].shape:
            raise _bad(path, f"holds a list whose item {number} has an array {tuple(triple[1].shape)} of {array.dtype}")
        embeddings.append(array)
        captions.append({"image_id": name, "caption": caption, "id": number, "clip_embedding": number})
    if not captions:
        raise _bad(path, "holds an empty list")
    embeddings = torch.stack(embeddings)
    return {"clip_embedding": embeddings, "captions": captions, "meta": {"encoder": CLIPXGPT_ENCODERS.get(embeddings.shape[1])}}


def _checked_caption(path, number, caption, rows):
    """One caption as a plain dict (published Clotho files hold pandas rows) whose row exists and whose text is a str."""
    caption = dict(caption) if isinstance(caption, dict) or hasattr(caption, "items") else caption
    if not isinstance(caption, dict):
        raise _bad(path, f"has a caption {number} that is a {type(caption).__name__}")
    if "caption" not in caption and "caption_1" in caption:
        caption["caption"] = caption["caption_1"]
    if "image_id" not in caption:
        caption["image_id"] = caption.get("file_name", caption.get("clip_embedding"))
    if not isinstance(caption.get("caption"), str):
        raise _bad(path, f"has a caption {number} without a text")
    row = caption.get("clip_embedding")
    if not isinstance(row, (int, np.integer)) or not 0 <= row < rows:
        raise _bad(path, f"has a caption {number} whose row is {row!r} of {rows}")
    caption["clip_embedding"] = int(row)
    return caption


def _guess_encoder(path, width):
    """The encoder of a file that does not say: from its published name, else from its width, else None."""
    for name in ENCODERS_IN_NAMES:
        if file_stem(name) in path.name:
            return name
    return ENCODER_OF_WIDTH.get(width)


def group_by_image(features):
    """Let captions of the same image share one row, as packing wants, where a published file has a row a caption → Features.

    Rows are joined only where image_id is the same and the embeddings are equal bit for bit.
    """
    import torch

    rows = features.caption_rows
    if len(np.unique(rows)) < len(rows):
        return features
    first_row, kept, new_rows = {}, [], []
    for caption, row in zip(features.captions, rows):
        key = (str(caption["image_id"]), hashlib.blake2b(features.clip_embedding[row].numpy().tobytes(), digest_size=16).digest())
        if key not in first_row:
            first_row[key] = len(kept)
            kept.append(int(row))
        new_rows.append(first_row[key])
    if len(kept) == len(rows):
        return features
    captions = [{**caption, "clip_embedding": row} for caption, row in zip(features.captions, new_rows)]
    return Features(features.clip_embedding[torch.tensor(kept)], captions, features.meta)


def join_features(several, names):
    """Put several feature files (train and restval, say) behind one another → Features with the meta of the first.

    Raises UserError when their encoders or widths differ.
    """
    import torch

    first = several[0]
    for other, name in zip(several[1:], names[1:]):
        if (other.width, other.meta.get("encoder")) != (first.width, first.meta.get("encoder")):
            raise UserError(
                f"{name} holds {other.width}-wide embeddings ({other.meta.get('encoder')}), {names[0]} holds {first.width} "
                f"({first.meta.get('encoder')}); files given together need one encoder. Parse one of them again."
            )
    if len(several) == 1:
        return first
    captions, start = [], 0
    for features in several:
        captions += [{**caption, "clip_embedding": caption["clip_embedding"] + start} for caption in features.captions]
        start += len(features.clip_embedding)
    return Features(torch.cat([features.clip_embedding for features in several]), captions, first.meta)
