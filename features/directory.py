"""The feature directory: embeddings and captions in numbered parts, in the layout clip-retrieval writes; read where they lie.

{folder}/img_emb/img_emb_{k}.npy              [n, D] float16 or float32 ([n, L, D] with several embeddings an image)
{folder}/metadata/metadata_{k}.parquet        a row an image: image_path, caption, whatever else; ours add image_id, more_captions, details
{folder}/meta.json                            our meta; clip-retrieval writes none

Embeddings are mapped, not loaded; captions are kept as Arrow columns. Nothing read here is code.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from common import UserError
from features.captions import LazyCaptions, PartCaptions, rows_of
from features.embeddings import MappedEmbeddings, blocks

PART_ROWS = 100_000
FLOATS = ("float16", "float32", "float64")
UNIT_NORM = 0.01  # how far from 1 the norms of normalised float16 embeddings may be
EXPECTED = "expected img_emb/img_emb_0.npy, metadata/metadata_0.parquet and so on, as clip-retrieval writes them"


def is_directory_name(path):
    """Whether features under this name are a directory: a folder that exists, or a name without suffix that is no file."""
    path = Path(path)
    return path.is_dir() or (not path.suffix and not path.is_file())


def read_directory(path):
    """Read a feature directory → MappedEmbeddings, LazyCaptions, meta (empty where there is no meta.json).

    Raises UserError when parts are missing or damaged, or do not fit one another; values are not looked at.
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
        source = _read_captions(tables[number], len(array), arrays[number], shared)
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
    """The files {stem}_{k}.{suffix} of a folder: dict of k as it is written → path."""
    names = (re.fullmatch(rf"{stem}_(\d+)\.{suffix}", path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {match[1]: folder / match[0] for match in names if match}


def _read_meta(path):
    file = path / "meta.json"
    if not file.exists():
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Remove it, or make the directory again.") from error
    if not isinstance(meta, dict):
        raise UserError(f"{file} holds a {type(meta).__name__}; expected an object. Remove it, or make the directory again.")
    return meta


def _map_array(file):
    """Map one .npy → array [n, D] or [n, L, D] of floats. Object arrays, which are pickles, are refused unread."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as a float array ({' '.join(str(error).split())[:120]}). Make this part again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.name not in FLOATS or array.ndim not in (2, 3) or 0 in array.shape[1:]:
        found = _shape(array) if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{file} holds {found}; expected [n, D] or [n, L, D] of float16 or float32. Make this part again.")
    return array


def _shape(array):
    return f"{array.dtype.name} {list(array.shape)}"


def _read_captions(file, images, array_file, shared):
    """The texts of one metadata file in the order of its rows → PartCaptions. Rows whose caption is null have none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        if "caption" not in names:
            raise UserError(f"{file} has no column caption; it has {', '.join(names) or 'none'}. Make it with captions (enable_text).")
        table = pq.read_table(file, columns=[name for name in ("caption", "more_captions") if name in names])
        first = table["caption"].combine_chunks()
        if not (pa.types.is_string(first.type) or pa.types.is_null(first.type)):
            if not pa.types.is_large_string(first.type) and not pa.types.is_dictionary(first.type):
                raise UserError(f"{file} has captions of type {first.type}; expected text.")
        first = first.cast(pa.string())
        if len(first) != images:
            raise UserError(f"{file} has {len(first)} rows, {array_file.name} {images}: they are not of one run. Make this part again.")
        rows, texts = np.flatnonzero(first.is_valid().to_numpy(zero_copy_only=False)), first.drop_null()
        if "more_captions" in names:
            more = table["more_captions"].combine_chunks().cast(pa.list_(pa.string()))
            counts = np.diff(more.offsets.to_numpy()) if len(more) else np.zeros(0, np.int64)
            if more.flatten().null_count or len(more.flatten()) != counts.sum():
                raise UserError(f"{file} has nulls among its more_captions; expected lists of text. Make this part again.")
            rows = np.concatenate([rows, np.repeat(np.arange(images), counts)])
            order = np.argsort(rows, kind="stable")  # an image's first caption, then its others
            rows, texts = rows[order], pa.concat_arrays([texts, more.flatten()]).take(order)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet ({' '.join(str(error).split())[:120]}). Make this part again.") from error
    finally:
        pa.default_memory_pool().release_unused()
    return PartCaptions(file, texts, rows, shared)


def _looks_normalized(embeddings):
    """Whether a sample of the rows has unit norm, as clip-retrieval's have."""
    if embeddings.ndim != 2 or not len(embeddings):
        return False
    norms = embeddings[np.linspace(0, len(embeddings) - 1, min(len(embeddings), 64)).astype(np.int64)].float().norm(dim=1)
    return bool((norms - 1).abs().max() < UNIT_NORM)


def check_replaceable(path):
    """Raise UserError when `path` is a folder that holds something else than features."""
    path = Path(path)
    if path.is_dir() and not (path / "img_emb").is_dir() and any(path.iterdir()):
        raise UserError(f"cannot write {path}: it is a folder that holds other things. Give another name.")


def write_directory(path, clip_embedding, captions, meta):
    """Write a feature directory, whole or not at all: into a temporary folder beside it, which is then renamed.

    clip_embedding: tensor or MappedEmbeddings; captions: list of dicts or LazyCaptions, written image by image; meta: dict.
    A feature directory of that name is replaced. Raises UserError when it cannot be written, or a caption has no place in it.
    """
    path = Path(path)
    check_replaceable(path)
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    temporary, old = (path.with_name(f".{path.name[:40]}.{digest}.{kind}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in ("img_emb", "metadata"):
            (temporary / folder).mkdir(parents=True)
        _write_parts(temporary, clip_embedding, captions)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2, default=str) + "\n", encoding="utf-8")
        for file in temporary.rglob("*.*"):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
    except OSError as error:
        if old.is_dir() and not path.exists():
            os.rename(old, path)
        raise UserError(f"cannot write {path}: {error.strerror or error}. Free some room, or give another place.") from error
    finally:
        for folder in (temporary, old):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)


def _write_parts(folder, clip_embedding, captions):
    import pyarrow.parquet as pq

    rows = rows_of(captions)
    order = np.argsort(rows, kind="stable")
    whole_ids = all(type(caption["image_id"]) is int and abs(caption["image_id"]) < 2**63 for caption in captions)
    starts = range(0, len(clip_embedding), PART_ROWS)
    digits = len(str(max(0, len(starts) - 1)))  # so that names sort as numbers do
    for number, start in enumerate(starts):
        stop = min(start + PART_ROWS, len(clip_embedding))
        _save_array(folder / "img_emb" / f"img_emb_{number:0{digits}}.npy", clip_embedding, start, stop)
        first, end = np.searchsorted(rows[order], [start, stop])
        of_rows = [[] for _ in range(stop - start)]
        for one in order[first:end]:
            of_rows[rows[one] - start].append(captions[int(one)])
        pq.write_table(_table(of_rows, whole_ids), folder / "metadata" / f"metadata_{number:0{digits}}.parquet")


def _save_array(file, clip_embedding, start, stop):
    """Write rows start … stop-1 as np.save would, some tens of megabytes at a time."""
    with open(file, "wb") as opened:
        for first, block in blocks(clip_embedding, start, stop):
            array = block.float().numpy() if str(block.dtype) == "torch.bfloat16" else block.numpy()  # numpy has no bfloat16
            if first == start:
                shape = (stop - start, *array.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(opened, header)
            opened.write(np.ascontiguousarray(array).data)


def _table(of_rows, whole_ids):
    """The metadata of one part: a list of caption dicts a row → Arrow table."""
    import pyarrow as pa

    columns = {name: [] for name in ("image_id", "image_path", "caption", "more_captions", "details")}
    for captions in of_rows:
        image_id = captions[0]["image_id"] if captions else None
        names = [caption.get("file_name") for caption in captions]
        name = names[0] if names and _is_text(names[0]) and all(_same(names[0], other) for other in names) else None
        # What the columns cannot say of a caption goes into its details.
        said = {} if name is None else {"file_name": name}
        said |= {"image_id": image_id} if whole_ids or _is_text(image_id) else {}
        rest = [{key: value for key, value in caption.items() if key not in _COLUMNS and not _same(said.get(key, _NOTHING), value)}
                for caption in captions]  # fmt: skip
        for caption in captions:
            if not _is_text(caption["caption"]):
                raise UserError(f"caption {caption['caption']!r} of image {image_id} is not valid Unicode; a directory cannot hold it.")
        columns["image_id"].append(image_id if whole_ids or image_id is None else _printable(image_id))
        columns["image_path"].append(name)
        columns["caption"].append(captions[0]["caption"] if captions else None)
        columns["more_captions"].append([caption["caption"] for caption in captions[1:]])
        columns["details"].append([json.dumps(more, default=_plain) for more in rest] if any(rest) else None)
    types = {"image_id": pa.int64() if whole_ids else pa.string(), "image_path": pa.string(), "caption": pa.string()}
    types |= dict.fromkeys(("more_captions", "details"), pa.list_(pa.string()))
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})


_NOTHING = object()
_COLUMNS = ("caption", "clip_embedding")


def _same(a, b):
    return type(a) is type(b) and a == b


def _is_text(value):
    """Whether a value is a str that UTF-8 can hold: not one with half a surrogate pair, as odd file names have."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _printable(value):
    return str(value).encode("utf-8", "backslashreplace").decode()


def _plain(value):
    """A numpy number or array for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise UserError(f"a caption holds a {type(value).__name__}; a feature directory holds text, numbers, lists and dicts.")
