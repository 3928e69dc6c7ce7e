"""What a caption attends to: the weights are those of a full forward pass, and the model is left as it was."""

import pytest
import torch

import tiny
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig
from models.decoding import generate
from reports.explain import explain_caption
from reports.plots import plot_explanation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    gpt = tiny.random_gpt2(40, width=16, layers=2, heads=2, scale=0.5)
    gpt.set_attn_implementation("sdpa")
    config = CaptionConfig(encoder=None, clip_width=6, prefix_length=3, mapping_type="mlp")
    return ClipCaptionModel(config, gpt, tiny.word_tokenizer(40)).eval()


def test_attention_is_shared_among_prefix_vectors_and_the_model_left_as_it_was(model):
    embedding = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    before = generate(model, embedding, entry_length=6)
    found = explain_caption(model, embedding, "t3 t1 t4 t1")
    assert found["words"] == ["t3", "t1", "t4", "t1"]
    assert found["attention"].shape == (4, 3)
    assert found["attention"].sum(1) == pytest.approx([1, 1, 1, 1], abs=1e-5)
    assert model.gpt.config._attn_implementation == "sdpa"
    assert generate(model, embedding, entry_length=6) == before
    # A later word does not change what an earlier one attended to.
    assert explain_caption(model, embedding, "t3 t1")["attention"] == pytest.approx(found["attention"][:2], abs=1e-6)


def test_a_prefix_vector_that_is_a_word_is_nearest_to_that_word(model, monkeypatch):
    table = model.gpt.get_input_embeddings().weight
    monkeypatch.setattr(model, "encode_prefix", lambda clip_embedding: 3 * table[[7, 30, 2]][None].detach())
    nearest = explain_caption(model, torch.zeros(1, 6), "t1")["nearest"]
    assert [several[0][0] for several in nearest] == ["t7", "t30", "t2"]
    assert all(several[0][1] == pytest.approx(1) and several[0][1] > several[1][1] >= several[2][1] for several in nearest)


def test_the_picture_is_drawn_whatever_the_words(tmp_path, model):
    found = explain_caption(model, torch.ones(1, 6), "t3 t1")
    plot_explanation(["$x_", ""], found["attention"], found["nearest"], "a $ caption", tmp_path / "explain.png")
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")
