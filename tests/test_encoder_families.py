"""Every encoder family against its own library: small random weights in that library's files, loaded by name."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_towers
from common import UserError
from models.encoders import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

VISION_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model", "dinov2": "Dinov2Model"}
SAVE = {
    "clip": tiny_towers.save_hf_clip,
    "siglip": tiny_towers.save_hf_siglip,
    "siglip2": tiny_towers.save_hf_siglip2,
    "dinov2": tiny_towers.save_hf_dinov2,
}


@pytest.fixture(scope="module")
def photo():
    """Scikit-image's astronaut, 512 x 400: not square."""
    from skimage.data import astronaut

    return Image.fromarray(astronaut()[:400])


@pytest.fixture(scope="module")
def sound():
    """0.9 s of a rising tone at 8,000 Hz."""
    seconds = np.arange(7200) / 8000
    return np.sin(2 * np.pi * (200 + 700 * seconds) * seconds).astype(np.float32)


# -- each family: make weights → its name, and the library's own way from picture to (pooled features, tokens or None) --------


def openai_clip(vision, width):
    def make(photo):
        import clip

        path = tiny.save_clip("mine.pt", width, vision)
        model, preprocess = clip.load(str(path), device="cpu")
        return str(path), model.encode_image(preprocess(photo)[None]), None

    return make


def timm_model(timm_name, place, name):
    def make(photo):
        import timm

        model = tiny_towers.save_timm(f"data/weights/{place}", timm_name)
        picture = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(photo)[None]
        tokens = model.forward_features(picture)
        return name, model.forward_head(tokens, pre_logits=True), tokens if tokens.dim() == 3 else None

    return make


def open_clip_model(photo):
    import open_clip

    tiny_towers.add_open_clip_config(".")
    tiny_towers.save_open_clip("folder/mine.pt")
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_towers.OPEN_CLIP, pretrained="folder/mine.pt")
    model.eval().visual.output_tokens = True
    pooled, tokens = model.visual(preprocess(photo)[None])
    return f"open_clip:{tiny_towers.OPEN_CLIP}/folder/mine.pt", pooled, tokens


def hugging_face(kind):
    def make(photo):
        import transformers

        folder = SAVE[kind]("data/weights/someone/model")
        model = getattr(transformers, VISION_CLASSES[kind]).from_pretrained(folder)
        inputs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(images=photo, return_tensors="pt")
        given = getattr(model, "vision_model", model)(**inputs)
        return "hf:someone/model", given.pooler_output, given.last_hidden_state

    return make


CONVNET = "mobilenetv3_small_050.lamb_in1k"  # its features before the classifier are wider than its last feature map
FAMILIES = {
    "OpenAI ViT": (openai_clip("vit", 512), 512, [0.42739, -0.16967, -0.71264, 0.42535]),
    "OpenAI RN": (openai_clip("resnet", 640), 640, [0.033516, -0.025641, 0.013589, 0.02689]),
    "timm TinyViT": (timm_model("tiny_vit_21m_224.dist_in22k_ft_in1k", "tinyvit", "tinyvit"), 576, [0.74306, 2.6646, -0.27003, 0.31074]),
    "timm ViT": (
        timm_model(tiny_towers.TIMM_VIT, tiny_towers.TIMM_VIT, f"timm:{tiny_towers.TIMM_VIT}"),
        192,
        [-0.73233, -0.53493, 1.0087, 0.74696],
    ),
    "timm convolutions": (timm_model(CONVNET, CONVNET, f"timm:{CONVNET}"), 1024, [0.0016132, 0.0010697, -0.004503, -0.00086903]),
    "open_clip": (open_clip_model, 24, [1.5114, -0.80939, 0.25018, -0.76206]),
    "HF CLIP": (hugging_face("clip"), 32, [0.2271, 1.1283, -1.2949, -0.727]),
    "HF SigLIP": (hugging_face("siglip"), 32, [-3.184, -14.888, -2.1973, 10.246]),
    "HF SigLIP 2": (hugging_face("siglip2"), 32, [-4.4776, -29.438, 3.9579, -18.995]),
    "HF DINOv2": (hugging_face("dinov2"), 32, [-0.50235, 0.17811, 0.19646, 1.1057]),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_gives_its_librarys_features_and_a_stored_vector(family, workdir, photo):
    make, width, stored = FAMILIES[family]
    name, pooled, tokens = make(photo)
    encoder = load_encoder(name)
    assert (encoder.name, encoder.width, encoder.dtype, encoder.modality, encoder.pooling) == (name, width, "float32", "image", "pooled")
    assert not encoder.module.training
    assert not any(module.training for module in encoder.module.modules())
    assert {"image_size", "resize", "interpolation", "crop", "mean", "std"} <= set(encoder.preprocessing)
    picture = pickle.loads(pickle.dumps(encoder.preprocess))(photo)
    embeddings = encoder.encode(torch.stack([picture, encoder.preprocess(photo.rotate(180))]))
    assert picture.dtype == embeddings.dtype == torch.float32
    assert embeddings.shape == (2, width)
    assert torch.allclose(embeddings[:1], pooled, rtol=1e-4, atol=1e-4 * float(pooled.abs().max()))
    assert (embeddings[0, :4] - torch.tensor(stored)).abs().max() < 1e-3 * embeddings[0].abs().max(), "the preprocessing has changed"
    if tokens is not None:
        unpooled = load_encoder(name, pooling="none")
        given = unpooled.encode(picture[None])
        assert unpooled.pooling == "none"
        assert (given.shape, unpooled.width) == (tokens.shape, tokens.shape[2])
        present = slice(0, int(picture[:, -3].sum())) if family == "HF SigLIP 2" else slice(None)
        assert torch.allclose(given[:, present], tokens[:, present], rtol=1e-4, atol=1e-4 * float(tokens.abs().max()))
        assert present.stop is None or present.stop < given.shape[1] and not given[:, present.stop :].any(), "no patch: zeros"


@torch.no_grad()
def test_the_class_token_of_openais_vit_becomes_its_embedding(workdir, photo):
    tiny.save_clip("mine.pt", 512, "vit")
    encoder, unpooled = load_encoder("mine.pt"), load_encoder("mine.pt", pooling="none")
    picture = encoder.preprocess(photo)[None]
    tokens, visual = unpooled.encode(picture), encoder.module
    assert tokens.shape == (1, 1 + 4, 64)
    assert unpooled.width == 64
    assert torch.allclose(visual.ln_post(tokens[:, 0]) @ visual.proj, encoder.encode(picture), atol=1e-5)


def test_towers_without_tokens_say_so(workdir):
    tiny.save_clip("rn.pt", 640, "resnet")
    tiny_towers.save_timm(f"data/weights/{CONVNET}", CONVNET)
    tiny_towers.save_clap("clap")
    for name in ("rn.pt", f"timm:{CONVNET}", "clap:clap"):
        with pytest.raises(UserError, match="no patch tokens") as caught:
            load_encoder(name, pooling="none")
        assert name in str(caught.value)
    with pytest.raises(UserError, match="no pooling mean: expected pooled or none"):
        load_encoder("rn.pt", pooling="mean")


@torch.no_grad()
@pytest.mark.parametrize("fusion", [False, True])
def test_clap_gives_its_librarys_projected_embedding_of_a_window(fusion, workdir, sound):
    from transformers import ClapAudioModelWithProjection, ClapConfig, ClapFeatureExtractor

    tiny_towers.save_clap("folder", fusion=fusion)
    encoder = load_encoder("clap:folder")
    assert (encoder.modality, encoder.width, encoder.preprocessing["sample_rate"]) == ("audio", 24, 8000)
    assert encoder.preprocessing["window_seconds"] == 1.0
    assert not encoder.module.training
    window = pickle.loads(pickle.dumps(encoder.preprocess))(sound)
    embeddings = encoder.encode(torch.stack([window, encoder.preprocess(sound[::-1])]))
    given = ClapFeatureExtractor.from_pretrained("folder")(sound, sampling_rate=8000, return_tensors="pt")
    library = ClapAudioModelWithProjection.from_pretrained("folder", config=ClapConfig.from_pretrained("folder").audio_config)
    expected = library.eval()(given["input_features"], is_longer=torch.tensor([[False]])).audio_embeds
    assert torch.allclose(embeddings[:1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(embeddings[1:], expected, rtol=0.01)
    assert torch.allclose(encoder.encode(window[None]), embeddings[:1], rtol=1e-4, atol=1e-4), "whatever stands beside it in the batch"
    stored = [-7.1697, 8.9199, -3.4757, 1.9304] if fusion else [14.315, 1.4491, -5.0574, 3.2493]
    assert (embeddings[0, :4] - torch.tensor(stored)).abs().max() < 1e-3 * embeddings[0].abs().max(), "the preprocessing has changed"


def test_clap_refuses_windows_it_would_crop_at_random_and_what_is_no_waveform(workdir, sound):
    tiny_towers.save_clap("folder")
    preprocess = load_encoder("folder").preprocess
    assert preprocess(np.zeros(8000, np.float32)).shape == preprocess(sound[:10]).shape
    bad = {"8001 samples": np.zeros(8001), "one channel": np.zeros((2, 100)), "at least one": np.zeros(0), "NaN": np.full(9, np.nan)}
    for words, waveform in bad.items():
        with pytest.raises(ValueError, match=words):
            preprocess(waveform.astype(np.float32))
    for picture in (workdir / "a.png", "a.png", b"", Image.new("RGB", (9, 9))):
        with pytest.raises(ValueError, match="not a waveform: this encoder takes sounds"):
            preprocess(picture)


@pytest.mark.parametrize("kind", SAVE)
def test_a_folder_works_by_its_bare_path_and_under_its_family(kind, workdir):
    SAVE[kind]("folder")
    assert load_encoder("folder").digest() == load_encoder("hf:folder").digest() == load_encoder(f"hf:{workdir}/folder").digest()


def test_an_explicit_path_is_not_shadowed_by_data_weights(workdir):
    tiny_towers.save_hf_dinov2("folder")
    tiny_towers.save_hf_dinov2("data/weights/folder", seed=1)
    assert load_encoder("hf:./folder").digest() != load_encoder("hf:folder").digest() == load_encoder("hf:data/weights/folder").digest()


def test_timm_and_open_clip_folders_as_on_the_hub(workdir, photo):
    import json

    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    timm.models.save_for_hf(model, "own")
    encoder = load_encoder("timm:own")
    assert encoder.width == 192
    assert encoder.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert load_encoder("own").digest() == encoder.digest()
    config = tiny_towers.add_open_clip_config(".")
    state = tiny_towers.save_open_clip("mine.pt").state_dict()
    (workdir / "oc").mkdir()
    told = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
    (workdir / "oc" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": told}))
    with pytest.raises(UserError, match="holds neither open_clip_model.safetensors"):
        load_encoder("open_clip:oc")
    save_file(state, workdir / "oc" / "open_clip_model.safetensors")
    encoder = load_encoder("open_clip:oc")
    assert encoder.width == 24
    assert encoder.preprocessing["crop"] == "squash"
    assert encoder.preprocessing["interpolation"] == "bilinear"
    assert encoder.preprocess(photo).shape == (3, 32, 32)
    assert encoder.digest() == load_encoder(f"open_clip:{tiny_towers.OPEN_CLIP}/{workdir}/mine.pt").digest()


@torch.no_grad()
def test_an_open_clip_tag_brings_its_preprocessing_and_activation(workdir, photo, monkeypatch):
    import open_clip

    told = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "longest"}
    tag = {"hf_hub": "someone/model/", "quick_gelu": True, **told}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_towers.OPEN_CLIP, {"mine": tag})
    tiny_towers.add_open_clip_config(".")
    tiny_towers.save_open_clip(f"data/weights/{tiny_towers.OPEN_CLIP}/mine.pt")
    encoder = load_encoder(f"open_clip:{tiny_towers.OPEN_CLIP}/mine")
    model, _, preprocess = open_clip.create_model_and_transforms(
        tiny_towers.OPEN_CLIP, f"data/weights/{tiny_towers.OPEN_CLIP}/mine.pt", force_quick_gelu=True,
        image_mean=told["mean"], image_std=told["std"], image_interpolation="bilinear", image_resize_mode="longest",
    )  # fmt: skip
    assert torch.equal(encoder.preprocess(photo), preprocess(photo))
    assert torch.allclose(encoder.encode(preprocess(photo)[None]), model.eval().encode_image(preprocess(photo)[None]), atol=1e-5)


def test_vision_weights_with_and_without_a_prefix_are_the_same_tower(workdir):
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    whole = tiny_towers.save_hf_clip("whole")
    CLIPModel.from_pretrained(whole).vision_model.save_pretrained("bare")
    shutil.copytree("bare", "prefixed")
    state = load_file("bare/model.safetensors")
    assert "post_layernorm.weight" in state
    old = {f"vision_model.{key}": value for key, value in state.items()} | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_file(old, "prefixed/model.safetensors", metadata={"format": "pt"})
    for folder in ("bare", "prefixed"):
        shutil.copy("whole/preprocessor_config.json", folder)
        assert load_encoder(folder).digest() == load_encoder("whole").digest()
    del old["vision_model.post_layernorm.weight"]
    save_file(old, "prefixed/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 keys missing .* post_layernorm\.weight"):
        load_encoder("prefixed")


@torch.no_grad()
def test_a_vit_whose_weights_lack_a_pooler_gives_its_class_token(workdir, photo):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    model = ViTForImageClassification(ViTConfig(**tiny_towers.VISION)).eval()
    model.save_pretrained("folder")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("folder")
    encoder = load_encoder("folder")
    picture = encoder.preprocess(photo)[None]
    assert torch.allclose(encoder.encode(picture), model.vit(picture).last_hidden_state[:, 0], atol=1e-5)


@pytest.mark.slow
def test_a_full_size_open_clip_model_from_a_folder_of_its_tag(workdir, photo):
    tiny_towers.save_open_clip("data/weights/ViT-B-32/laion2b_s34b_b79k/open_clip_pytorch_model.bin", "ViT-B-32")
    encoder = load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert encoder.width == 512
    assert encoder.preprocessing["image_size"] == 224
    assert encoder.encode(encoder.preprocess(photo)[None]).shape == (1, 512)
