"""The way out: what a file is, a folder that from_pretrained reads, and checkpoints that the published code reads."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
import weight_files
from benchmarks import published
from helpers import captioner
from models.checkpoints import config_path, load_checkpoint, save_checkpoint, save_config
from models.decoding import generate
from models.hub import HubCaptionModel, main

pytestmark = pytest.mark.usefixtures("one_thread")
STOP = 13


def build(folder, mapping_type="mlp", **fields):
    """A captioner of random weights over the tiny GPT-2 of `folder`."""
    return captioner(folder, HubCaptionModel, seed=4, clip_length=3, num_layers=2, mapping_type=mapping_type, **fields).eval()


def logits_of(model, embedding):
    """Logits of the token after the prefix and of those after one more: [B, 2, V]."""
    with torch.no_grad():
        prefix = model.encode_prefix(embedding)
        token = model.gpt.get_input_embeddings()(torch.full((len(embedding), 1), 5))
        return model.gpt(inputs_embeds=torch.cat([prefix, token], dim=1)).logits[:, -2:]


@pytest.mark.parametrize("mapping_type, tune", [("mlp", "full"), ("transformer", "mapper"), ("encoder", "full")])
def test_ours_comes_back_through_export_with_the_same_logits(tmp_path, tiny_gpt2, mapping_type, tune, capsys):
    model = build(tiny_gpt2, mapping_type, tune=tune)
    save_checkpoint(model, tmp_path / "run-000.pt")
    save_config(model.config, {}, config_path(tmp_path / "run-000.pt"))
    assert main(["export", str(tmp_path / "run-000.pt"), str(tmp_path / "out")]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    space = {"app.py", "requirements.txt", "prefixcap"}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer", *space} == {path.name for path in (tmp_path / "out").iterdir()}
    again = HubCaptionModel.from_pretrained(tmp_path / "out")
    embedding = torch.randn(3, 32)
    assert torch.equal(logits_of(again, embedding), logits_of(model, embedding))
    assert again.config == model.config
    assert not again.training
    assert generate(again, embedding, entry_length=6) == generate(model, embedding, entry_length=6)


def test_an_exported_folder_needs_nothing_else(tmp_path, tiny_gpt2):
    import shutil

    language = shutil.copytree(tiny_gpt2, tmp_path / "language")
    build(language).save_pretrained(tmp_path / "out")
    shutil.rmtree(language)
    assert generate(HubCaptionModel.from_pretrained(tmp_path / "out"), torch.randn(1, 32), entry_length=4)


def test_the_mixin_can_publish_what_it_saves(tmp_path, tiny_gpt2, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploaded.update({path.name: repo_id for path in folder_path.iterdir()} if hasattr(folder_path, "iterdir") else {})
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert build(tiny_gpt2).push_to_hub("someone/captioner") == "done"
    assert uploaded["config.json"] == uploaded["model.safetensors"] == "someone/captioner"


@pytest.mark.parametrize("kind", ["lora", "prompted", "clipxgpt", "mlp"])
def test_a_published_file_comes_back_through_export(tmp_path, kind):
    tokenizer = tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    state, facts = weight_files.random_file(kind, 8, len(tokenizer), STOP)
    torch.save(state, tmp_path / "published.pt")
    tiny.random_gpt2(len(tokenizer), width=facts.width, heads=facts.heads, layers=1).config.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert main(["export", str(tmp_path / "published.pt"), str(tmp_path / "out"), "--gpt2_type", str(tmp_path / "gpt2")]) == 0
    model, again = load_checkpoint(tmp_path / "published.pt", str(tmp_path / "gpt2")), HubCaptionModel.from_pretrained(tmp_path / "out")
    embedding = torch.randn(2, facts.clip_width)
    assert torch.equal(logits_of(again, embedding), logits_of(model, embedding))
    assert generate(again, embedding, "greedy", entry_length=5) == generate(model, embedding, "greedy", entry_length=5)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in stored)
    assert any(name.startswith("original_model.") for name in stored) == (kind == "prompted")


def test_merged_lora_has_the_logits_of_the_adapters_to_1e_5(tmp_path):
    tokenizer = tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    tiny.random_gpt2(len(tokenizer), width=32, heads=4, layers=1).config.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for seed in range(10):
        state, facts = weight_files.random_file("lora", seed, len(tokenizer), STOP, widths=((32, 4),))
        torch.save(state, tmp_path / "lora.pt")
        model = load_checkpoint(tmp_path / "lora.pt", str(tmp_path / "gpt2"))
        prefix = "base_model.model.gpt." if any(name.startswith("base_model.") for name in state) else "gpt.base_model.model."
        plain = weight_files.PlainGPT2(weight_files.part(state, prefix), 4)
        embeds = torch.randn(1, 5, 32)
        with torch.no_grad():
            found = model.gpt(inputs_embeds=embeds).logits.double()
        expected = plain(embeds.double()).logits
        assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_peft_s_own_file_is_read_and_merged(tmp_path, tiny_gpt2):
    """The names that peft itself writes, whatever it wraps."""
    from peft import LoraConfig, get_peft_model

    for wrap in ("gpt", "whole"):
        model = build(tiny_gpt2, stop_token=".")
        lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        if wrap == "gpt":
            model.gpt = get_peft_model(model.gpt, lora)
            state, adapted = model.state_dict(), model
        else:
            adapted = get_peft_model(model, lora)
            state = adapted.state_dict()
        for name, tensor in state.items():
            if "lora_B" in name:
                tensor.normal_(0, 0.1)
        torch.save(state, tmp_path / "peft.pt")
        adapted.eval()
        embedding = torch.randn(2, 32)
        found = load_checkpoint(tmp_path / "peft.pt", gpt2_type=str(tiny_gpt2))
        assert torch.allclose(logits_of(found, embedding), logits_of(model, embedding), atol=1e-5)
        assert not torch.allclose(logits_of(found, embedding), logits_of(build(tiny_gpt2), embedding), atol=1e-3)


@pytest.mark.parametrize("mapping_type", ["mlp", "transformer"])
@pytest.mark.parametrize("tune", ["full", "mapper"])
def test_a_full_checkpoint_loads_strictly_in_code_that_knows_the_published_names_only(tmp_path, tiny_gpt2, mapping_type, tune):
    from transformers import GPT2LMHeadModel

    model = build(tiny_gpt2, mapping_type, tune=tune)
    save_checkpoint(model, tmp_path / "run-000.pt", full=True)
    theirs = published.PublishedClipCap(GPT2LMHeadModel(model.gpt.config), 32, 4, *((3, 2) if mapping_type == "transformer" else ()))
    theirs.load_state_dict(torch.load(tmp_path / "run-000.pt"), strict=True)
    embedding = torch.randn(2, 32)
    assert torch.allclose(theirs.eval().clip_project(embedding), model.encode_prefix(embedding), atol=1e-5)


def test_describe_says_what_a_file_is(tmp_path, capsys):
    tokenizer = tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    says = {"mlp": "ClipCap, MLP mapper", "linear": "one-Linear mapper", "transformer": "transformer mapper"}
    says |= {"lora": "LoRA adapters of rank", "prompted": "Instagram, prompted", "clipxgpt": "CLIPxGPT S"}
    for kind, words in says.items():
        state, facts = weight_files.random_file(kind, 5, len(tokenizer), STOP)
        torch.save(state, tmp_path / f"{kind}.pt")
        (tmp_path / f"{kind}.json").write_text(json.dumps({"model": {"n_head": facts.heads}}))
        assert main(["describe", str(tmp_path / f"{kind}.pt")]) == 0
        out = capsys.readouterr().out
        assert words in out, kind
        assert f"prefix_length: {facts.length}" in out, kind
        assert f"n_embd {facts.width}" in out, kind
        assert ("vision tower: " in out) == (kind == "clipxgpt")
        assert ("base captioner: " in out) == (kind == "prompted")


def test_mistakes_are_one_line(tmp_path, tiny_gpt2, capsys):
    (tmp_path / "text.pt").write_text("weights")
    build(tiny_gpt2).save_pretrained(tmp_path / "out")
    (tmp_path / "out/model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        HubCaptionModel.from_pretrained(tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        HubCaptionModel.from_pretrained(tmp_path / "out")
    for words in (["describe", "no.pt"], ["describe", str(tmp_path / "text.pt")], ["export", "no.pt", "out"], ["melt", "a"], []):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2, words
        assert len(capsys.readouterr().err.splitlines()) == 1, words


def test_adapters_without_the_matrices_beneath_them_are_merged_into_the_model_of_that_name(tmp_path, tiny_gpt2):
    plain = build(tiny_gpt2, tune="full")
    module = plain.gpt.transformer.h[1].attn.c_proj
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    state = {name: tensor for name, tensor in plain.state_dict().items() if name.startswith("clip_project.")}
    adapter = "gpt.transformer.h.1.attn.c_proj.lora_{}.default.weight"
    torch.save({**state, adapter.format("A"): a, adapter.format("B"): b}, tmp_path / "run-000.pt")
    save_config(plain.config, {}, config_path(tmp_path / "run-000.pt"))
    loaded = load_checkpoint(tmp_path / "run-000.pt")
    expected = module.weight + (16 / 4 * b @ a).T
    assert torch.allclose(loaded.gpt.transformer.h[1].attn.c_proj.weight, expected, atol=1e-5)
    assert loaded.config.tune == "full"
    torch.save({**state, adapter.format("A"): a, adapter.format("B"): torch.randn(63, 4)}, tmp_path / "run-000.pt")
    with pytest.raises(ValueError, match="c_proj.lora_A.default.weight and gpt.transformer.h.1.attn.c_proj.lora_B.default.weight change"):
        load_checkpoint(tmp_path / "run-000.pt")
