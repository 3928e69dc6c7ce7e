"""The feature file: embeddings and captions of a data set, in the published layout plus `meta`; or a directory of parts.

A pickled dict: "clip_embedding" is a tensor [N, D] with one row per image, or [N, L, D] with several embeddings per image; "captions" is a
list of dicts with image_id, caption, id and clip_embedding (the caption's row); "meta" is a dict of plain values. The published train.py
reads our files: it looks at the first two keys. Reading runs nothing that stands in the file. A name without suffix is a directory (see
directory.py).
"""

import io
import pickle
import sys
from pathlib import Path

import numpy as np

from common import UserError, replace_file
from features.content import Features, drop_empty_captions, group_by_image, join_features
from features.directory import is_directory_name, read_directory
from features.directory_writer import write_directory
from features.embeddings import MappedEmbeddings, first_bad_row
from features.encoder_names import CLIPXGPT_ENCODERS, guess_encoder
from features.image_ids import HALF_PAIR, plain_id
from features.meta import check_meta
from features.unpickle import RefusedPickle, read_pickle

__all__ = ["Features", "drop_empty_captions", "group_by_image", "join_features", "load_features", "save_features"]
FORMAT_VERSION = 1
PICKLE_PROTOCOL = 4


def save_features(path, clip_embedding, captions, meta):
    """Write a feature file, or a feature directory where `path` has no suffix; whole or not at all; equal content gives equal bytes.

    clip_embedding: [N, D] or [N, L, D] tensor or MappedEmbeddings; captions: sequence of dicts, each with image_id, caption and
    clip_embedding (a row below N); meta: dict of plain values (format version, dtype, width and counts are added). A directory holds
    captions image by image, and is written part by part.
    """
    as_directory = is_directory_name(path)
    mapped = isinstance(clip_embedding, MappedEmbeddings)
    if not mapped:
        clip_embedding = clip_embedding.detach().cpu().contiguous()
    dtype = str(clip_embedding.dtype).removeprefix("torch.")
    meta = {
        "format_version": FORMAT_VERSION,
        **meta,
        "width": int(clip_embedding.shape[-1]),
        "dtype": "float32" if as_directory and dtype == "bfloat16" else dtype,
        "images": int(clip_embedding.shape[0]),
        "captions": len(captions),
    }
    if len(clip_embedding.shape) == 3:
        meta["embeddings_per_image"] = int(clip_embedding.shape[1])
    if as_directory:
        return write_directory(path, clip_embedding, captions, meta)
    if mapped:
        clip_embedding = clip_embedding[:]
    elif clip_embedding.untyped_storage().nbytes() != clip_embedding.nbytes:
        clip_embedding = clip_embedding.clone()  # of a larger tensor only what is asked for
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


def load_features(path, faults=None):
    """Read a feature file or directory, ours or a published one. Nothing in it is run.

    Args:
        path: the file or folder.
        faults: a list that takes what is wrong with single embeddings and captions, one line each; such captions are left out.
            None makes the first of them an error.

    Returns:
        Features.

    Raises:
        UserError: the file is missing, damaged, not a feature file, or asks for code; without `faults` also for NaN and no captions.
    """
    path = Path(path)
    if path.is_dir():
        return _checked(path, *read_directory(path), faults)
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
    return _checked(path, *_parts_of(path, content), faults)


def _bad(path, found):
    return UserError(
        f"{path} {found}; expected a feature file (a pickled dict with clip_embedding and captions). Make it again with a parse script."
    )


def _parts_of(path, content):
    """Return embedding, captions and meta of what was unpickled. Raises UserError for the first that has another type."""
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
    if not isinstance(embedding, torch.Tensor) or embedding.dim() not in (2, 3) or not embedding.is_floating_point():
        raise _bad(path, "has a clip_embedding that is not a float tensor [N, D] or [N, L, D]")
    if not isinstance(captions, list) or not isinstance(meta, dict):
        raise _bad(path, "has captions that are not a list, or meta that is not a dict")
    check_meta(meta, path)
    return embedding, captions, meta


def _checked(path, embedding, captions, meta, faults):
    """Check values and bring them to one form. Returns Features. A list `faults` takes faults in place of an error."""
    if not len(captions):
        _fault(UserError(f"{path} holds no caption: nothing to learn from. Parse again with annotations that have captions."), faults)
    bad = first_bad_row(embedding)
    if bad is not None and faults is None:  # a check counts such rows itself
        raise UserError(f"{path} holds NaN or infinity in row {bad} of clip_embedding. Encode the images again.")
    if isinstance(captions, list):
        rows = len(embedding)
        checked = (_checked_caption(path, number, caption, rows, faults) for number, caption in enumerate(captions))
        captions = [caption for caption in checked if caption]
        _replace_half_pairs(path, captions)
    if not meta.get("encoder"):
        meta = {**meta, "encoder": guess_encoder(path, embedding.shape[-1])}
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


def _fault(error, faults):
    """Raise an error, or put it into the list that collects them."""
    if faults is None:
        raise error
    faults.append(str(error))


def _checked_caption(path, number, caption, rows, faults=None):
    """One caption as a plain dict (published Clotho files hold pandas rows), its row and text checked; None after a fault."""
    caption = dict(caption) if isinstance(caption, dict) or hasattr(caption, "items") else caption
    if not isinstance(caption, dict):
        return _fault(_bad(path, f"has a caption {number} that is a {type(caption).__name__}"), faults)
    if "caption" not in caption and "caption_1" in caption:
        caption["caption"] = caption["caption_1"]
    image_id = caption.get("image_id", caption.get("file_name", caption.get("clip_embedding")))
    caption["image_id"] = image_id if type(image_id) in (int, str) else plain_id(image_id)
    if caption["image_id"] is None:
        return _fault(_bad(path, f"has a caption {number} whose image_id is {str(image_id)[:40]!r}, no text or whole number"), faults)
    if not isinstance(caption.get("caption"), str):
        return _fault(_bad(path, f"has a caption {number} without a text"), faults)
    row = caption.get("clip_embedding")
    if not isinstance(row, (int, np.integer)) or not 0 <= row < rows:
        return _fault(_bad(path, f"has a caption {number} whose row is {row!r} of {rows}"), faults)
    caption["clip_embedding"] = int(row)
    return caption


def _replace_half_pairs(path, captions):
    """Replace half of a surrogate pair, which no tokenizer and no UTF-8 file takes, by U+FFFD; a printed note counts them."""
    replaced = 0
    for caption in captions:
        text = caption["caption"]
        if not text.isascii() and HALF_PAIR.search(text):
            caption["caption"] = HALF_PAIR.sub("\ufffd", text)
            replaced += 1
    if replaced:
        print(f"{path}: {replaced} captions hold half of a surrogate pair, which was replaced by U+FFFD", file=sys.stderr)


def describe(path):
    """Describe a feature file or directory: a dict of plain values with its shape, counts and meta."""
    features = load_features(path, faults=[])
    about = {"file": str(path), "shape": list(features.clip_embedding.shape), "dtype": str(features.clip_embedding.dtype)[6:]}
    about |= {"images": len(features.clip_embedding), "captions": len(features.captions), "width": features.width}
    return {**about, **{key: value for key, value in features.meta.items() if key not in about}}
