"""Configs of strangers beside good weights: each loads and decodes, or is refused in one line that names the field."""

import collections
import copy
import json
import random
import warnings

import pytest
import torch

import tiny
from common import UserError
from models.captioner import ClipCaptionModel
from models.checkpoints import load_checkpoint, read_config, save_config
from models.config import CaptionConfig
from models.decoding import generate
from models.weights import load_language_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = 150
VALUES = (
    None, True, False, 0, 1, -1, 3, 7, 10**6, 10**12, 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800",
    "a\nb", "../../etc", "x" * 100_000, [], [1], ["x"], [[]], {}, {"x": 1}, {"rank": 4}, {"": {}}, {"model_type": "x"}, "transformer",
)  # fmt: skip
PARTS = ("encoder", "clip_width", "lora", "gpt_config", "audio")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with adapters and sound settings, and its config as a dict. Its language model comes from gpt_config."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny.save_gpt2(folder / "gpt2", width=16, layers=1, heads=2, positions=32)
    gpt = load_language_model(str(folder / "gpt2"))
    config = CaptionConfig(
        "ViT-B/32", 8, 2, 3, "transformer", 1, gpt2_type=str(folder / "gpt2"), gpt_config=gpt.config.to_diff_dict(), stop_token=".",
        tune="lora", lora={"rank": 2, "alpha": 4, "dropout": 0.1, "targets": ["c_attn"]}, prompt="see: ",
        audio={"sample_rate": 44100, "spectrogram": "mel", "windows": {"columns": 128, "hop": 64}},
    )  # fmt: skip
    model = ClipCaptionModel(config, gpt, load_tokenizer(config.gpt2_type)).eval()
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "run-000.pt")
    save_config(config, {}, folder / "run.json")
    return folder / "run-000.pt", json.loads((folder / "run.json").read_text())


def places(value, path=()):
    """Paths of all values inside a structure."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((*path, key), *places(one, (*path, key)))]


def mutate(config, draw):
    """Change one value of a config. Returns the config and the path of what was changed."""
    config = copy.deepcopy(config)
    path = draw.choice(places(config["model"], ("model",)) + [("model", part) for part in PARTS] + [("model",), ("model", "unknown")])
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    if draw.random() < 0.1 and path[-1] not in ("unknown", "clip_width"):  # without a width it holds hints for published weights
        del holder[path[-1]]
    elif isinstance(holder.get(path[-1]) if isinstance(holder, dict) else None, int) and draw.random() < 0.3:
        holder[path[-1]] += draw.choice((-1, 1, 1000, 10**9))
    else:
        holder[path[-1]] = draw.choice(VALUES)
    return config, path


def test_the_good_one_loads(good):
    path, _ = good
    assert generate(load_checkpoint(path), torch.ones(1, 8), "greedy", entry_length=2)


@pytest.mark.parametrize("part", range(5))
def test_a_mutated_config_works_or_is_one_line(good, part):
    path, config = good
    refused = 0
    for seed in range(part * CASES // 5, (part + 1) * CASES // 5):
        changed, place = mutate(config, random.Random(seed))
        path.with_name("run.json").write_text(json.dumps(changed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                generate(load_checkpoint(path), torch.ones(1, 8), "greedy", entry_length=2)
        except UserError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said, (seed, place, said)
            assert len(said) < 1500, (seed, place, said)
            named = [key for key in place[1:] if isinstance(key, str)] or ["model"]
            assert any(name in said or name.replace("_", " ") in said for name in named), (seed, place, said)
    assert refused > CASES // 10
    path.with_name("run.json").write_text(json.dumps(config))


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b'{"model": []}', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b'{"a": ' * 90_000,
    b'{"model": {"clip_width": 1e999}}', b'{"model": {"encoder": null, "clip_width": ' + b"9" * 5000 + b"}}",
])  # fmt: skip
def test_what_is_no_config_is_one_line(good, text):
    path = good[0].with_name("other.json")
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("field, value, expected", [
    ("prefix_length", 5, "prefix_length 5 and the weights have 2"), ("clip_width", 9, "clip_width 9 and the weights have 8"),
    ("mapping_type", "mlp", "mapping_type mlp and the weights have transformer"), ("num_layers", 1000, "num_layers 1000"),
    ("tune", "all", "model.tune = 'all'"), ("lora", None, "tune lora and no lora"),
    ("normalize_prefix", "yes", "model.normalize_prefix = 'yes'"),
    ("stop_token", "no one token", "stop token"), ("gpt2_type", "nowhere", "gpt2_type nowhere"), ("warp", 9, "model.warp"),
    ("gpt_config", {"model_type": "gpt2", "n_layer": 10**9}, "n_layer 1000000000"),
    ("gpt_config", {"model_type": "gpt2", "n_embd": 10**9, "n_head": 1}, "gpt_config"),
])  # fmt: skip
def test_a_field_that_does_not_fit_is_named(good, field, value, expected):
    path, config = good
    changed = copy.deepcopy(config)
    changed["model"][field] = value
    path.with_name("run.json").write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    path.with_name("run.json").write_text(json.dumps(config))
    assert expected in str(caught.value)


def test_hints_for_published_weights_are_checked_too(good):
    path = good[0].with_name("hints.json")
    path.write_text('{"model": {"n_head": 4, "stop_token": "."}}')
    assert read_config(path) == {"n_head": 4, "stop_token": "."}
    path.write_text('{"model": {"n_head": "4"}}')
    with pytest.raises(UserError, match=r"model.n_head = '4'"):
        read_config(path)


@pytest.mark.parametrize("own", [
    None, 5, "text", [], {}, {"model": None}, {"model": 5}, {"model": "{"}, {"model": "[" * 100_000}, {"model": "[]"}, {"model": '"x"'},
    {"model": '{"clip_width": "8"}'}, {"model": '{"encoder": null, "clip_width": ' + "9" * 5000 + "}"},
])  # fmt: skip
def test_a_hostile_config_inside_the_weights_is_one_line(good, own, tmp_path):
    state = collections.OrderedDict(torch.load(good[0], weights_only=True))
    state._metadata = {"prefixcap": own}
    torch.save(state, tmp_path / "own-000.pt")
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "own-000.pt")
    assert "own-000.pt" in str(caught.value)
    assert len(str(caught.value)) < 600
