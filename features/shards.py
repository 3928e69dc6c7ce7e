"""Tar shards of pictures and captions, as img2dataset and webdataset write them: indexed once, pictures read when their turn comes.

A shard holds, for each key, files of one name: 000000123.jpg (or .png, .webp …), 000000123.txt (the caption), 000000123.json. Indexing
reads headers and captions alone; a picture stays in its tar as (shard, offset, size) until a loader worker reads it.
"""

import collections
import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

from common import UserError, replace_file

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img")
REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://")
KEY = re.compile(r"((?:.*/)?[^./]+)\.(.+)")  # as webdataset has it: the ending starts at the first dot of a file's name
BLOCK = tarfile.BLOCKSIZE


class TarPicture(collections.namedtuple("TarPicture", "shard offset size")):
    """A picture inside an uncompressed tar: its file's bytes are shard[offset : offset + size]."""

    __slots__ = ()

    @property
    def key(self):
        """A text that names it."""
        return f"{self.shard}, {self.size} bytes from {self.offset}"

    place = key  # shown where a picture is named

    def read(self):
        """→ bytes. Raises OSError, or ValueError when the shard has become shorter."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError("cut short: the shard ends within this picture")
        return data


def expand_shards(patterns):
    """Addresses with braces ("cc3m/{00000..00331}.tar", "pipe:curl -s https://…/{000..011}.tar") → list of addresses, none twice."""
    import braceexpand

    shards = []
    for pattern in patterns:
        try:
            shards += braceexpand.braceexpand(pattern)
        except braceexpand.UnbalancedBracesError as error:
            raise UserError(f"shards {pattern} have unbalanced braces; expected something like cc3m/{{00000..00331}}.tar.") from error
    return list(dict.fromkeys(shards))


class FetchError(Exception):
    """A piped shard that did not come: the message says why."""


def fetch_shard(address, folder):
    """A shard that cannot be read in place (pipe:COMMAND, http://…) → its copy in `folder`, made once; a local path → itself.

    Raises FetchError when its command fails, UserError when the copy cannot be written. A copy is whole or absent.
    """
    if not REMOTE.match(address):
        return address
    from webdataset.gopen import gopen

    copy = Path(folder) / f"{hashlib.blake2b(address.encode(), digest_size=8).hexdigest()}.tar"
    if copy.is_file():
        return str(copy)
    with replace_file(copy) as temporary, open(temporary, "wb") as file:
        try:
            stream = gopen(address)
        except (OSError, ValueError) as error:
            raise FetchError(str(error)) from error
        while block := _read_block(stream):
            file.write(block)
    return str(copy)


def _read_block(stream):
    """The next bytes of a command's output; at its end its status is looked at."""
    try:
        block = stream.read(1 << 20)
        if not block:
            stream.close()
    except OSError as error:
        raise FetchError(str(error)) from error
    return block


def index_shard(path):
    """A local tar → list of (key, caption or None, TarPicture or None) in its order, and what is wrong with it or None.

    A damaged tar gives what stands before the damage.
    """
    found, samples = {}, []
    fault = None
    try:
        with tarfile.open(path, "r:") as tar:
            size = os.path.getsize(path)
            try:
                for member in tar:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("cut short")
                    _note(found, path, member, tar)
                fault = _fault_of_end(path, tar.offset)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                fault = f"broken at byte {tar.offset}: {error}"
    except (tarfile.TarError, OSError, EOFError) as error:
        fault = "no such file" if isinstance(error, FileNotFoundError) else f"not a tar that can be read: {error}"
    for key, parts in found.items():
        caption = parts.get("txt", parts.get("json"))
        samples.append((key, caption, parts.get("picture")))
    return samples, fault


def _note(found, path, member, tar):
    """Put a member of a tar into {key: {"picture", "txt", "json"}}."""
    named = KEY.fullmatch(member.name) if member.isfile() else None
    if not named:
        return
    key, ending = named[1], named[2].lower()
    if ending in PICTURES:
        found.setdefault(key, {})["picture"] = TarPicture(str(path), member.offset_data, member.size)
    elif ending in ("txt", "caption", "text"):
        found.setdefault(key, {})["txt"] = tar.extractfile(member).read().decode("utf-8", "replace")
    elif ending == "json":
        try:
            caption = json.loads(tar.extractfile(member).read()).get("caption")
        except (ValueError, AttributeError):
            return  # of no use here, and the caption may stand in a .txt
        if isinstance(caption, str):
            found.setdefault(key, {})["json"] = caption


def _fault_of_end(path, offset):
    """tarfile stops quietly at a damaged header: the end mark, a block of zeros at `offset`, tells an end from damage."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if block == bytes(BLOCK):
        return None
    return f"broken at byte {offset}: a damaged header" if len(block) == BLOCK else "cut short: it has no end mark"


def read_failures(path):
    """What img2dataset could not fetch, from the {shard}.parquet beside a tar → (key, address, reason) of each; [] where there is none."""
    table = Path(path).with_suffix(".parquet")
    if not table.is_file():
        return []
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(table)
    except (pyarrow.ArrowException, OSError):
        return [("", str(table), "a table that cannot be read")]
    if not {"key", "status"} <= set(columns.column_names):
        return []
    rows = columns.select([name for name in ("key", "url", "status", "error_message") if name in columns.column_names]).to_pylist()
    return [
        (row["key"], row.get("url") or "", " ".join(f"{row['status']} {row.get('error_message') or ''}".split()))
        for row in rows
        if row["status"] != "success"
    ]
