"""The valid inputs that benchmarks.hostile changes: a small world with an input for every script, and the commands that read them."""

import csv
import importlib
import io
import json
import os
import re
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["A dog runs.", "Two cats sleep on a chair.", "A red car.", "Café ☕ at night 🌃."]
QUICK = ["--device", "cpu", "--entry_length", "3", "--decoding", "greedy"]
FEATURES = ["--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
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
    "data/download.py": ["annotations", "--folder", "fetched", "--mirror", "file:mirror"],
}  # fmt: skip
READERS = ["train.py", "predict.py --data", "evaluate.py --data", "check.py", "check.py describe"]
PARSERS = [name for name in SCRIPTS if name.startswith("parse_")]
# What holds the captions of each parse script. The two in own/ are written only where they are tried.
ANNOTATIONS = {"parse_coco.py": "captions.json", "parse_flickr.py": "flickr.csv", "parse_clotho.py": "clotho.csv",
               "parse_conceptual.py --tsv": "cc.tsv", "parse_huggingface.py": "rows.parquet",
               "parse_folder.py": "own/metadata.csv", "parse_food.py": "own/Captions.csv"}  # fmt: skip


def build_world(folder):
    """Write a small valid input for every script into a folder, with the tests' tiny models."""
    import pandas as pd
    import soundfile
    import torch

    sys.path.append(str(ROOT / "tests"))
    import tiny

    save_features = importlib.import_module("features.store").save_features
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
    write_annotations("coco", "captions.json")
    Path("mirror").mkdir()
    write_json("mirror/train_caption.json", [{"image_id": number, "caption": TEXTS[number]} for number in range(4)])
    write_json("said_before.json", [{"image_id": number, "caption": TEXTS[-number]} for number in range(4)])
    write_table("flickr.csv", [["image", "caption"], *([f"{number}.jpg", TEXTS[number]] for number in range(4))])
    columns = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
    write_table("clotho.csv", [columns, *([f"{number}.wav", *[TEXTS[number]] * 5] for number in range(4))])
    write_table("cc.tsv", [["caption", "url"], *([TEXTS[number], f"{number}.jpg"] for number in range(4))], delimiter="\t")
    images = [{"bytes": Path(f"photos/{number}.jpg").read_bytes(), "path": None} for number in range(4)]
    pd.DataFrame({"image": images, "caption": TEXTS}).to_parquet("rows.parquet")
    write_shard("shard.tar", valid_members())
    captions = [{"image_id": number, "caption": TEXTS[number], "id": number, "clip_embedding": number} for number in range(4)]
    vectors = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    for name in ("train.pkl", "train"):
        save_features(name, vectors, captions, {"encoder": "ViT-B/32", "normalized": False})
    argv = [*SCRIPTS["train.py"], "--prefix", "model"]
    argv[argv.index("run")] = "out"
    assert load_script("train.py").main(argv) == 0
    os.chdir(ROOT)


def write_json(path, content):
    Path(path).write_text(json.dumps(content, default=str), encoding="utf-8")


def write_table(path, rows, encoding="utf-8", **options):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, **options).writerows(rows)


def write_annotations(form, path):
    """Write the captions of photos/ in one of the forms that published sets have."""
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    rows = [{"id": number, "image_id": number, "caption": TEXTS[number]} for number in range(4)]
    if form == "nocaps":
        images = [{**image, "open_images_id": "0a", "domain": "near-domain", "coco_url": "https://host/a.jpg"} for image in images]
    if form == "vizwiz":
        rows = [{**row, "is_rejected": False, "is_precanned": False, "text_detected": True} for row in rows]
        rows += [{**rows[0], "caption": "Quality issues are too severe to recognize visual content.", "is_rejected": True}]
    if form == "karpathy":
        sentences = [[{"raw": text, "sentid": number, "tokens": text.split()}] for number, text in enumerate(TEXTS)]
        content = {"dataset": "coco", "images": [
            {"filename": f"{number}.jpg", "split": "train", "cocoid": number, "sentences": sentences[number]} for number in range(4)
        ]}  # fmt: skip
    elif form == "lavis":
        content = [{"image": f"{number}.jpg", "caption": [TEXTS[number]], "image_id": f"coco_{number}"} for number in range(4)]
    else:
        content = {"images": images, "annotations": rows}
    write_json(path, content)


FORMS = ("coco", "nocaps", "vizwiz", "karpathy", "lavis")


def valid_members():
    """List the members of a valid shard: (name, content)."""
    pictures = [(f"{number:09d}.jpg", Path(f"photos/{number}.jpg").read_bytes()) for number in range(4)]
    return [*pictures, *((f"{number:09d}.txt", TEXTS[number].encode()) for number in range(4))]


def write_shard(path, members, mode="w", **options):
    """Write a tar. A member is (name, content), or a TarInfo without content."""
    with tarfile.open(path, mode, **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))


def load_script(name):
    """Import what runs under this name."""
    return importlib.import_module(name.split()[0].removesuffix(".py").replace("/", "."))


def has_script(name):
    try:
        load_script(name)
    except ModuleNotFoundError:
        return False
    return True


_option_names = {}


def option_names(name):
    """List the options that a script's --help names."""
    if name not in _option_names:
        text = io.StringIO()
        with redirect_stdout(text), redirect_stderr(text):
            try:
                load_script(name).main([*(["describe"] if name == "models.hub" else []), "--help"])
            except SystemExit:
                pass
        _option_names[name] = sorted(set(re.findall(r"(?<![\w-])--\w+", text.getvalue())) - {"--help"}) or ["--x"]
    return _option_names[name]


def place_of_output(argv):
    """Return the name that a command writes to, or None."""
    option = next((word for word in ("--out", "--out_dir") if word in argv), None)
    place = argv[argv.index(option) + 1] if option else None
    return "new_train.pkl" if "flickr.csv" in argv else place
