"""Writing a feature directory, whole or not at all; see directory.py for its layout."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from common import UserError
from features.captions import rows_of
from features.embeddings import blocks

PART_ROWS = 100_000
OUR_FILES = re.compile(r"img_emb(/img_emb_\d+\.npy)?|metadata(/metadata_\d+\.parquet)?|meta\.json")


def check_replaceable(path):
    """Check that a feature directory can be written under this name: nothing is there yet, or a feature directory and nothing else.

    Returns:
        The folder to write, which is the target of a symbolic link.

    Raises:
        UserError: something else is there.
    """
    target = Path(os.path.realpath(path))
    if os.path.islink(target) or target.exists() and not target.is_dir():
        raise UserError(f"cannot write {path}: it is no folder. Give another name.")
    entries = ((entry, entry.relative_to(target).as_posix()) for entry in target.rglob("*"))
    foreign = next((name for entry, name in entries if entry.is_symlink() or not OUR_FILES.fullmatch(name)), None)
    if foreign:
        raise UserError(f"cannot write {path}: it is a folder that holds other things, such as {foreign}. Give another name.")
    return target


def write_directory(path, clip_embedding, captions, meta):
    """Write a feature directory, whole or not at all: into a temporary folder beside it, which is then renamed.

    Args:
        path: the folder; a feature directory of that name is replaced.
        clip_embedding: tensor or MappedEmbeddings.
        captions: list of dicts or LazyCaptions, written image by image.
        meta: dict.

    Raises:
        UserError: it cannot be written, or a caption has no place in it.
    """
    given, path = path, check_replaceable(path)
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    temporary, old = (path.with_name(f".{path.name[:40]}.{digest}.{kind}") for kind in ("tmp", "old"))
    try:
        if old.is_dir() and not path.exists():  # a run was killed between two renames
            os.rename(old, path)
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
        raise UserError(f"cannot write {given}: {error.strerror or error}. Free some space, or give another place.") from error
    finally:
        for folder in (temporary, old):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)


def _write_parts(folder, clip_embedding, captions):
    import pyarrow.parquet as pq

    rows = rows_of(captions)
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    ids = captions.image_ids() if hasattr(captions, "image_ids") else (caption["image_id"] for caption in captions)
    whole_ids = all(type(image_id) is int and abs(image_id) < 2**63 for image_id in ids)
    starts = range(0, len(clip_embedding), PART_ROWS)
    digits = len(str(max(0, len(starts) - 1)))  # so that names sort as numbers do
    for number, start in enumerate(starts):
        stop = min(start + PART_ROWS, len(clip_embedding))
        _save_array(folder / "img_emb" / f"img_emb_{number:0{digits}}.npy", clip_embedding, start, stop)
        first, end = np.searchsorted(sorted_rows, [start, stop])
        of_rows = [[] for _ in range(stop - start)]
        for one in order[first:end]:
            of_rows[rows[one] - start].append(captions[int(one)])
        pq.write_table(_table(of_rows, whole_ids), folder / "metadata" / f"metadata_{number:0{digits}}.parquet")


def _save_array(file, clip_embedding, start, stop):
    """Write rows start to stop-1 as np.save would, some tens of megabytes at a time."""
    with open(file, "wb") as opened:
        for first, block in blocks(clip_embedding, start, stop):
            array = block.float().numpy() if str(block.dtype) == "torch.bfloat16" else block.numpy()  # numpy has no bfloat16
            if first == start:
                shape = (stop - start, *array.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(opened, header)
            opened.write(np.ascontiguousarray(array).data)


def _table(of_rows, whole_ids):
    """Make the Arrow table of one part from a list of caption dicts per row."""
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
    """Turn a numpy number or array into plain values for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise UserError(f"a caption holds a {type(value).__name__}; a feature directory holds text, numbers, lists and dicts.")
