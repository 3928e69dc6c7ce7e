"""Seeded changes that benchmarks.hostile makes to valid inputs. Nothing outside the folder of an input is touched."""

import json
import os
import pickle
import socket
import zlib
from pathlib import Path

import numpy as np

from benchmarks.hostile_world import ANNOTATIONS, FORMS, TEXTS, write_annotations, write_json, write_table

ODD = [
    None, True, -1, 0, 1.5, 10**30, -(10**30), float("nan"), float("inf"), "", " ", "x", "\ud800", "\0", "é" * 300, "../../up",
    "<|endoftext|>", [], {}, [[]], [None], {"a": 1}, ["a", 2], [1, 2, 3], "1e999", b"bytes", 2**63, "9" * 5000, "²", "a\nb", -0.0, ("a",),
]  # fmt: skip
WORDS = [
    "", " ", "0", "-1", "1e-40", "1e40", "nan", "inf", "99999999999999999999", "0.5", "x", "é☕", "\udcff", "a\0b", "../up", "no/such/file",
    "photos", "train.pkl", "captions.json", "photos/0.jpg", "out", ".", "%", "{", "100%", "--", "-x", "2", "1", "²", "\ud800", "x" * 5000,
    "9223372036854775807", "-9223372036854775809", "1e999", "0x10", "1_0", "a\nb", "{0..9}", "{0..999999999}", "{a", "*.jpg", "http://nowhere.invalid/x",
    "odd.fifo",
]  # fmt: skip


def change_bytes(draw, path):
    """Change, cut out or insert a few bytes; or cut the file off; or make it empty."""
    content = bytearray(Path(path).read_bytes())
    way = draw.random()
    if way < 0.15:
        content = content[: draw.randrange(len(content) + 1)]
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(content) + 1)
        content[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    Path(path).write_bytes(b"" if way > 0.97 else bytes(content))


def change_tree(draw, value, depth=0):
    """Replace, remove or add one thing somewhere in a tree of plain containers, tensors and arrays."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.12:
            return {k: v for k, v in value.items() if k is not key}
        if way < 0.2:
            return {**value, draw.choice(["extra", "details", "", "image"]): draw.choice(ODD)}
        return {**value, key: change_tree(draw, value[key], depth + 1)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        way = draw.random()
        if way < 0.1:
            return value[:place] + value[place + 1 :]
        if way < 0.2:
            return [*value, draw.choice([value[place], *ODD])]
        return [*value[:place], change_tree(draw, value[place], depth + 1), *value[place + 1 :]]
    if hasattr(value, "dtype") and hasattr(value, "flatten") and draw.random() < 0.85:
        return change_tensor(draw, value)
    return draw.choice(ODD)


def change_tensor(draw, tensor):
    import torch

    ways = [
        lambda: tensor * float("nan"), lambda: tensor[:-1], lambda: tensor[..., :-1], lambda: tensor.flatten(), lambda: tensor[None],
        lambda: tensor.to(torch.float16), lambda: tensor.to(torch.int64), lambda: tensor.to(torch.complex64), lambda: tensor.double(),
        lambda: tensor[:0], lambda: tensor * 1e38, lambda: tensor.numpy(), lambda: tensor.tolist(), lambda: torch.zeros(()),
        lambda: tensor.bool(), lambda: torch.nn.Parameter(tensor), lambda: tensor.numpy().astype(object), lambda: tensor.to_sparse(),
    ]  # fmt: skip
    try:
        return draw.choice(ways)()
    except (IndexError, RuntimeError):
        return tensor[None]


def change_text(draw, text):
    """Change a text file as people and programs do."""
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    line = lines[place]
    ways = [
        line[: len(line) // 2], line + "," + line, line.replace(",", ";"), line.replace(",", "\t"), '"' + line, line * 3000, "",
        "\0" + line, "[" * 100_000, line.upper(), "\ufeff" + line, "../" + line, '["a", "b"]', line.replace(".jpg", ".gif"),
        '{"a": ' * 2000, line + "x" * 200_000, line.replace(".jpg", ".jpg\0"), "\r" + line, "," * 3000, line.replace("A", '"A'),
        '"' + "[" * 50_000 + '"', line.replace(" ", "\u2028"), "9" * 5000 + line,
    ]  # fmt: skip
    lines[place] = draw.choice(ways)
    return "\n".join(lines[:1] if draw.random() < 0.05 else lines)


def change_text_file(draw, path):
    if draw.random() < 0.1:
        return change_bytes(draw, path)
    text = change_text(draw, Path(path).read_text(encoding="utf-8"))
    encoding = draw.choice(["utf-8"] * 6 + ["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252"])
    Path(path).write_bytes(text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"))


def change_json_file(draw, path):
    way = draw.random()
    if way < 0.06:
        Path(path).write_text(
            draw.choice(["[" * 100_000, '{"a":' * 100_000, '[{"image_id":' * 50_000, "9" * 10_000, "NaN", "null", "1e999"])
        )
    elif way < 0.2:
        change_bytes(draw, path)
    else:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for _ in range(draw.randint(1, 2)):
            content = change_tree(draw, content)
        write_json(path, content)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def draw_call(draw):
    """Draw a call that a stranger's pickle may ask for; the only command among them makes a file "owned" beside the input."""
    import torch

    ones = torch.ones(4)
    rebuild = torch._utils._rebuild_tensor_v2
    calls = [
        (os.system, "touch owned"), (eval, "open('owned', 'w')"), (set, range(300_000_000)), (bytearray, 10**11), (bytes, 10**11),
        (np.ndarray, (1,), np.dtype("O"), bytearray(8)), (np.ndarray, (10**9, 512), np.dtype("f4")), (np.dtype, "V8"), (np.dtype, "O"),
        (np.ndarray, (4, 512), np.dtype("f4"), bytearray(8)), (rebuild, ones.storage(), 0, (10**12, 512), (0, 0), False, {}),
        (rebuild, ones.storage(), 0, (4, 512), (512, 1), False, {}), (rebuild, ones.storage(), -1, (4,), (1,), False, {}),
        (rebuild, ones.storage(), 0, (4,), (-1,), False, {}), (torch.Size, [10**12]), (slice, 1, 2, 3), (range, 10**12),
        (getattr, ones, "device"), (np.dtype, [("a", "O")]), (torch.storage._load_from_bytes, zlib.compress(b"0" * 10**6)), (set, [set()]),
        (int, "9" * 4000), (Call, print, "x"), (open, "owned", "w"), (complex, 1, 2),
    ]  # fmt: skip
    return Call(*draw.choice(calls))


def change_pickle(draw):
    """Change train.pkl: its bytes, its content, or calls put into it; or a bomb in its place."""
    way = draw.random()
    if way < 0.25:
        return change_bytes(draw, "train.pkl")
    if way < 0.32:
        bombs = [
            b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x04" + b"(" * 100_000 + b".",
            b"\x80\x04]\x94" + b"h\x00a" * 99 + b".",
            b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x04B\xff\xff\xff\x7f.", b"\x80\x04" + b"}]r\xff\xff\xff\x7f.",
            b"\x80\x04]" + b"2\x86" * 60 + b".", b"L" + b"9" * 100_000 + b"L\n.", b"cos\nsystem\n(S'touch owned'\ntR.",
            b"cposix\n.", b"N.", b"",
            b"\x80\x04}(]K\x01u.", b"\x80\x04(K\x01K\x02\x90.", b"\x80\x04]]a.", b"\x80\x09N.", b"Pevil\n.", b"\x80\x04\x82\x01.",
        ]  # fmt: skip
        return Path("train.pkl").write_bytes(draw.choice(bombs))
    content = pickle.loads(Path("train.pkl").read_bytes())  # our own file
    for _ in range(draw.randint(1, 2)):
        if way < 0.55:
            place = draw.choice([content, content["meta"], draw.choice(content["captions"]), content])
            place[draw.choice([*place, "extra"])] = draw_call(draw)
            break
        content = change_tree(draw, content)
    Path("train.pkl").write_bytes(pickle.dumps(content, draw.choice([2, 4, 5])))


def change_checkpoint(draw):
    import torch

    if draw.random() < 0.55:
        return change_json_file(draw, "out/model.json")
    if draw.random() < 0.4:
        return change_bytes(draw, "out/model-000.pt")
    torch.save(change_tree(draw, dict(torch.load("out/model-000.pt", weights_only=True))), "out/model-000.pt")


def change_directory(draw):
    """Change one file of the feature directory `train`."""
    paths = sorted(path for path in Path("train").rglob("*") if path.is_file())
    path = draw.choice(paths)
    way = draw.random()
    if way < 0.07:
        path.unlink()
    elif way < 0.14:
        path.write_bytes(draw.choice(paths).read_bytes())
    elif way < 0.28:
        place_oddity(draw, path)
    elif path.suffix == ".npy" and way < 0.6:
        change_header(draw, path)
    elif path.suffix == ".parquet" and way < 0.8:
        change_parquet(draw, path)
    elif path.suffix == ".json" and way < 0.8:
        change_json_file(draw, path)
    else:
        change_bytes(draw, path)


def change_header(draw, path):
    """Change what the header of a .npy says."""
    content = path.read_bytes()
    shape = draw.choice([b"(4000000000000, 512)", b"(4, 0)", b"(-4, 512)", b"(2048,)", b"(4, 4, 128)", b"()",
                         b"(4.0, 512)", b"(True, 2048)",
                         b"(4611686018427387904, 4)", b"(4, 512", b"(0, 512)", b"(4, 9223372036854775808)", b"[4, 512]",
                         b"(2, 512)"])  # fmt: skip
    kind = draw.choice([b"|O8", b">f4", b"<f2", b"<i4", b"<c8", b"|V4", b"<f8", b"<M8[s]", b"|S4", b"x"])
    new = content.replace(b"(4, 512)", shape) if draw.random() < 0.6 else content.replace(b"<f4", kind)
    if draw.random() < 0.5:  # the header as long as it was
        new = new[: len(content) - 4 * 2048] + content[-4 * 2048 :]
    path.write_bytes(new)


def change_parquet(draw, path):
    """Change a column of a metadata file, or add one of another tool."""
    import pandas as pd

    frame = pd.read_parquet(path)
    column = draw.choice(list(frame))
    value = draw.choice(
        [None, -1, 7, "x", 1.5, ["a"], ["a", "b"], {"a": 1}, [None], [["a"]], b"\xff", True, "[" * 100_000, "{}", '{"caption": 1}', [""]]
    )
    if draw.random() < 0.2:
        frame = frame.drop(columns=column)
    else:
        frame[draw.choice([column, "details", "key", "image_id", "more_captions", "clip_embedding"])] = [value] * len(frame)
    frame = pd.concat([frame, frame]) if draw.random() < 0.1 else frame
    frame.to_parquet(path, compression=draw.choice(["snappy", "gzip", None]))


def place_oddity(draw, path):
    """Put a FIFO, a socket, a folder or a broken link where a file is, or nothing but zeros."""
    path = Path(path)
    kind = draw.choice(["fifo", "socket", "folder", "loop", "dangling", "zeros", "empty"])
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # addresses of sockets are short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
        os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling"):
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    else:
        path.write_bytes(bytes(3000 * (kind == "zeros")))


def change_annotations(draw, name):
    """Change the captions that a parse script reads."""
    path = ANNOTATIONS[name]
    if path.startswith("own/"):
        column = "file_name" if name == "parse_folder.py" else "Index"
        write_table(path, [[column, "caption"], *([f"{number}.jpg", TEXTS[number]] for number in range(4))])
    if path.endswith(".json"):
        write_annotations(draw.choice(FORMS), path)
    if draw.random() < 0.05:
        place_oddity(draw, path)
    elif path.endswith(".parquet"):
        change_parquet(draw, Path(path)) if draw.random() < 0.5 else change_bytes(draw, path)
    else:
        (change_json_file if path.endswith(".json") else change_text_file)(draw, path)


def change_references(draw):
    """Change what evaluate.py reads. Returns the options that name it."""
    path = draw.choice(["captions.json", "said_before.json", "said.csv", "said.jsonl", "said.json", "clotho.csv"])
    rows = [
        {"image_id": number, "file_name": f"{number}.jpg", "rank": 1, "caption": text, "score": -1.5} for number, text in enumerate(TEXTS)
    ]
    if path == "captions.json":
        write_annotations(draw.choice(FORMS), path)
    elif path == "said.csv":
        write_table(path, [list(rows[0]), *(list(row.values()) for row in rows)])
    elif path == "said.jsonl":
        Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path == "said.json":
        write_json(path, rows)
    if draw.random() < 0.05:
        place_oddity(draw, path)
    else:
        (change_json_file if path.endswith(".json") else change_text_file)(draw, path)
    return path
