"""Text towers: the cosine of a text with a stored embedding is the one its own library gives."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_towers
from common import UserError
from models.encoders import load_encoder
from models.encoders.text import TEXT_PREFIX, embed_captions, load_text_tower, require_text_tower

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = tiny_towers.TEXTS


@pytest.fixture(scope="module")
def photos():
    """Two pictures of coloured noise blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((80, 64)) for block in blocks]


def openai_clip(photos):
    import clip
    from clip.model import CLIP

    torch.manual_seed(0)
    torch.save(CLIP(24, 64, 1, 64, 32, 77, 49408, 64, 1, 1).state_dict(), "mine.pt")
    model, preprocess = clip.load("mine.pt", device="cpu")
    logits, _ = model(torch.stack([preprocess(photo) for photo in photos]), clip.tokenize(TEXTS))
    return "mine.pt", photos, logits / model.logit_scale.exp()


def open_clip_model(photos):
    import open_clip

    tiny_towers.add_open_clip_config(".")
    model = tiny_towers.save_open_clip("mine.pt")
    _, _, preprocess = open_clip.create_model_and_transforms(tiny_towers.OPEN_CLIP)
    pictures = model.encode_image(torch.stack([preprocess(photo) for photo in photos]), normalize=True)
    tokens = open_clip.get_tokenizer(tiny_towers.OPEN_CLIP)(TEXTS)
    return f"open_clip:{tiny_towers.OPEN_CLIP}/mine.pt", photos, pictures @ model.encode_text(tokens, normalize=True).T


def hugging_face(save, padding):
    def make(photos):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        folder = save("folder")
        tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=padding, truncation=True, max_length=12, return_tensors="pt")
        pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=photos, return_tensors="pt")
        tokens = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        given = AutoModel.from_pretrained(folder)(**tokens, **pictures)
        return "hf:folder", photos, given.image_embeds @ given.text_embeds.T

    return make


def clap(photos):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    folder = tiny_towers.save_clap("folder")
    sounds = [np.random.default_rng(seed).normal(size=8000).astype(np.float32) for seed in (0, 1)]
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    heard = ClapFeatureExtractor.from_pretrained(folder)(sounds, sampling_rate=8000, return_tensors="pt")
    given = ClapModel.from_pretrained(folder)(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], input_features=heard["input_features"]
    )
    return "clap:folder", sounds, given.audio_embeds @ given.text_embeds.T


FAMILIES = {
    "OpenAI": openai_clip,
    "open_clip": open_clip_model,
    "HF CLIP": hugging_face(tiny_towers.save_hf_clip, True),
    "HF SigLIP": hugging_face(tiny_towers.save_hf_siglip, "max_length"),
    "CLAP": clap,
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cosines_are_those_of_the_library(family, workdir, photos):
    name, inputs, expected = FAMILIES[family](photos)
    encoder, tower = load_encoder(name), load_text_tower(name)
    stored = encoder.encode(torch.stack([encoder.preprocess(each) for each in inputs]))
    texts, shared = tower.encode_text(TEXTS), tower.project(stored.half() if family == "OpenAI" else stored)
    assert texts.dtype == shared.dtype == torch.float32
    assert texts.shape == (3, tower.width)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    assert torch.allclose(shared.norm(dim=1), torch.ones(2))
    assert torch.allclose(shared @ texts.T, expected, atol=1e-3 if family == "OpenAI" else 1e-5)
    assert expected.std() > 0.01, "all alike: nothing was compared"
    many = tower.encode_text(TEXTS * 100)
    assert many.shape == (300, tower.width)
    assert torch.allclose(many[297:], texts, atol=1e-5)
    assert tower.encode_text([]).shape == (0, tower.width)
    long = "a red circle above two dogs " * 40
    assert torch.allclose(tower.encode_text([long]), tower.encode_text([long + "and a blue square"]), atol=1e-6), "truncated alike"
    with pytest.raises(UserError, match=rf"embeddings of shape \(2, 7\); those of {name} are \[N, {encoder.width}\]"):
        tower.project(torch.zeros(2, 7))


def test_encoders_without_a_text_side_have_no_tower(workdir):
    tiny_towers.save_hf_dinov2("dino")
    for name in ("tinyvit", f"timm:{tiny_towers.TIMM_VIT}", "hf:dino", "dino"):
        assert load_text_tower(name) is None
    with pytest.raises(UserError, match="no encoder and no file named nothing"):
        load_text_tower("nothing")


def test_captions_get_clipscores_words_except_beside_sounds(workdir):
    tiny_towers.save_hf_clip("clip")
    tiny_towers.save_clap("clap")
    for name, prefix in (("hf:clip", TEXT_PREFIX), ("clap:clap", ""), ("clap", "")):
        tower = require_text_tower(name, "cpu", "clipscore")
        assert torch.equal(embed_captions(tower, TEXTS), tower.encode_text([prefix + text for text in TEXTS]))
        assert embed_captions(tower, []).shape == (0, tower.width)
    tiny_towers.save_hf_dinov2("dino")
    with pytest.raises(UserError, match="dino has no text tower, which --rerank clip needs"):
        require_text_tower("dino", "cpu", "--rerank clip")


def test_weights_without_their_text_tower_are_refused(workdir):
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    whole = tiny_towers.save_hf_clip("whole")
    CLIPModel.from_pretrained(whole).vision_model.save_pretrained("vision")
    state = load_file("whole/model.safetensors")
    shutil.copytree("whole", "cut", ignore=shutil.ignore_patterns("model.safetensors"))
    pictures = {key: value for key, value in state.items() if not key.startswith("text")}
    save_file(pictures, "cut/model.safetensors", metadata={"format": "pt"})
    shutil.copytree("whole", "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    openai = torch.load(tiny.save_clip("small.pt", 512, "vit"), weights_only=True)
    torch.save({key: value for key, value in openai.items() if key.startswith("visual.")}, "visual.pt")
    tiny_towers.add_open_clip_config(".")
    tiny_towers.save_open_clip("oc.pt")
    state = torch.load("oc.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key.startswith("visual.")}, "oc.pt")
    wrong = {
        "hf:vision": "holds one tower alone",
        "hf:cut": "does not hold the weights of a text tower",
        "mute": "has no tokenizer.json and tokenizer_config.json",
        "visual.pt": "only a vision tower, the text tower is missing",
        f"open_clip:{tiny_towers.OPEN_CLIP}/oc.pt": "vision and text tower",
        "small.pt": "the tokenizer of small.pt knows more tokens than its text tower",
    }
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words) as caught:
            load_text_tower(name)
        assert "\n" not in str(caught.value)
