"""Encoders against the libraries they wrap, on small random weights."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from common import UserError
from models.encoders import load_encoder
from models.encoders.openai import CLIP_NAMES
from models.encoders.timm import TINYVIT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo():
    """A picture with smooth shades and hard edges, 150 x 100."""
    rows, columns = np.mgrid[0:100, 0:150]
    pixels = np.stack([rows * 2.5, columns * 1.7, (rows // 10 + columns // 10) % 2 * 255], 2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "width", "vision"), [("ViT-B/32", 512, "vit"), ("RN50x4", 640, "resnet")])
def test_clip_features_are_those_of_clip_load(name, width, vision, workdir, photo):
    import clip

    path = tiny.save_clip(workdir / "data" / "weights" / f"{name.replace('/', '-')}.pt", width, vision)
    encoder = load_encoder(name)
    model, preprocess = clip.load(str(path), device="cpu")
    assert (encoder.name, encoder.width, encoder.device.type) == (name, width, "cpu")
    pictures = torch.stack([preprocess(photo), preprocess(photo.rotate(90, expand=True))])
    assert torch.equal(torch.stack([encoder.preprocess(photo), encoder.preprocess(photo.rotate(90, expand=True))]), pictures)
    embeddings = encoder.encode(pictures)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (2, width)
    assert not embeddings.requires_grad
    with torch.no_grad():
        assert torch.equal(embeddings, model.encode_image(pictures))
    assert all(parameter.dtype == torch.float32 and not parameter.requires_grad for parameter in encoder.module.parameters())


def test_every_published_clip_name_is_known_in_the_librarys_order():
    import clip

    assert list(CLIP_NAMES) == clip.available_models()


def test_preprocessing_is_told_in_numbers_and_travels_without_weights(workdir, photo):
    tiny.save_clip(workdir / "mine.pt", 512, "vit")
    encoder = load_encoder("mine.pt")
    packed = pickle.dumps(encoder.preprocess)
    assert len(packed) < 5000
    assert torch.equal(pickle.loads(packed)(photo), encoder.preprocess(photo))
    file = io.BytesIO()
    photo.save(file, "PNG")
    photo.save(workdir / "photo.png")
    for source in (file.getvalue(), "photo.png", workdir / "photo.png", photo.convert("RGBA"), photo.convert("RGB")):
        assert torch.equal(encoder.preprocess(source), encoder.preprocess(photo))
    told = encoder.preprocessing
    side = told["resize"]
    shown = photo.resize((side * 150 // 100, side), Image.Resampling.BICUBIC)
    left = round((shown.width - side) / 2)
    pixels = np.asarray(shown.crop((left, 0, left + side, side)), np.float32) / 255
    by_hand = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    assert np.abs(encoder.preprocess(photo).numpy() - by_hand.transpose(2, 0, 1)).max() < 1e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_torchscript_archive_gives_the_features_of_its_state_dict(workdir):
    from clip.model import CLIP

    tiny.save_clip(workdir / "plain.pt", 512, "vit")
    model = CLIP(512, 64, 1, 64, 32, 77, 64, 64, 1, 1).eval()
    model.load_state_dict(torch.load("plain.pt", weights_only=True))
    inputs = torch.randn(1, 3, 64, 64), torch.randint(0, 64, (1, 77))
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), "archive.pt")
    plain, archive = load_encoder("plain.pt"), load_encoder("archive.pt")
    assert torch.equal(plain.encode(inputs[0]), archive.encode(inputs[0]))
    other = load_encoder(tiny.save_clip(workdir / "other.pt", 512, "vit", seed=1))
    assert plain.digest() == archive.digest() != other.digest()


def test_tinyvit_gives_timms_features_before_the_classifier_from_each_kind_of_file(workdir, photo):
    import timm

    folder = tiny.save_tinyvit(workdir / "data" / "weights" / "tinyvit")
    encoder = load_encoder("tinyvit")
    assert (encoder.name, encoder.width) == ("tinyvit", 576)
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    model = timm.create_model(TINYVIT, pretrained=False).eval()
    model.load_state_dict(state)
    config = timm.data.resolve_model_data_config(model)
    picture = timm.data.create_transform(**config, is_training=False)(photo)
    assert torch.equal(pickle.loads(pickle.dumps(encoder.preprocess))(photo), picture)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(picture[None]), pre_logits=True)
    assert torch.allclose(encoder.encode(picture[None]), expected, atol=1e-6)
    assert encoder.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert encoder.preprocessing["resize"] == 235
    (folder / "model.safetensors").unlink()
    torch.save({"model": state}, folder / "pytorch_model.bin")
    assert load_encoder("tinyvit").digest() == encoder.digest()


def test_half_precision_is_near_and_still_stored_in_full(workdir):
    tiny.save_clip(workdir / "mine.pt", 512, "vit")
    pictures = torch.randn(4, 3, 64, 64)
    exact, near = load_encoder("mine.pt").encode(pictures), load_encoder("mine.pt", mixed_precision="bf16").encode(pictures)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_picture_longer_than_memory_allows_is_seen_by_its_middle(workdir, monkeypatch):
    tiny.save_clip(workdir / "mine.pt", 512, "vit")
    encoder = load_encoder("mine.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4001, 3), dtype=np.uint8)
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        whole = encoder.preprocess(picture)
        monkeypatch.setattr("models.encoders.preprocess.MOST_RESIZED_PIXELS", 64 * 64 * 101)
        assert encoder.preprocess(picture).shape == (3, 64, 64)
        assert (encoder.preprocess(picture) - whole).abs().max() < 0.02, "the same middle, to one level in 255"
        monkeypatch.undo()
    assert encoder.preprocess(Image.fromarray(pixels[:1, :1])).shape == (3, 64, 64)


def test_an_unknown_name_lists_the_known_ones(workdir):
    with pytest.raises(UserError) as caught:
        load_encoder("ViT-B-32-typo.pt")
    for name in (*CLIP_NAMES, "tinyvit"):
        assert name in str(caught.value)
    tiny.save_clip(workdir / "mine.pt", 512, "vit")
    with pytest.raises(UserError, match="no device"):
        load_encoder("mine.pt", "toaster")


class Payload:
    """Pickles to a call that would make a file."""

    def __reduce__(self):
        return open, ("was_run", "w")


def test_files_that_are_not_clip_weights_give_one_line_and_run_nothing(workdir):
    (workdir / "text.pt").write_text("these are not weights")
    (workdir / "empty.pt").write_bytes(b"")
    torch.save({"a": torch.zeros(3)}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"visual.proj": Payload()}, "code.pt")
    whole = tiny.save_clip(workdir / "whole.pt", 512, "vit").read_bytes()
    (workdir / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("text.pt", "empty.pt", "other.pt", "list.pt", "code.pt", "cut.pt"):
        with pytest.raises(UserError, match="does not hold CLIP weights") as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    assert not (workdir / "was_run").exists()


def test_weights_out_of_reach_say_what_to_download_and_where_to_put_it(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setattr("models.weights.hub_is_reachable", lambda address: False)
    with pytest.raises(UserError, match=r"https://openaipublic\.azureedge\.net/.*/ViT-B-32\.pt .*data/weights/ViT-B-32\.pt"):
        load_encoder("ViT-B/32")
    with pytest.raises(UserError, match=r"https://.*/timm/tiny_vit.*/model\.safetensors .*data/weights/tinyvit/model\.safetensors"):
        load_encoder("tinyvit")
    (workdir / "data" / "weights" / "tinyvit").mkdir(parents=True)
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        load_encoder("tinyvit")
    torch.save({"a": torch.zeros(3)}, workdir / "data" / "weights" / "tinyvit" / "pytorch_model.bin")
    with pytest.raises(UserError, match="of another model"):
        load_encoder("tinyvit")
