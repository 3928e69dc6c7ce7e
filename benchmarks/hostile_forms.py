"""Odd but proper inputs for benchmarks.hostile, of which it is known what must come out: forms that people have."""

import json
import os
import unicodedata
from pathlib import Path

from benchmarks.hostile_world import FORMS, TEXTS, load_script, valid_members, write_annotations, write_json, write_shard, write_table


def count_output():
    """Count the items that a script wrote: images and captions of new.pkl, or entries of another output."""
    features = next((name for name in ("new.pkl", "new_train.pkl") if os.path.exists(name)), None)
    if features:
        features = load_script("features.store").load_features(features)
        return len(features.clip_embedding), len(features.captions)
    if os.path.exists("said.json"):
        found = len(json.loads(Path("said.json").read_text(encoding="utf-8")))
    elif os.path.exists("scores.json"):
        found = json.loads(Path("scores.json").read_text(encoding="utf-8"))["images"]
    else:
        found = 4 * any(Path("run").glob("*-000.pt")) if os.path.exists("run") else 0
    return found, found


def expect(images, captions=None):
    """Make a check that the output holds so many images and captions."""

    def check(said):
        found = count_output()
        wanted = images, images if captions is None else captions
        fits = found == wanted or found[0] == wanted[0] and captions is None
        return None if fits else f"{found} in place of {wanted} images and captions"

    return check


def _flickr(draw, case):
    names = [f"{number}.jpg" for number in range(4)]
    case.check = expect(4, 4)
    form = draw.choice(["numbers", "list", "bars", "token", "latin-1"])
    if form == "numbers":
        rows = [["image_name", "comment_number", "comment"], *([name, 0, text] for name, text in zip(names, TEXTS))]
        write_table("flickr.csv", rows)
    elif form == "list":
        rows = [[json.dumps([text, text + " Again."]), "train", name, 0] for name, text in zip(names, TEXTS)]
        case.check, case.argv = expect(4, 8), [*case.argv[:6], *case.argv[10:]]  # without shares: it has splits
        write_table("flickr.csv", [["raw", "split", "filename", "img_id"], *rows])
    elif form == "bars":
        lines = ["image_name| comment_number| comment", *(f"{name}| 0| {text}" for name, text in zip(names, TEXTS))]
        Path("flickr.csv").write_text("\n".join(lines), encoding="utf-8")
    elif form == "token":
        Path("flickr.csv").write_text("".join(f"{name}#0\t{text}\n" for name, text in zip(names, TEXTS)), encoding="utf-8")
    else:
        write_table("flickr.csv", [["image", "caption"], *([name, "Café, at night."] for name in names)], "latin-1")


def _folder(draw, case):
    form = draw.choice(["semicolon", "latin-1", "cell list", "composed", "backslash", "same stems", "spaces", "jsonl list"])
    names, texts = [f"{number}.jpg" for number in range(4)], TEXTS
    for path in Path("own").glob("*.txt"):
        path.unlink()
    if form == "composed":
        Path("own/0.jpg").rename("own/" + unicodedata.normalize("NFD", "é.jpg"))
        names[0] = unicodedata.normalize("NFC", "é.jpg")
    if form == "backslash":
        Path("own/sub").mkdir()
        Path("own/0.jpg").rename("own/sub/0.jpg")
        names[0] = "sub\\0.jpg"
    if form == "same stems":
        (Path("own/b")).mkdir()
        os.link("own/1.jpg", "own/b/0.jpg")
        names.append("b/0.jpg")
        texts = [*TEXTS, "Another."]
    if form == "spaces":
        names[1] = " 1.jpg "
    if form == "cell list":
        texts = [json.dumps([text, "Another."]) for text in TEXTS]
    if form == "jsonl list":
        lines = [json.dumps({"file_name": name, "caption": [text, "Another."]}) for name, text in zip(names, TEXTS)]
        Path("own/metadata.jsonl").write_text("\n".join(lines))
    else:
        encoding, rows = "utf-8", [["file_name", "caption"], *map(list, zip(names, texts))]
        if form == "latin-1":
            encoding, rows = "latin-1", [rows[0], *([name, "Café, at night."] for name in names)]
        write_table("own/metadata.csv", rows, encoding, delimiter=";" if form == "semicolon" else ",")
    case.check = expect(len(names), len(names) * (2 if "list" in form else 1))


def _shards(draw, case):
    form = draw.choice(["dots", "list", "text key", "gzip", "capitals", "sentences", "folders", "empty txt"])
    members = valid_members()
    if form == "dots":
        members = [(name.replace("00", "a.b", 1), content) for name, content in members]
    elif form in ("list", "text key", "sentences"):
        keys = {"list": "caption", "text key": "text", "sentences": "captions"}
        value = {"text key": lambda text: text}.get(form, lambda text: [text, "Another."])
        members[4:] = [(f"{number:09d}.json", json.dumps({keys[form]: value(text)}).encode()) for number, text in enumerate(TEXTS)]
    elif form == "empty txt":
        members += [(f"{number:09d}.json", json.dumps({"caption": text}).encode()) for number, text in enumerate(TEXTS)]
        members[4:8] = [(name, b"") for name, _ in members[4:8]]
    elif form == "capitals":
        members = [(name.replace(".jpg", ".JPG"), content) for name, content in members]
    elif form == "folders":
        members = [(f"{'ab'[number % 2]}/{name}", content) for number, (name, content) in enumerate(members)]
    write_shard("shard.tar", members, "w:gz" if form == "gzip" else "w")
    if form == "gzip":
        os.rename("shard.tar", "shard.tar.gz")
        case.argv = ["shard.tar.gz" if word == "shard.tar" else word for word in case.argv]
    case.check = expect(4, 8 if form in ("list", "sentences") else 4)


def _coco(draw, case):
    write_annotations(draw.choice(FORMS), "captions.json")
    if draw.random() < 0.3:
        Path("captions.json").write_text(Path("captions.json").read_text().replace("A dog", "A \\ud83c dog"), encoding="utf-8")
    case.check = expect(4, 4)


def _references(draw, case):
    write_annotations(draw.choice(FORMS), "captions.json")
    write_json("said_before.json", [{"image_id": number, "caption": text} for number, text in enumerate(TEXTS)])
    case.check = expect(4)


def _clotho(draw, case):
    columns = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
    rows = [[f"{number}.wav", *["Café &amp; bar."] * 5] for number in range(4)]
    rows[1][0] = draw.choice(["1.wav", " 1.wav", "1.wav "])
    write_table("clotho.csv", [columns, *rows], draw.choice(["latin-1", "utf-8", "utf-8-sig", "cp1252"]), delimiter=draw.choice(",;"))
    case.check = expect(4, 20)


def _checkpoint(draw, case):
    import torch

    state = torch.load("out/model-000.pt", weights_only=True)
    before = draw.choice(["module.", "_orig_mod.", "model."])
    state = {before + name: tensor for name, tensor in state.items()}
    torch.save({"state_dict": state, "epoch": 1} if before == "model." else state, "out/model-000.pt")
    case.check = expect(4)


PROPER = {
    "parse_flickr.py": _flickr, "parse_folder.py": _folder, "parse_conceptual.py": _shards, "parse_coco.py": _coco,
    "parse_clotho.py": _clotho, "evaluate.py": _references, "predict.py": _checkpoint,
}  # fmt: skip
