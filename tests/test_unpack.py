"""data/unpack.py: archives that are damaged, hostile or not what they should be give one line and leave nothing behind."""

import io
import random
import shutil
import zipfile
from pathlib import Path

import pytest

from common import UserError
from data.unpack import unpack

PICTURES = {f"train2014/{number}.jpg": b"some text that can be packed " * 8 for number in range(2)}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def zip_of(files, method=zipfile.ZIP_STORED):
    """Make a zip of a dict from names to bytes; a name may be a ZipInfo."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return memory.getvalue()


def refuse(data, name="pictures.zip", files="train2014/*.jpg"):
    """Unpack these bytes, which must be refused and leave nothing. Returns the message, which must be one line of ASCII."""
    Path(name).write_bytes(data)
    shutil.rmtree("place", ignore_errors=True)
    with pytest.raises(UserError) as caught:
        unpack(Path(name), Path("place"), files, 2)
    assert not list(Path("place").rglob("*"))
    message = str(caught.value)
    assert message.isascii()
    assert len(message) < 400
    return message


def link(mode):
    entry = zipfile.ZipInfo("link")
    entry.external_attr = mode << 16
    return entry


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg", link(0o120777)])
def test_a_zip_that_tries_to_escape_writes_nothing(name, workdir):
    assert "tries to write outside its folder" in refuse(zip_of({**PICTURES, name: b"/etc"}))
    assert [path.name for path in Path().rglob("evil*")] == []
    assert not Path("/tmp/evil.jpg").exists()


def test_a_nul_in_a_name_is_refused(workdir):
    data = zip_of({**PICTURES, "train2014/a#b.jpg": b""}).replace(b"a#b.jpg", b"a\0b.jpg")
    assert "tries to write outside its folder" in refuse(data)


@pytest.mark.parametrize("names", [("a", "a/b"), ("n" * 300,), (".",), ("a/" * 3000 + "b",)])
def test_names_that_no_disk_holds_are_said(names, workdir):
    assert refuse(zip_of({**PICTURES, **dict.fromkeys(names, b"x")})).startswith("pictures.zip ")


def test_an_encrypted_zip_is_said(workdir):
    data = bytearray(zip_of(PICTURES))
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(signature, at + 1)
    assert "is encrypted" in refuse(bytes(data))


@pytest.mark.parametrize("data", [b"", b"<html>sign in</html>", zip_of(PICTURES)[:-30]])
def test_what_is_not_a_zip_is_said(data, workdir):
    assert "is not a whole zip" in refuse(data)


def test_a_zip_with_other_files_is_said(workdir):
    assert "holds 1 files train2014/*.jpg; expected 2" in refuse(zip_of({"train2014/0.jpg": b""}))


@pytest.mark.parametrize("method", METHODS)
def test_flipped_or_missing_bytes_of_a_zip_give_its_files_or_one_line(method, workdir):
    right, draw, refused = zip_of(PICTURES, method), random.Random(method), 0
    broken = [right[:end] for end in range(0, len(right), 40)]
    for place in range(draw.randrange(6), len(right), 6):
        broken.append(right[:place] + bytes([right[place] ^ (1 << draw.randrange(8))]) + right[place + 1 :])
    for data in broken:
        Path("pictures.zip").write_bytes(data)
        shutil.rmtree("place", ignore_errors=True)
        try:
            unpack(Path("pictures.zip"), Path("place"), "train2014/*.jpg", 2)
        except UserError as error:
            refused += 1
            assert str(error).isascii()
            assert len(str(error)) < 400
            assert not list(Path("place").rglob("*"))
        else:
            assert {str(path.relative_to("place")): path.read_bytes() for path in Path("place").rglob("*.jpg")} == PICTURES
    assert refused > len(broken) / 3


BAD_SOUNDS = {
    "link": ('ln -s /etc/passwd "$out/2.wav"', "link or no regular file"),
    "hard link": ('ln "$out/1.wav" "$out/2.wav"', "link or no regular file"),
    "fifo": ('mkfifo "$out/2.wav"', "link or no regular file"),
    "too few": ("true", "holds 1 files development/*.wav; expected 2"),
    "damaged": ("printf 'caf\\351: data error\\n' >&2; exit 2", "caf\\xe9: data error"),
    "password": ("head -c 1 /dev/tty && exit 0; exit 255", "could not be unpacked"),
    "question": ("read answer && exit 0; echo no answer >&2; exit 255", "no answer"),
}


@pytest.mark.parametrize("kind", BAD_SOUNDS)
def test_what_a_7z_must_not_hold_is_said_and_nothing_stays(kind, workdir, monkeypatch):
    line, message = BAD_SOUNDS[kind]
    monkeypatch.setenv("PATH", f"{workdir}:/bin:/usr/bin")
    start = ["#!/bin/sh", 'for word in "$@"; do case "$word" in -o*) out="${word#-o}/development";; esac; done', 'mkdir -p "$out"']
    Path("7z").write_text("\n".join([*start, 'echo a > "$out/1.wav"', line, ""]))
    Path("7z").chmod(0o755)
    assert message in refuse(b"packed", "sounds.7z", "development/*.wav")
