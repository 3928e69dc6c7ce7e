"""data/download.py against a server on loopback: going on, checks, and archives that are not what they should be."""

import hashlib
import http.server
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def download(root):
    """data/download.py as a module: data is no package."""
    spec = importlib.util.spec_from_file_location("download_script", root / "data" / "download.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` by name, with ranges; `cuts`: bytes after which one answer each breaks off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.asked, self.ranges, self.slow = {}, [], [], True, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        server.asked.append((name, self.headers.get("Range")))
        data = server.content.get(name)
        if data is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers.get("Range") and server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        if server.cuts:
            rest = rest[: server.cuts.pop(0)]
        try:
            for at in range(0, len(rest), 10_000):
                self.wfile.write(rest[at : at + 10_000])
                time.sleep(server.slow)
        except OSError:
            return  # whoever asked has gone

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def coco(download, server, workdir, monkeypatch):
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


def run(download, server, *words):
    return download.main(["coco2014", "--mirror", server.url, *words])


def error_line(download, server, capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(download, server, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download.py: error: ")]
    assert caught.value.code == 2 and len(lines) == 1
    return lines[0]


def files():
    return sorted(str(path) for path in Path("data").rglob("*") if path.is_file())


WHOLE = ["data/coco/annotations/captions_train2014.json", "data/coco/annotations/list.json"]
WHOLE += [f"data/coco/train2014/{number}.jpg" for number in range(3)]


def test_everything_lies_where_the_parse_scripts_look_and_is_fetched_once(coco, download, server, capsys):
    Path("data/coco/annotations").mkdir(parents=True)
    Path("data/coco/annotations/mine.json").write_text("{}")
    assert run(download, server) == 0
    assert files() == sorted([*WHOLE, "data/coco/annotations/mine.json"])
    asked = len(server.asked)
    assert run(download, server) == 0 and len(server.asked) == asked == 3
    assert "pictures.zip: there" in capsys.readouterr().out
    assert run(download, server, "--folder", "other", "--keep_archives") == 0 and Path("other/coco/pictures.zip").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_line_is_taken_up_where_it_broke(ranges, coco, download, server):
    server.content.pop("texts.zip"), coco.pop(0)
    server.cuts, server.ranges = [25_000, 20_000], ranges
    assert run(download, server) == 0 and files() == WHOLE[1:]
    asked = [where for name, where in server.asked if name == "pictures.zip"]
    assert asked[0] is None and asked[1] == "bytes=25000-" and asked[2] == ("bytes=45000-" if ranges else "bytes=20000-")


def test_a_line_that_stays_cut_leaves_a_part_to_go_on_from(coco, download, server, capsys):
    server.content.pop("texts.zip"), coco.pop(0)
    server.cuts = [10_000, 10_000, 10_000]
    line = error_line(download, server, capsys)
    assert "ended at 30,000 of" in line and "30,000 bytes are kept" in line
    assert files() == ["data/coco/pictures.zip.part"]
    assert run(download, server) == 0 and server.asked[3] == ("pictures.zip", "bytes=30000-") and files() == WHOLE[1:]


def test_a_part_that_is_whole_or_too_long_is_seen(coco, download, server):
    data = server.content["pictures.zip"]
    for kept in (data, data + b"more"):
        shutil.rmtree("data", ignore_errors=True)
        Path("data/coco").mkdir(parents=True)
        Path("data/coco/pictures.zip.part").write_bytes(kept)
        assert run(download, server) == 0 and files() == WHOLE


def test_what_is_not_as_expected_is_refused_in_one_line(coco, download, server, capsys, monkeypatch):
    texts, pictures, listed = coco
    right = server.content["pictures.zip"]
    server.content["pictures.zip"] = right + b"x"
    assert f"has {len(right) + 1:,} bytes, and {len(right):,} are expected" in error_line(download, server, capsys)
    del server.content["pictures.zip"]
    assert "answered 404" in error_line(download, server, capsys)
    server.content["pictures.zip"] = right
    for name, changes, message in (
        ("checksum", {"md5": hashlib.md5(b"other").hexdigest()}, "checksum of another file"),
        ("count", {"count": 4}, "holds 3 files train2014/*.jpg, and 4 are expected"),
    ):
        coco[1] = download.dataclasses.replace(pictures, **changes)
        assert message in error_line(download, server, capsys), name
        shutil.rmtree("data")
    coco[1] = download.dataclasses.replace(pictures, md5=hashlib.md5(right).hexdigest())
    server.content["list.json"] = b'[{"image_id": 1}]'
    assert "is a list of 1; expected 4 captions" in error_line(download, server, capsys)
    assert Path("data/coco/annotations/list.json.wrong").exists() and not Path("data/coco/annotations/list.json").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    shutil.rmtree("data/coco/train2014")
    assert "GB free" in error_line(download, server, capsys)
    assert error_line(download, server, capsys, "--mirror", "http://127.0.0.1:9").count("stopped") == 1


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg", "link"])
def test_a_zip_that_wants_to_escape_writes_nothing(name, coco, download, server, capsys):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as packed:
        packed.writestr("train2014/0.jpg", b"")
        entry = zipfile.ZipInfo(name)
        if name == "link":
            entry.external_attr = 0o120777 << 16
        packed.writestr(entry, "/etc")
    server.content["pictures.zip"] = memory.getvalue()
    coco[1] = download.dataclasses.replace(coco[1], size=None)
    assert "write outside its folder" in error_line(download, server, capsys)
    assert files() == [WHOLE[0], "data/coco/pictures.zip"] and not Path("evil.jpg").exists() and not Path("data/evil.jpg").exists()


def test_a_page_or_a_damaged_zip_in_place_of_one_is_said(coco, download, server, capsys):
    coco[1] = download.dataclasses.replace(coco[1], size=None)
    right = server.content["pictures.zip"]
    server.content["pictures.zip"] = b"<html>sign in</html>"
    assert "is not a zip" in error_line(download, server, capsys)
    Path("data/coco/pictures.zip").unlink()
    server.content["pictures.zip"] = right[:30_000] + b"x" * 100 + right[30_100:]
    assert "is damaged" in error_line(download, server, capsys)
    assert files() == [WHOLE[0], "data/coco/pictures.zip"], "nothing half-unpacked stays"


def test_clotho_says_which_unpacker_it_needs_and_uses_the_one_there(download, server, workdir, capsys, monkeypatch):
    item = download.Item("sounds.7z", "http://unused", ".", "development/*.wav", 2)
    table = download.Item("clotho_captions_development.csv", "http://unused", ".")
    server.content |= {"sounds.7z": b"packed", table.name: b"file_name,caption_1\n"}
    monkeypatch.setitem(download.DATA_SETS, "clotho", [table, item])
    monkeypatch.setenv("PATH", str(workdir))
    command = ["clotho", "--mirror", server.url]
    with pytest.raises(SystemExit):
        download.main(command)
    assert "Install p7zip" in capsys.readouterr().err and files() == ["data/clotho_captions_development.csv"]
    lines = ["#!/bin/sh", 'for word in "$@"; do case "$word" in -o*) out="${word#-o}/development";; esac; done']
    lines += ['/bin/mkdir -p "$out"', 'echo a > "$out/1.wav"', 'echo b > "$out/2.wav"', ""]
    Path("7z").write_text("\n".join(lines))
    Path("7z").chmod(0o755)
    assert download.main(command) == 0
    assert files() == ["data/clotho_captions_development.csv", "data/development/1.wav", "data/development/2.wav"]


def test_stopped_by_ctrl_c_it_keeps_the_part(download, server, workdir, root):
    server.content["train_caption.json"], server.slow = b"[" + b" " * 5_000_000 + b"]", 0.01
    command = [sys.executable, str(root / "data" / "download.py"), "annotations", "--mirror", server.url]
    # A shell that starts the tests in the background has its children ignore SIGINT; this one must not inherit that.
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **listens)
    part = Path("data/coco/annotations/train_caption.json.part")
    for _ in range(500):
        if part.is_file() and part.stat().st_size:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "run the same command again" in told and "Traceback" not in told
    assert 0 < part.stat().st_size < 5_000_002


def test_help_is_quick_and_names_are_checked(root):
    done = subprocess.run([sys.executable, "data/download.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "coco2014" in done.stdout and "--keep_archives" in done.stdout
    done = subprocess.run([sys.executable, "data/download.py", "imagenet"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'imagenet'" in done.stderr and len(done.stderr.splitlines()) == 1
