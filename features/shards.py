"""Tar shards of pictures and captions, as img2dataset and webdataset write them: indexed once, pictures read when they are encoded.

A shard holds, for each key, files of one name: 000000123.jpg (or .png, .webp ...), 000000123.txt (the caption), 000000123.json. Indexing
reads headers and captions alone; a picture stays in its tar as (shard, offset, size) until a loader worker reads it.
"""

import gzip
import hashlib
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from common import UserError, remove_own_files, replace_file
from features.columns import read_columns, read_schema
from features.pieces import file_stamp
from features.tables import CAPTION_COLUMNS, decode_text, texts_of

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img")
TEXTS = ("txt", "caption", "text")
REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://")
# A file's name ends at its first dot, as webdataset has it; "a.b.jpg", whose ending is known from the last dot on, at the last.
NAME = re.compile(rf"((?:.*/)?[^/]+?)\.({'|'.join((*PICTURES, *TEXTS, 'json'))})", re.IGNORECASE)
BLOCK = tarfile.BLOCKSIZE


class TarPicture(NamedTuple):
    """A picture inside an uncompressed tar: its file's bytes are shard[offset : offset + size]."""

    shard: str
    offset: int
    size: int
    stamp: str = ""  # the shard's size and time of change

    @property
    def place(self):
        """Where it is, in words."""
        return f"{self.shard}, {self.size} bytes from {self.offset}"

    @property
    def key(self):
        """What stands for the content."""
        return f"{self.place} {self.stamp}"

    def read(self):
        """Return its bytes. Raises OSError, or ValueError when the shard has become shorter."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError("cut short: the shard ends within this picture")
        return data


def expand_shards(patterns):
    """Expand addresses with braces ("cc3m/{00000..00331}.tar"). Returns list of addresses, none twice."""
    import braceexpand

    shards = []
    for pattern in patterns:
        try:
            shards += braceexpand.braceexpand(pattern)
        except braceexpand.UnbalancedBracesError as error:
            raise UserError(f"shards {pattern} have unbalanced braces; expected something like cc3m/{{00000..00331}}.tar.") from error
    return list(dict.fromkeys(shards))


class FetchError(Exception):
    """A shard that could not be copied: the message says why."""


def fetch_shard(address, folder):
    """Copy a shard that cannot be read in place: pipe:COMMAND, http://..., or a compressed .tar.gz.

    Args:
        address: of the shard.
        folder: for copies, each of which is whole or absent and made once.

    Returns:
        Path of the copy, or of a local tar itself, as str.

    Raises:
        FetchError: its command fails, or it is not a gzip file.
        UserError: the copy cannot be written.
    """
    remote = REMOTE.match(address)
    packed = address.endswith((".gz", ".tgz"))
    if not remote and not packed:
        return address
    name = address if remote else file_stamp(address)
    copy = Path(folder) / f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}.tar"
    if copy.is_file():
        return str(copy)
    with replace_file(copy) as temporary, open(temporary, "wb") as file:
        try:
            stream = _open_remote(address) if remote else open(address, "rb")
            with gzip.open(stream) if packed else stream as content:
                while block := content.read(1 << 20):
                    file.write(block)
            stream.close()  # a command's status is looked at here
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise FetchError(str(error)) from error
    return str(copy)


def _open_remote(address):
    from webdataset.gopen import gopen

    return gopen(address)


def remove_copies(folder):
    """Remove the copies that fetch_shard made."""
    remove_own_files(folder, folder.glob("[0-9a-f]" * 16 + ".tar"))


def index_shard(path):
    """List what a local tar holds.

    Args:
        path: of the tar. A damaged one gives what stands before the damage.

    Returns:
        List of (key, list of captions, TarPicture or None), and what is wrong with the tar or None.
    """
    found, fault = {}, None
    try:
        with tarfile.open(path, "r:") as tar:
            size, stamp = os.path.getsize(path), file_stamp(path)
            try:
                for member in tar:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("cut short")
                    _note(found, path, member, tar, stamp)
                fault = _fault_of_end(path, tar.offset)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                fault = f"broken at byte {tar.offset}: {error}"
    except (tarfile.TarError, OSError, EOFError) as error:
        fault = "no such file" if isinstance(error, FileNotFoundError) else f"not a tar that can be read: {error}"
    return [(key, parts.get("txt") or parts.get("json", []), parts.get("picture")) for key, parts in found.items()], fault


def _note(found, path, member, tar, stamp):
    """Put a member of a tar into {key: {"picture", "txt", "json"}}."""
    named = NAME.fullmatch(member.name) if member.isfile() else None
    if not named:
        return
    key, ending = named[1], named[2].lower()
    if ending in PICTURES:
        found.setdefault(key, {})["picture"] = TarPicture(str(path), member.offset_data, member.size, stamp)
    elif ending in TEXTS:
        text = decode_text(tar.extractfile(member).read())[0]
        found.setdefault(key, {})["txt"] = [text] if text.strip() else []
    else:
        found.setdefault(key, {})["json"] = _captions_in_json(tar.extractfile(member).read())


def _captions_in_json(data):
    """Return the captions in a sample's JSON: a text or a list of texts under one of the usual names; [] where there is none."""
    try:
        content = json.loads(data)
        values = (content[name] for name in CAPTION_COLUMNS if content.get(name))
        return texts_of(next(values, None))
    except (ValueError, AttributeError, RecursionError):
        return []


def _fault_of_end(path, offset):
    """Tell the end of a tar from damage: tarfile stops quietly at a damaged header, and a whole tar has a block of zeros there."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if block == bytes(BLOCK):
        return None
    return f"broken at byte {offset}: a damaged header" if len(block) == BLOCK else "cut short: it has no end mark"


def read_failures(path):
    """List (key, address, reason) of what img2dataset could not download, from the {shard}.parquet beside a tar."""
    table = Path(path).with_suffix(".parquet")
    if not table.is_file():
        return []
    try:
        present = set(read_schema(table)[0].names)
        if not {"key", "status"} <= present:
            return []
        columns = read_columns(table, [name for name in ("key", "url", "status", "error_message") if name in present])
    except UserError:
        return [("", str(table), "a table that cannot be read")]
    rows = [dict(zip(columns, values)) for values in zip(*(column.to_pylist() for column in columns.values()))]
    return [
        (row["key"], row.get("url") or "", " ".join(f"{row['status']} {row.get('error_message') or ''}".split()))
        for row in rows
        if row["status"] != "success"
    ]
