"""--init_from any checkpoint: what is taken, what starts fresh, and what is refused with the reason."""

import json

import pytest
import torch

import helpers
import tiny
import train
import weight_files
from models.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
STOP = 13
GPT = {"width": 32, "heads": 4}


@pytest.fixture
def world(workdir):
    """A tiny GPT-2 (32 wide, 2 layers), feature files, and one published file of each kind that fits them → tokenizer."""
    tokenizer = tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    tiny.random_gpt2(len(tokenizer), layers=2, **GPT, positions=420).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    tiny.save_published_features("train.pkl", [[text] for text in tiny.CAPTIONS], width=16)
    return tokenizer


def published_file(kind, tokenizer, name="start.pt", width=16):
    """A published file over the GPT-2 of `world`, with 16-wide embeddings → state, facts."""
    for seed in range(1000):
        state, facts = weight_files.random_file(kind, seed, len(tokenizer), STOP, widths=((32, 4),))
        if facts.gpt_layers == 2:
            break
    renamed = {"mp." if name.startswith("mp.") else "clip_project.": True for name in state if "mp." in name or "clip_project" in name}
    root = "base_model.model.clip_project." if any(name.startswith("base_model.") for name in state) else next(iter(renamed))
    mapper = {"clipxgpt": "encoder", "lora": "mlp"}.get(kind, kind)
    shapes = weight_files.mapper_shapes(mapper, width, 32, facts.length, facts.clip_length, facts.layers)
    drawn = weight_files.draw_tensors(shapes, torch.Generator().manual_seed(1))
    state = {name: tensor for name, tensor in state.items() if not name.startswith((root, "ie."))} | weight_files.under(root, drawn)
    positions = next(name for name in state if name.endswith("wpe.weight"))
    state[positions] = torch.cat([state[positions], torch.zeros(420 - len(state[positions]), 32)])
    torch.save(state, name)
    return state, facts


def run(*words, code=0):
    words = [*"--data train.pkl --out_dir out --gpt2_type ./gpt2 --device cpu --max_steps 0 --bs 4 --lr 1e-4".split(), *map(str, words)]
    helpers.call(train.main, words, code)


def mapper_options(kind, facts):
    words = ["--prefix_length", facts.length]
    mapping = {"clipxgpt": "encoder", "lora": "mlp"}.get(kind, kind)
    words += ["--mapping_type", mapping]
    if mapping == "transformer":
        words += ["--prefix_length_clip", facts.clip_length]
    return words + (["--num_layers", facts.layers] if mapping in ("transformer", "encoder") else [])


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer", "clipxgpt", "lora"])
def test_training_starts_from_every_published_kind(world, capsys, kind):
    _, facts = published_file(kind, world)
    run("--init_from", "start.pt", *mapper_options(kind, facts))
    out = capsys.readouterr().out
    assert "starting from start.pt: mapper and language model taken" in out
    assert "not taken" not in out
    taken = next(line for line in out.splitlines() if "taken: " in line and line.startswith("  "))
    for group in ("mapper", "token table 8,384", "position table", "blocks", "final norm"):
        assert group in taken
    state = torch.load("out/coco_prefix-000.pt")
    expected = load_checkpoint("start.pt", "./gpt2").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items() if name in expected and "lm_head" not in name)
    assert not any("lora" in name for name in state)


def test_only_the_language_model_or_only_the_mapper_is_taken_on_request(world, capsys):
    _, facts = published_file("mlp", world)
    expected = load_checkpoint("start.pt", "./gpt2").state_dict()
    key, table = "clip_project.model.0.weight", "gpt.transformer.h.0.mlp.c_fc.weight"
    run("--init_from", "start.pt", "--prefix_length", facts.length, "--init_parts", "mapper")
    assert "mapper taken" in capsys.readouterr().out
    state = torch.load("out/coco_prefix-000.pt")
    assert torch.equal(state[key], expected[key])
    assert not torch.equal(state[table], expected[table])
    run("--init_from", "start.pt", "--mapping_type", "transformer", "--num_layers", 1, "--init_parts", "gpt", "--prefix", "gpt")
    out = capsys.readouterr().out
    assert "language model taken" in out
    assert "not taken: mapper" in out
    assert torch.equal(torch.load("out/gpt-000.pt")[table], expected[table])


@pytest.mark.parametrize("words, message", [
    (["--mapping_type", "transformer"], "its mapper has mapping_type mlp where this run has transformer"),
    (["--prefix_length", "9"], "where this run has 9: give --prefix_length"),
    (["--data", "wide.pkl"], "it takes embeddings 16 wide (encoder unknown), the data has them 640 wide (RN50x4)"),
    (["--gpt2_type", "./other"], "its language model is 32 wide, 2 blocks, 262 tokens; this run's ./other is 64 wide, 1 blocks"),
])  # fmt: skip
def test_a_mismatch_is_explained(world, capsys, words, message):
    _, facts = published_file("mlp", world)
    tiny.save_published_features("wide.pkl", [[text] for text in tiny.CAPTIONS], width=640)
    tiny.random_gpt2(len(world), width=64, heads=2, layers=1).save_pretrained("other")
    world.save_pretrained("other")
    if "./other" in words:
        (open("start.json", "w")).write(json.dumps({"model": {"n_head": 4}}))
    run("--init_from", "start.pt", "--prefix_length", facts.length, *words, code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_mapper_alone_leaves_the_language_model_as_it_comes(world, capsys):
    run("--only_prefix", "--prefix_length", 3, "--prefix", "first")
    run("--init_from", "out/first-000.pt", "--prefix_length", 3, "--prefix", "second")
    out = capsys.readouterr().out
    assert "starting from out/first-000.pt: mapper taken" in out
    assert "(language model: ./gpt2 as it comes)" in out
    run("--init_from", "out/first-000.pt", "--init_parts", "gpt", code=2)
    assert "holds a mapper and no language model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model_wieghts.pt", "model_weights.pt"])
def test_clotho_starts_from_the_weights_in_the_working_folder_unless_refused(world, capsys, name):
    _, facts = published_file("mlp", world, name)
    run("--prefix_length", facts.length)
    assert "starting from" not in capsys.readouterr().out  # not Clotho's features
    from features.store import load_features, save_features

    features = load_features("train.pkl")
    save_features("train.pkl", features.clip_embedding, features.captions, {"encoder": "ViT-B/32", "audio": {"sample_rate": 44100}})
    run("--prefix_length", facts.length, "--prefix", "clotho")
    out = capsys.readouterr().out
    assert f"{name} is here: starting from it" in out
    assert f"starting from {name}: mapper and language model taken" in out
    run("--prefix_length", facts.length, "--init_from", "none", "--prefix", "clotho")
    assert "starting from" not in capsys.readouterr().out
    run("--prefix_length", facts.length + 1, code=2)
    assert f"{name} (ClipCap, MLP mapper) does not fit this run" in capsys.readouterr().err
