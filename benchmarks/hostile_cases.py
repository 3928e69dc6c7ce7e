"""Inputs for benchmarks.hostile: a small valid world, and seeded changes of each kind to it.

Nothing outside the folder of an input is touched.
"""

import csv
import dataclasses
import io
import json
import os
import pickle
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np

TEXTS = ["A dog runs.", "Two cats sleep on a chair.", "A red car.", "Café ☕ at night 🌃."]
QUICK = ["--device", "cpu", "--entry_length", "3", "--decoding", "greedy"]
FEATURES = ["--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
ODD = [
    None, True, -1, 0, 1.5, 10**30, -(10**30), float("nan"), float("inf"), "", " ", "x", "\ud800", "\0", "é" * 300, "../../up",
    "<|endoftext|>", [], {}, [[]], [None], {"a": 1}, ["a", 2], [1, 2, 3], "1e999", b"bytes",
]  # fmt: skip
WORDS = [
    "", " ", "0", "-1", "1e-40", "1e40", "nan", "inf", "99999999999999999999", "0.5", "x", "é☕", "\udcff", "a\0b", "../up", "no/such/file",
    "photos", "train.pkl", "captions.json", "photos/0.jpg", "out", ".", "%", "{", "100%", "--", "-x", "2", "1",
]  # fmt: skip


@dataclasses.dataclass
class Case:
    """One input: what is run, what is changed before, and what must hold after."""

    kind: str
    script: str
    argv: list
    prepare: object = None  # called in the case's folder
    check: object = None  # called there after exit code 0, with the text on stderr; returns what is wrong, or None
    encoding: str = "utf-8"
    twins: int = 1  # processes that run it at the same time
    interrupt: float = 0.0  # seconds until a signal; the command is then run again


SCRIPTS = {
    "train.py": ["--data", "train.pkl", "--out_dir", "run", "--gpt2_type", "gpt2", "--device", "cpu", "--epochs", "1", "--bs", "4",
                 "--warmup_steps", "1", "--prefix_length", "2", "--tracker", "none", "--mixed_precision", "no"],
    "predict.py": ["-C", "out/model-000.pt", "photos", "--out", "said.json", "--num_workers", "0", *QUICK],
    "predict.py --data": ["-C", "out/model-000.pt", "--data", "train.pkl", "--out", "said.json", *QUICK],
    "evaluate.py": ["--predictions", "said_before.json", "--references", "captions.json", "--metrics", "cider", "--bootstrap", "5",
                    "--out", "scores.json"],
    "evaluate.py --data": ["--data", "train.pkl", "-C", "out/model-000.pt", "--metrics", "bleu", "--bootstrap", "5", *QUICK],
    "check.py": ["train.pkl", "--sample", "0"],
    "check.py describe": ["describe", "train.pkl"],
    "parse_coco.py": ["--annotations", "captions.json", "--images", "photos", "--out", "new.pkl", *FEATURES],
    "parse_flickr.py": ["--annotations", "flickr.csv", "--images", "photos", "--out", "new.pkl", "--val_share", "0",
                        "--test_share", "0", *FEATURES],
    "parse_folder.py": ["own", "--val_share", "0", "--out", "new.pkl", *FEATURES],
    "parse_food.py": ["--data_path", "own", "--out", "new.pkl", *FEATURES],
    "parse_conceptual.py": ["--shards", "shard.tar", "--out", "new.pkl", *FEATURES],
    "parse_conceptual.py --tsv": ["--tsv", "cc.tsv", "--images", "photos", "--out", "new.pkl", *FEATURES],
    "parse_huggingface.py": ["rows.parquet", "--out", "new.pkl", *FEATURES],
    "parse_clotho.py": ["--captions_path", "clotho.csv", "--audio_path", "sounds", "--out", "new.pkl", *FEATURES],
    "models.hub": ["describe", "out/model-000.pt"],
    "reports.run": ["out", "--out", "page.html"],
    "data/download.py": ["annotations", "--folder", "fetched", "--mirror", "file:///nowhere"],
}  # fmt: skip


def build_world(folder, root):
    """Write a small valid input for every script into a folder, with the repository's own scripts and its tests' tiny models."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import pandas as pd
    import soundfile
    import torch

    import tiny
    import train
    from features.store import save_features

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    tiny.save_gpt2("gpt2")
    for number in range(4):
        tiny.save_picture(f"photos/{number}.jpg", number)
        tiny.save_picture(f"own/{number}.jpg", number)
        Path(f"own/{number}.txt").write_text(TEXTS[number] + "\n", encoding="utf-8")
        Path("sounds").mkdir(exist_ok=True)
        soundfile.write(f"sounds/{number}.wav", np.random.default_rng(number).uniform(-0.3, 0.3, 3000), 22050)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    rows = [{"id": number, "image_id": number, "caption": TEXTS[number]} for number in range(4)]
    write_json("captions.json", {"images": images, "annotations": rows})
    write_json("said_before.json", [{"image_id": number, "caption": TEXTS[-number]} for number in range(4)])
    write_table("flickr.csv", [["image", "caption"], *([f"{number}.jpg", TEXTS[number]] for number in range(4))])
    columns = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
    write_table("clotho.csv", [columns, *([f"{number}.wav", *[TEXTS[number]] * 5] for number in range(4))])
    write_table("cc.tsv", [["caption", "url"], *([TEXTS[number], f"{number}.jpg"] for number in range(4))], delimiter="\t")
    pictures = [Path(f"photos/{number}.jpg").read_bytes() for number in range(4)]
    pd.DataFrame({"image": [{"bytes": picture, "path": None} for picture in pictures], "caption": TEXTS}).to_parquet("rows.parquet")
    with tarfile.open("shard.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            for suffix, content in (("jpg", picture), ("txt", TEXTS[number].encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    captions = [{"image_id": number, "caption": TEXTS[number], "id": number, "clip_embedding": number} for number in range(4)]
    vectors = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    for name in ("train.pkl", "train"):
        save_features(name, vectors, captions, {"encoder": "ViT-B/32", "normalized": False})
    argv = [*SCRIPTS["train.py"], "--prefix", "model"]
    argv[argv.index("run")] = "out"
    assert train.main(argv) == 0
    os.chdir(root)


def write_json(path, content):
    Path(path).write_text(json.dumps(content, default=str), encoding="utf-8")


def write_table(path, rows, **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows(rows)


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
        "\0" + line, "[" * 100_000, line.upper(), "\ufeff" + line, "../" + line, '["a", "b"]',
        line.replace(".jpg", ".gif"), '{"a": ' * 2000,
    ]  # fmt: skip
    lines[place] = draw.choice(ways)
    return "\n".join(lines[:1] if draw.random() < 0.05 else lines)


def change_text_file(draw, path):
    text = change_text(draw, Path(path).read_text(encoding="utf-8"))
    Path(path).write_bytes(text.encode(draw.choice(["utf-8"] * 4 + ["utf-16", "utf-8-sig"]), "surrogatepass"))


def change_json_file(draw, path):
    way = draw.random()
    if way < 0.1:
        Path(path).write_text("[" * 100_000)
    elif way < 0.25:
        change_bytes(draw, path)
    else:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for _ in range(draw.randint(1, 2)):
            content = change_tree(draw, content)
        write_json(path, content)


def change_pickle(draw):
    if draw.random() < 0.3:
        return change_bytes(draw, "train.pkl")
    content = pickle.loads(Path("train.pkl").read_bytes())  # our own file
    for _ in range(draw.randint(1, 2)):
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
    paths = sorted(path for path in Path("train").rglob("*") if path.is_file())
    path = draw.choice(paths)
    way = draw.random()
    if way < 0.1:
        path.unlink()
    elif way < 0.2:
        path.write_bytes(draw.choice(paths).read_bytes())
    elif path.suffix == ".npy" and way < 0.5:
        header = path.read_bytes()
        shape = draw.choice([b"(4000000000000, 512)", b"(4, 0)", b"(-4, 512)", b"(2048,)", b"(4, 4, 128)", b"()"])
        path.write_bytes(header.replace(b"(4, 512)", shape))
    elif path.suffix == ".parquet" and way < 0.7:
        import pandas as pd

        frame = pd.read_parquet(path)
        column = draw.choice(list(frame))
        value = draw.choice([None, -1, 7, "x", 1.5, ["a"], {"a": 1}])
        if draw.random() < 0.2:
            frame = frame.drop(columns=column)
        else:
            frame[draw.choice([column, "details", "key"])] = [value] * len(frame)
        frame.to_parquet(path)
    else:
        change_bytes(draw, path)


def add_odd_files(draw, folder):
    """Put odd things among pictures or sounds."""
    folder, sample = Path(folder), next(iter(sorted(Path(folder).glob("0.*"))))
    odd = folder / f"odd{draw.choice(['', ' ü', '.a', chr(10)])}{sample.suffix if draw.random() < 0.8 else '.png'}"
    ways = {
        "empty": lambda: odd.write_bytes(b""), "bytes": lambda: odd.write_bytes(draw.randbytes(3000)), "fifo": lambda: os.mkfifo(odd),
        "folder": odd.mkdir, "loop": lambda: odd.symlink_to(odd), "dangling": lambda: odd.symlink_to("nowhere"),
        "cut": lambda: odd.write_bytes(sample.read_bytes()[: draw.randrange(1, 600)]), "great": lambda: odd.write_bytes(great_png()),
        "changed": lambda: (odd.write_bytes(sample.read_bytes()), change_bytes(draw, odd)),
        "raw name": lambda: os.link(sample, os.fsencode(folder) + b"/\xff\xfe" + os.fsencode(sample.suffix)),
    }  # fmt: skip
    ways[draw.choice(list(ways))]()


def great_png():
    """The head of a picture of 60,000 x 60,000 points."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def place_output(draw, name):
    """Put something that is no file of ours where the output goes. Returns a check that it is still there."""
    path, kind = Path(name), draw.choice(["fifo", "socket", "folder", "link", "link to folder", "below a file", "full folder"])
    keep = Path("keep.txt")
    keep.write_text("mine")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind == "link":
        path.symlink_to(keep)
    elif kind == "link to folder":
        path.symlink_to("photos")
    elif kind in ("folder", "full folder"):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
        (path / "img_emb").mkdir()
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
