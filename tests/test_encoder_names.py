"""Encoders' names: where weights are looked up, what a wrong name or file says, what a feature file is called."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import tiny_towers
from common import UserError
from features.encoder_names import file_stem
from models.encoders import ENCODER_HELP, ENCODERS, Family, find_family, load_encoder
from models.encoders.text import load_text_tower

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_are_looked_up_here_then_in_the_cache_and_only_then_on_the_hub(workdir, monkeypatch):
    def no_probe(address):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("models.weights.hub_is_reachable", no_probe)
    tiny_towers.save_timm("cache", seed=1)
    name, cached = f"timm:{tiny_towers.TIMM_VIT}", workdir / "cache" / "model.safetensors"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(cached) if file == cached.name else None)
    from_cache = load_encoder(name).digest()
    tiny_towers.save_timm(f"data/weights/{tiny_towers.TIMM_VIT}", seed=2)
    assert load_encoder(name).digest() != from_cache


def test_a_hub_name_without_a_network_gives_one_line_that_says_what_to_do(workdir, monkeypatch):
    monkeypatch.setattr("models.weights.hub_is_reachable", lambda address: False)
    monkeypatch.setenv("HOME", str(workdir))
    places = {
        "hf:google/siglip2-base-patch16-224": r"https://huggingface.co/google/siglip2.* data/weights/google/siglip2.*/, or give the path",
        "clap:laion/clap-htsat-unfused": r"https://huggingface.co/laion/clap.* data/weights/laion/clap.*/, or give the path",
        "timm:vit_tiny_patch16_224": r"https://.*/model.safetensors .* data/weights/vit_tiny_patch16_224/model.safetensors",
        "open_clip:ViT-B-32/laion2b_s34b_b79k": r"https://.*/laion/.* data/weights/ViT-B-32/laion2b_s34b_b79k/open_clip_model.safetensors",
        "hf:./nowhere": "no folder /.*/nowhere; expected the folder of a vision model",
        "timm:data/weights/nowhere": "no folder /.*/data/weights/nowhere; expected one that timm saved",
        "hf:data/weights/nowhere": "no folder /.*/data/weights/nowhere; expected the folder of a vision model",
    }
    for name, words in places.items():
        with pytest.raises(UserError, match=words) as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)


def test_a_wrong_name_says_what_there_is(workdir):
    with pytest.raises(UserError) as caught:
        load_encoder("resnet50")
    for family in ENCODERS.values():
        assert family.pattern in str(caught.value)
        assert family.pattern in ENCODER_HELP
    wrong = {
        "timm:vit_tiny_patch16_22": "Near: vit_tiny_patch16_224",
        "timm:vit_tiny_patch16_224.mine": "Known: vit_tiny_patch16_224.augreg_in21k",
        "open_clip:ViT-B-3": "Near: ViT-B-32",
        "open_clip:ViT-B-32": "names no weights: nothing after the architecture .*openai, .*open_clip:ViT-B-32/TAG",
        "open_clip:ViT-B-32/mine.pt": "mine.pt is neither a file nor one of open_clip's tags",
    }
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words):
            load_encoder(name)


def test_the_documents_table_is_the_registry(root):
    rows = [
        f"| `{family.pattern}` | {family.about} | {family.width} | {'yes' if family.load_text else 'no'} |" for family in ENCODERS.values()
    ]
    lines = (root / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| name | encoder and its embedding | width D | text tower |") + 2
    assert lines[start : start + len(rows) + 1] == [*rows, ""]


def test_a_new_family_is_one_entry(workdir, monkeypatch):
    found = Family("mine:NAME", "my own", "7", build=lambda name, pooling: None, load_text=lambda name: None)
    monkeypatch.setitem(ENCODERS, "mine", found)
    assert find_family("mine:first") is found
    assert load_text_tower("mine:first") is None


def test_files_of_another_kind_are_refused_in_one_line(workdir):
    (workdir / "text.pt").write_text("these are not weights")
    tiny_towers.add_open_clip_config(".")
    torch.save({"a": torch.zeros(3)}, "other.pt")
    tiny_towers.save_hf_clip("clip")
    tiny_towers.save_clap("clap")
    tiny.save_gpt2("gpt2")
    (workdir / "empty").mkdir()
    (workdir / "broken").mkdir()
    (workdir / "broken" / "config.json").write_text("{")
    shutil.copytree("clip", "bare", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    shutil.copytree("clip", "cut", ignore=shutil.ignore_patterns("model.safetensors"))
    (workdir / "cut" / "model.safetensors").write_bytes((workdir / "clip" / "model.safetensors").read_bytes()[:2000])
    shutil.copytree("gpt2", "data/weights/vit_tiny_patch16_224")
    wrong = {
        f"open_clip:{tiny_towers.OPEN_CLIP}/text.pt": "does not hold weights of tiny-ViT-16",
        f"open_clip:{tiny_towers.OPEN_CLIP}/other.pt": "does not hold weights of tiny-ViT-16",
        "timm:vit_tiny_patch16_224": "is of another model",
        "timm:empty": "is no folder of timm's",
        "hf:text.pt": "is a file; expected the folder",
        "hf:empty": "holds no vision model",
        "hf:clap": "write clap:clap",
        "clap:clip": "not a CLAP model.*write hf:clip",
        "hf:gpt2": "no vision model but a gpt2",
        "bare": "has no preprocessor_config.json",
        "cut": "holds no vision model",
        "broken": "broken/config.json cannot be read",
        "empty": "no encoder and no file named empty",
    }
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words) as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)


def test_a_feature_file_is_named_after_its_encoder(workdir):
    tiny_towers.save_hf_dinov2("weights/dino.v2")
    (workdir / "weights" / "mine.pt").write_bytes(b"")
    names = {
        "ViT-L/14@336px": "ViT-L_14@336px",
        "timm:vit_tiny_patch16_224.augreg_in21k": "timm_vit_tiny_patch16_224.augreg_in21k",
        "hf:openai/clip-vit-base-patch32": "hf_openai_clip-vit-base-patch32",
        "open_clip:ViT-B-32/laion2b_s34b_b79k": "open_clip_ViT-B-32_laion2b_s34b_b79k",
        f"open_clip:ViT-B-32/{workdir}/weights/mine.pt": "open_clip_ViT-B-32_mine",
        "open_clip:ViT-B-32/weights/mine.pt": "open_clip_ViT-B-32_mine",
        "clap:laion/clap-htsat-unfused": "clap_laion_clap-htsat-unfused",
        "weights/mine.pt": "mine",
        "weights/dino.v2/": "dino.v2",
        "hf:./weights/dino.v2": "hf_dino.v2",
    }
    assert {name: file_stem(name) for name in names} == names


@given(st.text("ab1:/.-_@ ", min_size=1).map("x".__add__))
def test_no_encoders_name_leads_out_of_a_folder(name):
    assert not set(file_stem(name)) & {"/", ":"}
