"""The data sets and weights that published commands and recipes name, in miniature: laid out as the real ones, a handful of items each."""

import csv
import json
from pathlib import Path

import torch

import tiny
import weight_files

WIDTH, HEADS = 16, 2  # of the language models
PREFIX = 10  # of the published MLP weights
POST = "Late evening ✨ #sun number"


def save_coco_karpathy(folder, counts=(("train", 3), ("restval", 1), ("val", 2), ("test", 2))):
    """data/coco with Karpathy's splits: two captions a picture."""
    images = []
    for split, count in counts:
        for _ in range(count):
            number, place = len(images) + 1, "train2014" if split == "train" else "val2014"
            name = f"COCO_{place}_{number:012d}.jpg"
            tiny.save_picture(folder / f"data/coco/{place}/{name}", seed=number)
            sentences = [{"raw": tiny.CAPTIONS[(number + k) % 8], "imgid": number, "sentid": 2 * number + k, "tokens": []} for k in (0, 1)]
            images.append({"filepath": place, "filename": name, "cocoid": number, "imgid": number, "split": split, "sentences": sentences,
                           "sentids": [sentence["sentid"] for sentence in sentences]})  # fmt: skip
    path = folder / "data/coco/annotations/dataset_coco.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"dataset": "coco", "images": images}))


def save_food(folder, count=5):
    """data/food as Kaggle's archive unpacks. → captions of each Index"""
    rows = [["Index", "Captions"]]
    for number in range(count):
        tiny.save_picture(folder / f"data/food/archive/dataset/{number}.jpg", seed=100 + number)
        rows.append([number, tiny.CAPTIONS[number]])
    with open(folder / "data/food/archive/Captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return {str(number): {text} for number, text in rows[1:]}


def save_clotho(folder, counts=(("development", 3), ("validation", 2), ("evaluation", 2))):
    """data/ with the clips and captions of Clotho's parts: five captions a clip, 0.3 s each. → captions of each clip"""
    import numpy as np
    import soundfile

    captions = {}
    for place, (part, count) in enumerate(counts):
        rows = [["file_name", *(f"caption_{k}" for k in range(1, 6))]]
        (folder / "data" / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f"{part} {number}.wav"
            seed = 10 * place + number
            soundfile.write(folder / "data" / part / name, np.random.default_rng(seed).uniform(-0.3, 0.3, 6600) * (1 + number), 22050)
            rows.append([name, *(f"{text} ({seed})" for text in tiny.CAPTIONS[:5])])
            captions[name] = set(rows[-1][1:])
        with open(folder / f"data/clotho_captions_{part}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return captions


def save_flickr(folder, count=7):
    """data/flickr30k as Kaggle's archive unpacks: results.csv with five captions a picture."""
    place = folder / "data/flickr30k/flickr30k_images"
    lines = ["image_name| comment_number| comment"]
    for number in range(count):
        tiny.save_picture(place / f"flickr30k_images/{1000 + number}.jpg", seed=200 + number)
        lines += [f"{1000 + number}.jpg| {k}| {tiny.CAPTIONS[(number + k) % 8]}" for k in range(5)]
    (place / "results.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_instagram(folder, train=4, test=2):
    """instagram/, a data set with the splits train and test as save_to_disk writes it; some posts are long. → the folder"""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    parts, number = {}, 0
    for split, count in (("train", train), ("test", test)):
        cells = []
        for _ in range(count):
            path = tiny.save_picture(folder / f"pictures/{number}.jpg", seed=300 + number)
            post = f"{POST} {number} " + "so good " * 20 * number
            cells.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "caption": post})
            number += 1
        parts[split] = datasets.Dataset.from_list(cells, features=features)
    datasets.DatasetDict(parts).save_to_disk(folder / "instagram")
    return folder / "instagram"


def save_published_mlp(path, gpt2_folder, seed):
    """A file as the published COCO and Conceptual Captions weights are (MLP, ViT-B/32), of random weights, for the GPT-2 in that folder."""
    config = json.loads((Path(gpt2_folder) / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    width, layers, positions = config["n_embd"], config["n_layer"], config["n_positions"]
    gpt = weight_files.draw_tensors(weight_files.gpt2_shapes(width, layers, config["vocab_size"], positions), generator, scale=0.05)
    gpt["lm_head.weight"] = gpt["transformer.wte.weight"]
    mapper = weight_files.draw_tensors(weight_files.mapper_shapes("mlp", 512, width, PREFIX), generator, scale=0.05)
    buffers = weight_files.old_buffers("", layers)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weight_files.under("clip_project.", mapper) | weight_files.under("gpt.", gpt | buffers), path)
    path.with_suffix(".json").write_text(json.dumps({"model": {"n_head": config["n_head"]}}))  # what no shape tells


def save_clipxgpt(path, gpt2_folder, seed=5):
    """A file as CLIPxGPT's published S weights are, vision tower included, of random weights, for that folder's tokenizer."""
    config = json.loads((Path(gpt2_folder) / "config.json").read_text())
    state, facts = weight_files.random_file("clipxgpt", seed, config["vocab_size"], config["eos_token_id"])
    mapper = weight_files.mapper_shapes("encoder", 64, facts.width, facts.length, layers=facts.layers)  # 64: the width of that tower
    state = {name: tensor for name, tensor in state.items() if not name.startswith("mp.")}
    state |= weight_files.under("mp.", weight_files.draw_tensors(mapper, torch.Generator().manual_seed(seed)))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "model_state_dict": state}, path)
    path.with_suffix(".json").write_text(json.dumps({"model": {"n_head": facts.heads}}))
