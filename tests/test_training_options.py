"""The optimiser's options, memory, and several embeddings an image: what they change, and what they leave alone."""

import json
import re

import numpy as np
import pytest
import torch

import tiny
import train
from helpers import captioner
from helpers import train_tiny as run
from models.checkpoints import load_checkpoint
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """A folder with a small random GPT-2 of four blocks."""
    folder = tmp_path_factory.mktemp("four_blocks")
    tiny.save_language_model(folder / "gpt2", "gpt2")
    return folder


@pytest.fixture
def data(workdir):
    """A published feature file of 6 images and 16 captions in the working directory."""
    captions = [[tiny.CAPTIONS[(row + number) % 8] for number in range(1 + row % 4)] for row in range(6)]
    tiny.save_published_features(workdir / "train.pkl", captions, width=32)
    return workdir


def weights(path):
    return torch.load(path, weights_only=True)


def losses(prefix):
    return [json.loads(line)["loss"] for line in open(f"out/{prefix}_metrics.jsonl")]


@pytest.mark.parametrize(
    "tune, more, accumulate", [("full", [], 2), ("mapper", ["--gradient_checkpointing"], 4), ("lora", ["--lora_dropout", 0], 100)]
)
def test_accumulating_changes_losses_and_gradients_by_rounding_only(data, language_models, tune, more, accumulate):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    gradients = []

    def look(optimizer, arguments, options):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    words = ["--tune", tune, "--gpt2_dropout", 0, "--max_steps", 1]
    hook = register_optimizer_step_pre_hook(look)
    try:
        run(language_models / "gpt2", *words, *(more if tune == "lora" else []), "--prefix", "whole")
        run(language_models / "gpt2", *words, *more, "--prefix", "parts", "--accumulate", accumulate)
    finally:
        hook.remove()
    assert losses("whole") == pytest.approx(losses("parts"), abs=1e-5)
    assert len(gradients[0]) == len(gradients[1])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_runs_each_block_again_and_changes_no_bit(data, language_models, tune, monkeypatch):
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls, forward = [0], GPT2MLP.forward

    def counted(self, x):
        calls[0] += 1
        return forward(self, x)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    counts = []
    for prefix, more in (("kept", []), ("again", ["--gradient_checkpointing"])):
        calls[0] = 0
        run(language_models / "gpt2", "--tune", tune, "--max_steps", 3, "--prefix", prefix, *more)
        counts.append(calls[0])
    assert counts[1] == counts[0] + 3 * 4
    one, two = weights("out/kept-000.pt"), weights("out/again-000.pt")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rates_and_decay_fall_where_they_should(language_models):
    from training.optimizer import parameter_groups

    model = captioner(language_models / "gpt2", tune="full")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(dict(model.named_parameters()), 1e-3, 1e-4, 0.1)
    assert len(groups) == 4
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["peak"] == (1e-4 if name.startswith("clip_project") else 1e-3)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.1), name


def test_the_warm_up_may_be_a_share_of_the_run(data, language_models):
    run(language_models / "gpt2", "--max_steps", 10, "--epochs", 9, "--warmup_ratio", 0.4)
    rates = [json.loads(line)["lr"] for line in open("out/coco_prefix_metrics.jsonl")]
    assert rates == pytest.approx([1e-3 * share for share in (0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


@pytest.mark.parametrize(("more", "steps", "warm_up"), [([], 40, 2), ([], 141_000, 5000), ([], 60_000, 3000), (["--published"], 40, 5000),
                                                        (["--warmup_steps", "7"], 40, 7)])  # fmt: skip
def test_the_default_warm_up_is_5000_steps_but_at_most_a_twentieth_of_the_run(more, steps, warm_up):
    from training.batches import count_warmup
    from training.options import parse_options

    assert count_warmup(parse_options(more, ""), steps) == warm_up


def test_a_short_run_at_the_published_rate_is_advised(data, language_models, capsys):
    run(language_models / "gpt2", "--max_steps", 1, "--lr", 2e-5)
    assert "advice: 1 steps at the published --lr of 2e-05" in capsys.readouterr().out
    run(language_models / "gpt2", "--max_steps", 1, "--lr", 3e-4)
    assert "advice" not in capsys.readouterr().out


def test_the_gradient_is_clipped_over_all_of_it(data, language_models, monkeypatch):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    norms = []

    def look(optimizer, arguments, options):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        run(language_models / "gpt2", "--max_steps", 2)
        run(language_models / "gpt2", "--max_steps", 2, "--clip_grad", 0.01)
    finally:
        hook.remove()
    assert min(norms[:2]) > 0.02
    assert norms[2:] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_table_of_parameters_adds_up_and_memory_is_estimated(data, language_models, capsys):
    run(language_models / "gpt2", "--tune", "ends", "--max_steps", 0)
    said = capsys.readouterr().out
    rows = re.findall(r"^  (\w[\w ]+?) +([\d,]+) of +([\d,]+)$", said, re.M)
    trained, total = (sum(int(row[column].replace(",", "")) for row in rows) for column in (1, 2))
    assert f"parameters: {trained:,} trained of {total:,} (--tune ends)" in said
    assert {row[0]: row[1] for row in rows}["blocks between"] == "0"
    assert re.search(r"memory: about [\d,]+ MiB at the peak of a step", said)


def test_activations_are_counted_as_they_are_kept(language_models, data):
    """The count without computing equals what autograd keeps in a real forward pass."""
    import argparse

    from training.data import load_data, tokenize_data
    from training.setup import count_activations

    model = captioner(language_models / "gpt2", tune="mapper")
    options = argparse.Namespace(stop_token=None, prefix_length=4, cut_captions=False, ignore_index=None, bs=6, accumulate=1)
    vars(options).update(sampling="images", gradient_checkpointing=False)
    captions = tokenize_data(load_data(["train.pkl"], False, print), model, options, print, "train.pkl")
    from features.packing import plan_epoch

    longest = max(plan_epoch(captions.caption_rows, 6), key=lambda numbers: captions.tokens.lengths[numbers].sum())
    batch, kept = captions.pack(longest), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    real = sum(size for place, (size, _) in kept.items() if place not in own)
    assert count_activations(model, captions, options, "no")[0] == pytest.approx(real, rel=0.02)


def several(images=5, vectors=3, seed=0):
    """[N, L, 32] embeddings of which some vectors are zeros, that is absent."""
    embeddings = torch.randn(images, vectors, 32, generator=torch.Generator().manual_seed(seed))
    for row in range(images):
        embeddings[row, 1 + row % vectors :] = 0
    return embeddings


@pytest.mark.parametrize("normalize", [False, True])
def test_absent_vectors_change_nothing_and_present_ones_do(language_models, normalize):
    sizes = {"mapping_type": "transformer", "num_layers": 2, "embeddings_per_image": 3, "normalize_prefix": normalize}
    model = captioner(language_models / "gpt2", tune="mapper", **sizes).eval()
    assert model.clip_project.linear.weight.shape == (64, 32)
    embeddings = several()
    with torch.no_grad():
        prefix = model.encode_prefix(embeddings)
        assert prefix.shape == (5, 4, 64)
        assert torch.isfinite(prefix).all()
        longer = model.encode_prefix(torch.cat([embeddings, torch.zeros(5, 2, 32)], dim=1))
        torch.testing.assert_close(longer, prefix, rtol=0, atol=1e-5)
        fewer = model.encode_prefix(embeddings[2:3, :2])
        assert (fewer - prefix[2:3]).abs().max() > 1e-3


@pytest.mark.parametrize("mapping_type", ["mlp", "linear"])
def test_a_mapper_of_one_vector_refuses_several(language_models, mapping_type):
    with pytest.raises(ValueError, match="hold 3 embeddings per image.*take --mapping_type transformer"):
        captioner(language_models / "gpt2", tune="mapper", mapping_type=mapping_type, embeddings_per_image=3)


def test_a_model_trains_on_several_embeddings_an_image(data, language_models, monkeypatch):
    """The features are handed over as tensors; that a file holds them is features/store.py's."""
    import training.data
    from features.store import Features

    embeddings = several(6)
    captions = [{"image_id": row, "caption": tiny.CAPTIONS[row], "id": row, "clip_embedding": row} for row in range(6)]
    monkeypatch.setattr(train, "load_data", lambda *_: Features(embeddings, captions, {}))
    words = ["--mapping_type", "transformer", "--num_layers", 1, "--epochs", 12, "--lr", "3e-3"]
    run(language_models / "gpt2", "--tune", "mapper", *words)
    assert np.mean(losses("coco_prefix")[-3:]) < losses("coco_prefix")[0]
    model = load_checkpoint("out/coco_prefix-011.pt")
    assert model.config.embeddings_per_image == 3
    assert model.config.clip_width == 32
    assert len(generate(model, embeddings[:2], entry_length=4)) == 2
    assert training.data.load_data
