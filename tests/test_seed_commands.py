"""Every published command line runs as printed, in a tree laid out as the data set is, with small random weights."""

import importlib
import json
import pickle
import shlex
from pathlib import Path

import pytest
import torch

import miniatures
import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = [line.strip() for line in (Path(__file__).parent / "seed_commands.txt").read_text().splitlines() if line.strip()]
COMMANDS = [  # (line, the path it writes)
    (line, LINES[number + 1].removeprefix("# writes ")) for number, line in enumerate(LINES) if not line.startswith("#")
]
IMAGES = [("318556", "train2014"), ("116100", "train2014"), ("42", "val2014")]  # the published list holds numbers as strings
WIDTHS = {"ViT-B/32": 512, "RN50x4": 640, "tinyvit": 576}


TRUTH = {"data/coco": {}, "data/clotho": {}, "data": {}}  # folder of a feature file → image_id → its captions


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with data/ as the published READMEs lay it out, and small random models under the names they use."""
    folder = tmp_path_factory.mktemp("seeds")
    save_coco(folder)
    TRUTH["data"] = miniatures.save_food(folder, count=3)
    TRUTH["data/clotho"] = miniatures.save_clotho(folder, [("development", 3)])
    tiny.save_picture(folder / "data/photo.jpg", seed=9)
    weights = folder / "data/weights"
    tiny.save_clip(weights / "ViT-B-32.pt", WIDTHS["ViT-B/32"], "vit")
    tiny.save_clip(weights / "RN50x4.pt", WIDTHS["RN50x4"], "resnet")
    tiny.save_tinyvit(weights / "tinyvit")
    for name in ("gpt2", "distilgpt2"):
        tiny.save_gpt2(weights / name, width=16, layers=1, heads=2)
    miniatures.save_published_mlp(folder / "model_wieghts.pt", weights / "gpt2", seed=1)
    miniatures.save_clipxgpt(folder / "weights/small/model.pt", weights / "gpt2")
    return folder


def save_coco(folder):
    """data/coco with the published list of captions, not in the order of the images."""
    records = []
    for number, (image_id, split) in enumerate(IMAGES):
        tiny.save_picture(folder / f"data/coco/{split}/COCO_{split}_{int(image_id):012d}.jpg", seed=number)
        for text in tiny.CAPTIONS[2 * number : 2 * number + 2]:
            records.append({"image_id": image_id, "caption": text, "id": 100 + len(records)})
            TRUTH["data/coco"].setdefault(image_id, set()).add(text)
    annotations = folder / "data/coco/annotations/train_caption.json"
    annotations.parent.mkdir()
    annotations.write_text(json.dumps([records[number] for number in (0, 2, 4, 1, 3, 5)]))


def run(line):
    """Run a "python X.py …" line in this process."""
    words = shlex.split(line)
    assert words[0] == "python", line
    assert words[1].endswith(".py"), line
    assert not importlib.import_module(words[1].removesuffix(".py")).main(words[2:]), line


def option(line, name):
    """The value of an option of a command line, None when it is not there."""
    words = shlex.split(line)
    return words[words.index(name) + 1] if name in words else None


def test_every_line_has_its_output_and_its_script():
    for line, output in COMMANDS:
        assert not output.startswith("#"), f"no '# writes' line below: {line}"
    scripts = {shlex.split(line)[1] for line, _ in COMMANDS}
    assert scripts == {"parse_coco.py", "parse_clotho.py", "parse_food.py", "train.py", "predict.py"}


@pytest.mark.filterwarnings("ignore:Glyph")  # random weights write control characters
@pytest.mark.parametrize(("line", "output"), COMMANDS, ids=[f"{number}-{line.split()[1]}" for number, (line, _) in enumerate(COMMANDS)])
def test_a_published_command_line_runs_as_printed(tree, monkeypatch, capsys, line, output):
    monkeypatch.chdir(tree)
    data = option(line, "--data")
    if data is not None and not Path(data).exists():  # this test was picked alone: first what it stands on
        run(next(parse for parse, written in COMMANDS if Path(written) == Path(data)))
    Path(output).unlink(missing_ok=True)
    run(line)
    assert Path(output).is_file()
    if output.endswith(".pkl"):
        check_features(Path(output), option(line, "--clip_model_type"))
    elif output.endswith(".jpg"):
        assert capsys.readouterr().out.startswith('Generated Caption: "')
    else:
        check_checkpoint(Path(output), line, capsys.readouterr())


def check_features(path, encoder):
    """One row an image, whatever the order of the captions; every caption points to its own picture's row."""
    from features.store import load_features

    with open(path, "rb") as file:
        published = pickle.load(file)  # as the published train.py reads it
    truth = TRUTH[str(path.parent)]
    assert len(truth) == 3
    assert published["clip_embedding"].shape == (3, WIDTHS[encoder])
    assert published["clip_embedding"].isfinite().all()
    texts, rows = {}, {}
    for caption in published["captions"]:
        texts.setdefault(str(caption["image_id"]), set()).add(caption["caption"])
        rows.setdefault(str(caption["image_id"]), set()).add(caption["clip_embedding"])
    assert texts == truth
    assert sum(map(len, truth.values())) == len(published["captions"])
    assert sorted(map(list, rows.values())) == [[0], [1], [2]]
    assert len({tuple(row.tolist()) for row in published["clip_embedding"]}) == 3, "two pictures have one embedding"
    features = load_features(path)
    assert torch.equal(torch.as_tensor(features.clip_embedding), published["clip_embedding"])
    assert len(features.captions) == len(published["captions"])


def check_checkpoint(path, line, printed):
    """Ten epochs were saved, and the last one predicts without being told anything."""
    import predict
    from models.checkpoints import load_checkpoint

    names = sorted(file.name for file in path.parent.glob("coco_prefix-[0-9][0-9][0-9].pt"))
    assert names == [f"coco_prefix-{epoch:03d}.pt" for epoch in range(10)]
    state = torch.load(path, weights_only=True)
    assert any(name.startswith("gpt.") for name in state) == ("--only_prefix" not in line)
    if option(line, "--mapping_type") == "transformer":
        assert state["clip_project.prefix_const"].shape == (40, 16)
        assert "clip_project.transformer.layers.7.mlp.fc2.weight" in state
    else:
        assert state["clip_project.model.2.weight"].shape == (16 * 10, 16 * 10 // 2)
    model = load_checkpoint(path)
    assert model.config.gpt2_type.rstrip("/").endswith("distilgpt2" if "tinyvit" in line else "gpt2")
    if "tinyvit" in line:
        assert "distilgpt2" in printed.out + printed.err, "train.py does not say which language model TinyViT features get"
    clotho = "clotho" in line
    assert ("model_wieghts.pt is here: starting from it" in printed.out) == clotho, "Clotho's weights belong to Clotho's features"
    if "--only_prefix" in line and "--is_rn" not in line:
        return  # the same program as for the others: one prediction for each encoder is enough
    picture = "data/development/development 1.wav" if clotho else "data/photo.jpg"
    assert not predict.main([picture, "--checkpoint", str(path), "--out", "captions.json", "--device", "cpu", "--entry_length", "5"])
    assert len(json.loads(Path("captions.json").read_text())) == 1


def test_without_clothos_weights_its_training_starts_from_gpt2_as_it_comes(tree, monkeypatch, capsys):
    parse, train = (line for line, _ in COMMANDS if "clotho" in line)
    monkeypatch.chdir(tree)
    if not Path("data/clotho/oscar_split_ViT-B_32_train.pkl").exists():
        run(parse)
    Path("model_wieghts.pt").rename("elsewhere.pt")
    try:
        run(f"{train} --epochs 1")
    finally:
        Path("elsewhere.pt").rename("model_wieghts.pt")
    assert "starting from" not in capsys.readouterr().out
    run(f"{train} --epochs 1 --init_from none")
    assert "starting from" not in capsys.readouterr().out
    assert torch.load("clotho_train/coco_prefix-000.pt", weights_only=True)["gpt.transformer.wte.weight"].std() < 0.03, "GPT-2 as it comes"
