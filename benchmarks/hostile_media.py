"""Odd shards, pictures, sounds and places of output for benchmarks.hostile. Nothing outside the folder of an input is touched."""

import os
import socket
import struct
import tarfile
import zlib
from pathlib import Path

from benchmarks.hostile_changes import change_bytes
from benchmarks.hostile_world import valid_members, write_shard


def change_shard(draw):
    """Change shard.tar: its bytes, or its members."""
    if draw.random() < 0.35:
        return change_bytes(draw, "shard.tar")
    members = valid_members()
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(members))
        member = tarfile.TarInfo(
            draw.choice(["000000001.jpg", "000000009.jpg", "000000001.txt", "../up.jpg", "x" * 300 + ".jpg", "a\nb.jpg"])
        )
        member.type = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.REGTYPE])
        member.linkname = draw.choice(["000000001.jpg", "../../up", "/nowhere", ""])
        name, content = members[place] if isinstance(members[place], tuple) else ("x.jpg", b"x")
        text = draw.choice(
            [b"[" * 100_000, b'{"caption": ' * 5000, b'{"caption": 5}', b'["a"]', b"\xff\xfe", b"\0", b"null", b'{"caption": "\\ud800"}']
        )
        members[place] = draw.choice([
            member, (name, b""), (name, content[: len(content) // 2]), (name.replace(".", ".a."), content), ("." + name, content),
            (name.rpartition(".")[0] + draw.choice([".json", ".txt", ".text", ".JPG", "", ".tar", ".jpg.jpg"]), text), (name, text),
            (members[0][0] if isinstance(members[0], tuple) else name, content), ("\udcff" + name, content), ("/" + name, content),
        ])  # fmt: skip
    options = draw.choice([{}, {"mode": "w:gz"}, {"format": tarfile.USTAR_FORMAT}, {"format": tarfile.GNU_FORMAT}, {"mode": "w:bz2"}])
    try:
        write_shard("shard.tar", members, **options)
    except ValueError:  # a name that this format of tar cannot hold
        write_shard("shard.tar", members)


def add_odd_files(draw, folder):
    """Put odd things among pictures or sounds."""
    folder, sample = Path(folder), next(iter(sorted(Path(folder).glob("0.*"))))
    odd = folder / f"odd{draw.choice(['', ' ü', '.a', chr(10)])}{sample.suffix if draw.random() < 0.8 else '.png'}"
    ways = {
        "empty": lambda: odd.write_bytes(b""), "bytes": lambda: odd.write_bytes(draw.randbytes(3000)), "fifo": lambda: os.mkfifo(odd),
        "folder": odd.mkdir, "loop": lambda: odd.symlink_to(odd), "dangling": lambda: odd.symlink_to("nowhere"),
        "cut": lambda: odd.write_bytes(sample.read_bytes()[: draw.randrange(1, 600)]), "great": lambda: odd.write_bytes(great_png()),
        "changed": lambda: (odd.write_bytes(sample.read_bytes()), change_bytes(draw, odd)),
        "half": lambda: odd.write_bytes(sample.read_bytes()[: sample.stat().st_size // 2]), "text": lambda: odd.write_text("no picture"),
        "raw name": lambda: os.link(sample, os.fsencode(folder) + b"/\xff\xfe" + os.fsencode(sample.suffix)),
    }  # fmt: skip
    ways[draw.choice(list(ways))]()


def great_png():
    """Make the head of a picture of 60,000 x 60,000 points."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def place_output(draw, name):
    """Put something that is no file of ours where the output goes. Returns a check that it is still there."""
    path, kinds = (
        Path(name),
        ["fifo", "socket", "folder", "link", "link to folder", "below a file", "full folder", "dangling", "loop", "old file"],
    )
    kind = draw.choice(kinds)
    Path("keep.txt").write_text("mine")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind in ("link", "link to folder", "dangling", "loop"):
        path.symlink_to({"link": "keep.txt", "link to folder": "photos", "dangling": "no/where", "loop": path.name}[kind])
    elif kind in ("folder", "full folder"):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
        if kind == "full folder":
            (path / "img_emb").mkdir()
            (path / "metadata").mkdir()
            (path / "img_emb" / "img_emb_0.npy").write_text("mine")
    else:
        path.write_text("mine")
    before = os.lstat(path)

    def check(said):
        if not os.path.lexists(path) or os.lstat(path).st_mode >> 12 != before.st_mode >> 12:
            return f"--out on a {kind} was replaced"
        if kind in ("folder", "full folder") and not (path / "mine.txt").exists():
            return "another's file in the output folder is gone"
        return None

    return check
