"""data/download.py against a server on loopback: resuming, checks, and archives that are not what they should be."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_until

from data import download
from serving import Server


@pytest.fixture
def server():
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def coco(server, workdir, monkeypatch):
    """A small coco2014 on the server: → its items as the script has them, with small counts."""
    server.content["pictures.zip"] = zip_of({f"train2014/{number}.jpg": os.urandom(20_000) for number in range(3)})
    server.content["texts.zip"] = zip_of({"annotations/captions_train2014.json": b"[]", "__MACOSX/x": b""})
    server.content["list.json"] = json.dumps([{"image_id": 1, "caption": "A."}] * 4).encode()
    size = len(server.content["pictures.zip"])
    items = [
        download.Item("texts.zip", "http://unused", "coco", "annotations/captions_*.json", 1),
        download.Item("pictures.zip", "http://unused", "coco", "train2014/*.jpg", 3, size),
        download.Item("list.json", "drive:unused", "coco/annotations", count=4),
    ]
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    monkeypatch.setitem(download.DATA_SETS, "coco2014", items)
    return items


def zip_of(files):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return memory.getvalue()


def run(server, *words):
    return download.main(["coco2014", "--mirror", server.url, *words])


def error_line(server, capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(server, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download.py: error: ")]
    assert caught.value.code == 2
    assert len(lines) == 1
    return lines[0]


def files():
    return sorted(str(path) for path in Path("data").rglob("*") if path.is_file())


WHOLE = ["data/coco/annotations/captions_train2014.json", "data/coco/annotations/list.json"]
WHOLE += [f"data/coco/train2014/{number}.jpg" for number in range(3)]


def test_everything_lies_where_the_parse_scripts_look_and_is_fetched_once(coco, server, capsys):
    Path("data/coco/annotations").mkdir(parents=True)
    Path("data/coco/annotations/mine.json").write_text("{}")
    assert run(server) == 0
    assert files() == sorted([*WHOLE, "data/coco/annotations/mine.json"])
    asked = len(server.asked)
    assert run(server) == 0
    assert len(server.asked) == asked == 3
    assert "pictures.zip: there" in capsys.readouterr().out
    assert run(server, "--folder", "other", "--keep_archives") == 0
    assert Path("other/coco/pictures.zip").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_line_is_taken_up_where_it_broke(ranges, coco, server):
    server.content.pop("texts.zip"), coco.pop(0)
    server.cuts, server.ranges = [25_000, 20_000], ranges
    assert run(server) == 0
    assert files() == WHOLE[1:]
    assert server.places("pictures.zip") == [None, "bytes=25000-", "bytes=45000-" if ranges else "bytes=20000-"]


def test_a_line_that_stays_cut_leaves_a_part_to_resume_from(coco, server, capsys):
    server.content.pop("texts.zip"), coco.pop(0)
    server.cuts = [10_000, 10_000, 10_000]
    line = error_line(server, capsys)
    assert "ended at 30,000 of" in line
    assert "30,000 bytes are kept" in line
    assert files() == ["data/coco/pictures.zip.part", "data/coco/pictures.zip.part.json"]
    assert run(server) == 0
    assert server.places("pictures.zip")[3] == "bytes=30000-"
    assert files() == WHOLE[1:]


@pytest.fixture
def listed(coco, server, monkeypatch):
    """One list of captions on the server, and its two versions: of equal length, each whole by itself and also when glued together."""
    old, new = (json.dumps([{"caption": f"{word} {number:06d}"} for number in range(4000)]).encode() for word in ("old", "new"))
    monkeypatch.setitem(download.DATA_SETS, "coco2014", [download.Item("list.json", "drive:unused", "coco", count=4000)])
    server.content["list.json"] = old
    assert len(old) == len(new) > 100_000
    return old, new


def interrupt(server, capsys, monkeypatch, kept=50_000):
    """Leave a part of `kept` bytes."""
    server.cuts = [kept]
    with monkeypatch.context() as patch:
        patch.setattr(download, "PAUSES", ())
        assert f"{kept:,} bytes are kept" in error_line(server, capsys)
    server.asked.clear()


LIST = Path("data/coco/list.json")
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
TAGS = {
    "etag": lambda data: {"ETag": f'"{hashlib.md5(data).hexdigest()}"'},
    "date": lambda data: {"Last-Modified": DATE.replace("07:", f"{data[14] % 24:02d}:")},
    "weak etag and date": lambda data: {"ETag": 'W/"same"', "Last-Modified": DATE.replace("07:", f"{data[14] % 24:02d}:")},
    "nothing": lambda data: {},
}


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("tags", TAGS)
def test_a_file_that_changed_on_the_server_is_never_glued_to_an_old_part(tags, if_range, listed, server, capsys, monkeypatch):
    server.validators, server.if_range = TAGS[tags], if_range
    interrupt(server, capsys, monkeypatch)
    server.content["list.json"] = listed[1]
    assert run(server) == 0
    assert LIST.read_bytes() == listed[1]
    assert files() == [str(LIST)]


@pytest.mark.parametrize("tags", TAGS)
def test_a_file_that_did_not_change_is_resumed_if_that_can_be_known(tags, listed, server, capsys, monkeypatch):
    server.validators = TAGS[tags]
    interrupt(server, capsys, monkeypatch)
    assert run(server) == 0
    assert LIST.read_bytes() == listed[0]
    known = {"etag": "ETag", "date": "Last-Modified", "weak etag and date": "Last-Modified"}.get(tags)
    expected = ("list.json", "bytes=50000-", TAGS[tags](listed[0])[known]) if known else ("list.json", None, None)
    assert server.asked == [expected]


def test_a_known_checksum_stands_in_for_what_the_server_does_not_say(listed, server, capsys, monkeypatch):
    item = download.Item("list.json", "drive:unused", "coco", count=4000, md5=hashlib.md5(listed[0]).hexdigest())
    monkeypatch.setitem(download.DATA_SETS, "coco2014", [item])
    server.validators = TAGS["nothing"]
    interrupt(server, capsys, monkeypatch)
    server.content["list.json"] = listed[1]
    assert "checksum of another file" in error_line(server, capsys)
    assert files() == []
    server.content["list.json"] = listed[0]
    interrupt(server, capsys, monkeypatch)
    assert run(server) == 0
    assert server.places("list.json") == ["bytes=50000-"]
    assert LIST.read_bytes() == listed[0]


@pytest.mark.parametrize("change", [b"", b"[]", b" " * 60_000, b"longer"])
def test_a_file_of_another_length_starts_over(change, listed, server, capsys, monkeypatch):
    server.validators = lambda data: {"ETag": '"the same for all"'}
    interrupt(server, capsys, monkeypatch)
    server.content["list.json"] = (listed[1] + b" " * 7) if change == b"longer" else change
    if change == b"longer":
        assert run(server) == 0
        assert LIST.read_bytes() == listed[1] + b" " * 7
    else:
        assert "expected 4,000 captions" in error_line(server, capsys)
        assert not LIST.exists()


SPANS = ["", "bytes 0-9/10", "bytes */*", "bytes 50001-{last}/{all}", "bytes 50000-{last}/*", "bytes 50000-{all}/{all}", "lines 1-2/3"]
SPANS += ["bytes -1-2/3", "bytes 50000-{last}/" + "9" * 5000]


@pytest.mark.parametrize("span", SPANS)
def test_a_206_with_another_range_than_the_one_asked_for_starts_over(span, listed, server, capsys, monkeypatch):
    interrupt(server, capsys, monkeypatch)
    server.spans = lambda start, length: span.format(last=length - 1, all=length)
    assert run(server) == 0
    assert LIST.read_bytes() == listed[0]
    assert server.places("list.json") == ["bytes=50000-", None]


@pytest.mark.parametrize("record", [None, b"", b"[" * 100_000, b"{}", b"[1]", b'{"address": 1}', b'{"total": "9", "validator": null}'])
def test_a_part_whose_record_is_missing_or_damaged_is_not_used(record, listed, server, capsys, monkeypatch):
    interrupt(server, capsys, monkeypatch)
    path = Path("data/coco/list.json.part.json")
    path.unlink() if record is None else path.write_bytes(record)
    assert run(server) == 0
    assert LIST.read_bytes() == listed[0]
    assert server.places("list.json") == [None]


def test_a_part_that_is_whole_or_too_long_is_seen(listed, server, capsys, monkeypatch):
    for more, places in ((b"", []), (b"more", [None])):
        LIST.unlink(missing_ok=True)
        interrupt(server, capsys, monkeypatch)
        Path("data/coco/list.json.part").write_bytes(listed[0] + more)
        assert run(server) == 0
        assert LIST.read_bytes() == listed[0]
        assert server.places("list.json") == places


def test_answers_of_other_kinds_are_said_in_one_line(listed, server, capsys, monkeypatch):
    server.status = 206
    assert "answered 206; expected 200" in error_line(server, capsys)
    server.status, server.lengths = 200, False
    assert run(server) == 0
    assert LIST.read_bytes() == listed[0]
    for mirror in ("ftp://host", "no address", "http://", "http://a b/", "http://ho\u00e9st/"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            download.main(["coco2014", "--mirror", mirror, "--folder", "new"])
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    for mirror in ("http://[1", "http://host:port", "http://a..b"):
        assert "Traceback" not in error_line(server, capsys, "--mirror", mirror, "--folder", "new")


def test_what_is_not_as_expected_is_refused_in_one_line(coco, server, capsys, monkeypatch):
    texts, pictures, listed = coco
    right = server.content["pictures.zip"]
    server.content["pictures.zip"] = right + b"x"
    assert f"has {len(right) + 1:,} bytes; expected {len(right):,}" in error_line(server, capsys)
    del server.content["pictures.zip"]
    assert "answered 404" in error_line(server, capsys)
    server.content["pictures.zip"] = right
    for name, changes, message in (
        ("checksum", {"md5": hashlib.md5(b"other").hexdigest()}, "checksum of another file"),
        ("count", {"count": 4}, "holds 3 files train2014/*.jpg; expected 4"),
    ):
        coco[1] = download.dataclasses.replace(pictures, **changes)
        assert message in error_line(server, capsys), name
        shutil.rmtree("data")
    coco[1] = download.dataclasses.replace(pictures, md5=hashlib.md5(right).hexdigest())
    server.content["list.json"] = b'[{"image_id": 1}]'
    assert "is a list of 1 with 0 captions; expected 4 captions" in error_line(server, capsys)
    assert Path("data/coco/annotations/list.json.wrong").exists()
    assert not Path("data/coco/annotations/list.json").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    shutil.rmtree("data/coco/train2014")
    assert "GB free" in error_line(server, capsys)
    assert error_line(server, capsys, "--mirror", "http://127.0.0.1:9").count("stopped") == 1


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"\xff\xfe", b"{}", b"[1, 2, 3, 4]", b'[{"caption": 1}, {"caption": 2}, [], null]', b""]
)
def test_a_list_that_is_none_is_kept_aside_and_said(content, coco, server, capsys):
    server.content["list.json"] = content
    assert "expected 4 captions. It is kept as list.json.wrong" in error_line(server, capsys)
    assert Path("data/coco/annotations/list.json.wrong").read_bytes() == content


def test_clotho_says_which_unpacker_it_needs_and_uses_the_one_there(server, workdir, capsys, monkeypatch):
    item = download.Item("sounds.7z", "http://unused", ".", "development/*.wav", 2)
    table = download.Item("clotho_captions_development.csv", "http://unused", ".")
    server.content |= {"sounds.7z": b"packed", table.name: b"file_name,caption_1\n"}
    monkeypatch.setitem(download.DATA_SETS, "clotho", [table, item])
    monkeypatch.setenv("PATH", str(workdir))
    command = ["clotho", "--mirror", server.url]
    with pytest.raises(SystemExit):
        download.main(command)
    assert "Install p7zip" in capsys.readouterr().err
    assert files() == ["data/clotho_captions_development.csv"]
    lines = ["#!/bin/sh", 'for word in "$@"; do case "$word" in -o*) out="${word#-o}/development";; esac; done']
    lines += ['/bin/mkdir -p "$out"', 'echo a > "$out/1.wav"', 'echo b > "$out/2.wav"', ""]
    Path("7z").write_text("\n".join(lines))
    Path("7z").chmod(0o755)
    assert download.main(command) == 0
    assert files() == ["data/clotho_captions_development.csv", "data/development/1.wav", "data/development/2.wav"]


def test_stopped_by_ctrl_c_it_keeps_the_part(server, workdir, root):
    server.content["train_caption.json"], server.slow = b"[" + b" " * 5_000_000 + b"]", 0.01
    command = [sys.executable, str(root / "data" / "download.py"), "annotations", "--mirror", server.url]
    # A shell that starts the tests in the background has its children ignore SIGINT; this one must not inherit that.
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **listens)
    part = Path("data/coco/annotations/train_caption.json.part")
    wait_until(lambda: part.is_file() and part.stat().st_size)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert "run the same command again" in told
    assert "Traceback" not in told
    assert 0 < part.stat().st_size < 5_000_002


def test_help_is_quick_and_names_are_checked(root):
    done = subprocess.run([sys.executable, "data/download.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0
    assert "coco2014" in done.stdout
    assert "--keep_archives" in done.stdout
    done = subprocess.run([sys.executable, "data/download.py", "imagenet"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'imagenet'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
