"""The feature directory: embeddings and captions in numbered parts, in the layout clip-retrieval writes; read where they lie.

{folder}/img_emb/img_emb_{k}.npy              [n, D] float16 or float32 ([n, L, D] with several embeddings an image)
{folder}/metadata/metadata_{k}.parquet        a row an image: image_path, caption, whatever else; ours add image_id, more_captions, details
{folder}/meta.json                            our meta; clip-retrieval writes none

Embeddings are mapped, not loaded; captions are kept as Arrow columns. Nothing read here is code.
"""

import json
import math
import os
import re
from pathlib import Path
from tokenize import TokenError

import numpy as np

from common import UserError
from features.captions import LazyCaptions, NameColumns, PartCaptions, gather_texts
from features.columns import AGAIN, check_regular, is_text, is_text_list, read_columns, read_schema
from features.embeddings import MappedEmbeddings
from features.meta import check_meta

FLOATS = ("float16", "float32", "float64")
UNIT_NORM = 0.01  # how far from 1 the norms of normalised float16 embeddings may be
MOST_META = 2**26  # bytes of a meta.json
EXPECTED = "expected img_emb/img_emb_0.npy, metadata/metadata_0.parquet and so on, as clip-retrieval writes them"


def is_directory_name(path):
    """Whether features under this name are a directory: a folder that exists, or a name without suffix under which nothing exists."""
    path = Path(path)
    return path.is_dir() or (not path.suffix and not path.exists())


def read_directory(path):
    """Read a feature directory. Values of embeddings are not looked at.

    Args:
        path: the folder.

    Returns:
        MappedEmbeddings, LazyCaptions, and meta (empty where there is no meta.json).

    Raises:
        UserError: parts are missing or damaged, or do not fit one another.
    """
    path = Path(path)
    arrays, tables = _parts(path / "img_emb", "img_emb", "npy"), _parts(path / "metadata", "metadata", "parquet")
    if not arrays:
        raise UserError(f"{path} holds no img_emb/img_emb_*.npy; {EXPECTED}.")
    for part in sorted(arrays.keys() ^ tables.keys()):
        found, lacking = ("img_emb_{}.npy", "metadata_{}.parquet") if part in arrays else ("metadata_{}.parquet", "img_emb_{}.npy")
        raise UserError(f"{path} has {found.format(part)} but no {lacking.format(part)}. Copy or make the missing part again.")
    meta = _read_meta(path)
    parts, sources, rows, shared, start = [], [], [], {}, 0
    for number in sorted(arrays, key=lambda part: (int(part), part)):
        array = _map_array(arrays[number])
        if parts and array.shape[1:] != parts[0].shape[1:]:
            raise UserError(f"{arrays[number]} holds {_shape(array)}, the part before it {_shape(parts[0])}. Parts need one encoder.")
        source = _read_captions(tables[number], len(array), arrays[number], shared, "format_version" in meta)
        parts.append(array)
        sources.append(source)
        rows.append(source.rows + start)
        start += len(array)
    if meta.get("images", start) != start:
        raise UserError(f"{path} holds {start} embeddings; its meta.json says {meta['images']}. A part is missing, or of another run.")
    embeddings = MappedEmbeddings(parts)
    if "normalized" not in meta:
        meta = {**meta, "normalized": _looks_normalized(embeddings)}
    return embeddings, LazyCaptions(sources, np.concatenate(rows)), meta


def _parts(folder, stem, suffix):
    """Find the files {stem}_{k}.{suffix} of a folder. Returns dict of k, as it is written, to path."""
    names = (re.fullmatch(rf"{stem}_(\d{{1,9}})\.{suffix}", path.name, re.ASCII) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {match[1]: folder / match[0] for match in names if match}


def _read_meta(path):
    file = path / "meta.json"
    if not os.path.lexists(file):
        return {}
    if check_regular(file) > MOST_META:
        raise UserError(f"{file} is larger than {MOST_META:,} bytes; expected a few lines. Make the directory again.")
    try:
        meta = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error)[:100]}). Remove it, or make the directory again.") from error
    if not isinstance(meta, dict):
        raise UserError(f"{file} holds a {type(meta).__name__}; expected an object. Remove it, or make the directory again.")
    check_meta(meta, file)
    return meta


def _map_array(file):
    """Map one .npy. Returns an array [n, D] or [n, L, D] of floats; nothing is taken from its header but shape, order and dtype."""
    size = check_regular(file)
    try:
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran_order, dtype = read_header(opened)
            start = opened.tell()
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError, SyntaxError, TokenError) as error:
        raise UserError(f"{file} cannot be read as a float array ({' '.join(str(error).split())[:120]}). {AGAIN}") from error
    whole = all(type(number) is int and number >= 0 for number in shape)
    if dtype.name not in FLOATS or len(shape) not in (2, 3) or not whole or 0 in shape[1:]:
        found = f"{str(dtype)[:40]} {str(list(shape))[:80]}"
        raise UserError(f"{file} holds {found}; expected [n, D] or [n, L, D] of float16 or float32. {AGAIN}")
    if math.prod(shape) * dtype.itemsize > size - start:
        raise UserError(f"{file} says it holds {list(shape)} of {dtype.name}, and has {size:,} bytes: it is cut short. {AGAIN}")
    if not shape[0]:
        return np.zeros(shape, dtype)  # nothing to map
    return np.memmap(file, dtype, "r", start, shape, "F" if fortran_order else "C")


def _shape(array):
    return f"{array.dtype.name} {list(array.shape)}"


def _read_captions(file, images, array_file, shared, ours):
    """Read the texts of one metadata file in the order of its rows. Returns PartCaptions. Rows whose caption is null have none."""
    schema, rows = read_schema(file)
    kinds = dict(zip(schema.names, schema.types))
    if "caption" not in kinds:
        raise UserError(f"{file} has no column caption; it has {', '.join(kinds)[:200] or 'none'}. Make it with captions (enable_text).")
    if not is_text(kinds["caption"]):
        raise UserError(f"{file} has captions of type {kinds['caption']}; expected text.")
    if rows != images:
        raise UserError(f"{file} has {rows} rows, {array_file.name} {images}: they are not of one run. {AGAIN}")
    # Other tools may have columns of these names; only in our own directories do they mean what ours do.
    lists = [name for name in ("more_captions", "details") if ours and str(kinds.get(name, "null")) != "null"]
    wrong = next((name for name in lists if not is_text_list(kinds[name])), None)
    if wrong:
        raise UserError(f"{file} has {wrong} of type {kinds[wrong]}; expected lists of text. {AGAIN}")
    columns = read_columns(file, ["caption", *(name for name in lists if name == "more_captions")])
    texts, rows = gather_texts(file, columns["caption"], columns.get("more_captions"))
    names = NameColumns.find(kinds, details="details" in lists)
    return PartCaptions(file, texts, rows, shared, names)


def _looks_normalized(embeddings):
    """Whether a sample of the rows has unit norm, as those of clip-retrieval have."""
    if embeddings.ndim != 2 or not len(embeddings):
        return False
    norms = embeddings[np.linspace(0, len(embeddings) - 1, min(len(embeddings), 64)).astype(np.int64)].float().norm(dim=1)
    return bool((norms - 1).abs().max() < UNIT_NORM)
