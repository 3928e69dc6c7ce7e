"""Checkpoints: saved, loaded, recognised, and refused by name where they do not fit."""

import dataclasses
import json
import pickle
import warnings

import pytest
import torch

import tiny
from common import UserError
from helpers import captioner
from models.checkpoints import config_path, load_checkpoint, save_checkpoint, save_config
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")


def build(folder, mapping_type="mlp", tune="full", seed=1):
    """A captioner over the tiny GPT-2 of `folder`, with random weights, and its config file beside where it will be saved."""
    return captioner(folder, seed=seed, clip_length=3, num_layers=2, mapping_type=mapping_type, tune=tune).eval()


def save(model, path, full=False):
    save_checkpoint(model, path, full)
    save_config(model.config, {"seed": 0}, config_path(path))
    return path


@pytest.mark.parametrize("mapping_type", ["mlp", "linear", "transformer"])
@pytest.mark.parametrize("tune, full", [("full", False), ("mapper", False), ("mapper", True)])
def test_what_is_saved_is_loaded(tmp_path, tiny_gpt2, mapping_type, tune, full):
    model = build(tiny_gpt2, mapping_type, tune)
    if tune == "full" or full:
        model.gpt.transformer.ln_f.bias.data += 1  # no longer what the folder holds
    path = save(model, tmp_path / "run-003.pt", full)
    loaded = load_checkpoint(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    embedding = torch.randn(3, 32)
    assert generate(loaded, embedding, entry_length=8) == generate(model, embedding, entry_length=8)
    holds_gpt = any(name.startswith("gpt.") for name in torch.load(path))
    assert holds_gpt == (tune == "full" or full)
    assert loaded.config == model.config
    assert not loaded.training


def test_equal_weights_give_equal_bytes(tmp_path, tiny_gpt2):
    model = build(tiny_gpt2)
    save_checkpoint(model, tmp_path / "a-000.pt")
    save_checkpoint(model, tmp_path / "another_name_latest.pt")
    assert (tmp_path / "a-000.pt").read_bytes() == (tmp_path / "another_name_latest.pt").read_bytes()


@pytest.mark.parametrize(
    "name, config",
    [
        ("coco_prefix-009.pt", "coco_prefix.json"),
        ("a_latest.pt", "a.json"),
        ("a_best.pt", "a.json"),
        ("a-b-1000.pt", "a-b.json"),
        ("plain.pt", "plain.json"),
    ],
)
def test_the_config_stands_beside(name, config):
    assert config_path(name).name == config


def published_state(mapper, width=768, layers=1, vocab=1013, clip_width=512):
    """A bare state dict with the published names, GPT-2's as they come out of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocab, bos_token_id=0, eos_token_id=0))
    state = {f"gpt.{name}": tensor for name, tensor in gpt.state_dict().items()}
    if mapper == "mlp":
        shapes = {"model.0.weight": (width * 5, clip_width), "model.0.bias": (width * 5,)}
        shapes |= {"model.2.weight": (width * 10, width * 5), "model.2.bias": (width * 10,)}
    elif mapper == "linear":
        shapes = {"weight": (width * 12, clip_width), "bias": (width * 12,)}
    else:
        shapes = {"linear.weight": (width * 6, clip_width), "linear.bias": (width * 6,), "prefix_const": (7, width)}
        for i in range(3):
            layer = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.to_queries.weight": (width, width)}
            layer |= {"attn.to_keys_values.weight": (2 * width, width)}
            layer |= {"attn.project.weight": (width, width), "attn.project.bias": (width,)}
            layer |= {"norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (2 * width, width), "mlp.fc1.bias": (2 * width,)}
            layer |= {"mlp.fc2.weight": (width, 2 * width), "mlp.fc2.bias": (width,)}
            shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    return state | {f"clip_project.{name}": torch.randn(shape) * 0.02 for name, shape in shapes.items()}


@pytest.mark.parametrize("mapper, clip_width, expected", [
    ("mlp", 512, {"mapping_type": "mlp", "prefix_length": 10, "encoder": "ViT-B/32", "normalize_prefix": False}),
    ("linear", 512, {"mapping_type": "linear", "prefix_length": 12}),
    ("transformer", 640, {"mapping_type": "transformer", "prefix_length": 7, "clip_length": 6, "num_layers": 3, "encoder": "RN50x4",
                          "normalize_prefix": True}),
])  # fmt: skip
def test_a_published_file_is_recognised_with_its_old_buffers(tmp_path, tiny_gpt2, mapper, clip_width, expected):
    state = published_state(mapper, clip_width=clip_width)
    state |= {"gpt.transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).byte(), "gpt.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state, tmp_path / "coco_weights.pt")
    model = load_checkpoint(tmp_path / "coco_weights.pt", gpt2_type=str(tiny_gpt2))
    for name, value in {**expected, "clip_width": clip_width, "stop_token": "."}.items():
        assert getattr(model.config, name) == value, name
    assert torch.equal(model.gpt.transformer.wte.weight, state["gpt.transformer.wte.weight"])
    assert model.gpt.lm_head.weight is model.gpt.transformer.wte.weight


def test_an_untied_output_layer_is_kept(tmp_path, tiny_gpt2):
    state = published_state("mlp")
    state["gpt.lm_head.weight"] = torch.randn_like(state["gpt.lm_head.weight"])
    torch.save(state, tmp_path / "head.pt")
    model = load_checkpoint(tmp_path / "head.pt", gpt2_type=str(tiny_gpt2))
    assert torch.equal(model.gpt.lm_head.weight, state["gpt.lm_head.weight"])
    assert torch.equal(model.gpt.transformer.wte.weight, state["gpt.transformer.wte.weight"])


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_a_key_that_does_not_fit_is_named(tmp_path, tiny_gpt2, change):
    path = save(build(tiny_gpt2), tmp_path / "run-000.pt")
    state = torch.load(path)
    if change == "missing":
        del state["gpt.transformer.h.1.ln_1.weight"]
    elif change == "unexpected":
        state["gpt.transformer.h.1.ln_1.weight_2"] = torch.ones(1)
    else:
        state["gpt.transformer.h.1.ln_1.weight"] = torch.ones(3)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"gpt\.transformer\.h\.1\.ln_1\.weight"):
        load_checkpoint(path)


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return (os.mkdir, (str(self.mark),))


def test_bad_checkpoints_are_one_line(tmp_path, tiny_gpt2):
    good = save(build(tiny_gpt2), tmp_path / "run-000.pt")
    (tmp_path / "truncated.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"clip_project.model.0.weight": Payload(tmp_path / "was_run")}, tmp_path / "code.pt")
    torch.save({"clip_project.model.0.weight": torch.ones(2, 2)}, tmp_path / "nameless.pt")
    messages = {"no": "no checkpoint", "truncated": "cannot be read", "text": "damaged", "empty": "cannot be read"}
    messages |= {"list": "not a checkpoint", "code": "mkdir", "nameless": "no config beside it"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_a_feature_file_in_place_of_a_checkpoint_is_one_line_without_a_warning(tmp_path):
    tiny.save_published_features(tmp_path / "features.pkl", [["a"], ["b"]])
    content = pickle.loads((tmp_path / "features.pkl").read_bytes())
    (tmp_path / "features.pkl").write_bytes(pickle.dumps(content, protocol=4))
    with warnings.catch_warnings(), pytest.raises(UserError, match="features.pkl"):
        warnings.simplefilter("error")
        load_checkpoint(tmp_path / "features.pkl")


def test_a_config_of_another_version_is_refused(tmp_path, tiny_gpt2):
    path = save(build(tiny_gpt2), tmp_path / "run-000.pt")
    torch.save(dict(torch.load(path, weights_only=True)), path)  # as older versions wrote it, without a config in it
    fields = json.loads((tmp_path / "run.json").read_text())
    fields["model"]["warp"] = 9
    (tmp_path / "run.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="warp"):
        load_checkpoint(path)


def test_a_language_model_that_is_nowhere_says_where_it_looked(tmp_path, tiny_gpt2, workdir):
    model = build(tiny_gpt2, tune="mapper")
    model.config = dataclasses.replace(model.config, gpt2_type="gpt2-nowhere")
    path = save(model, tmp_path / "run-000.pt")
    with pytest.raises(UserError, match=r"data/weights/gpt2-nowhere.*cache.*Download config\.json"):
        load_checkpoint(path)


def test_weights_are_found_by_name(workdir, tiny_gpt2):
    (workdir / "data/weights").mkdir(parents=True)
    save(build(tiny_gpt2), workdir / "data/weights/coco.pt")
    assert load_checkpoint("coco").config.prefix_length == 4
