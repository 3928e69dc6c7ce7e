"""Packed rows give the loss and gradients of plain padded ones, and an epoch's plan hands out every caption."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tiny
from benchmarks import published
from features.packing import Tokens, pack_captions, plan_epoch, tokenize_captions
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, CLIP_WIDTH = 19, 16, 6
END = VOCABULARY - 1
TOKENIZER = tiny.word_tokenizer(VOCABULARY)
GPT = tiny.random_gpt2(VOCABULARY, WIDTH, layers=2, heads=2, positions=32, scale=0.3)


def build_model(mapping_type, prefix_length, clip_length):
    torch.manual_seed(prefix_length)
    config = CaptionConfig(
        encoder=None, clip_width=CLIP_WIDTH, prefix_length=prefix_length, clip_length=clip_length, mapping_type=mapping_type, num_layers=1
    )
    return ClipCaptionModel(config, copy.deepcopy(GPT), TOKENIZER).eval()


def padded_loss(model, embeddings, captions, rows, ignore_index):
    """Mean loss of the captions, one padded row each; the padding is left out by a mask of its own."""
    tokens, mask = published.pad_captions(captions, max(map(len, captions)))
    logits = published.caption_logits(model.gpt, model.clip_project(embeddings[rows]).view(len(rows), -1, WIDTH), tokens, mask)
    counted = mask if ignore_index is None else mask & (tokens != ignore_index)
    return F.cross_entropy(logits[counted], tokens[counted], reduction="sum") / counted.sum()


def packed_loss(model, embeddings, numbers, tokens, rows, **options):
    batch = pack_captions(numbers, tokens, rows, model.config.prefix_length, **options)
    batch.clip_embedding = embeddings[batch.image_rows]
    return model(batch) / len(batch.labels), batch


def gradients(model, loss):
    """Gradients by name; a parameter that takes no part counts as zero."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@st.composite
def data_sets(draw):
    """Captions (lists of tokens, some of them "!") and their image rows, in any order."""
    images = draw(st.integers(1, 5))
    caption = st.lists(st.integers(0, END - 1), min_size=1, max_size=12)
    pairs = [(row, ids) for row in range(images) for ids in draw(st.lists(caption, min_size=1, max_size=6))]
    pairs = draw(st.permutations(pairs))
    return [ids for _, ids in pairs], [row for row, _ in pairs]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    data=data_sets(),
    sampling=st.sampled_from(["images", "captions"]),
    bs=st.integers(1, 12),
    prefix_length=st.integers(1, 9),
    mapping=st.sampled_from([("mlp", 1), ("transformer", 1), ("transformer", 4)]),
    ended=st.booleans(),
    ignore_index=st.sampled_from([None, 0]),
    double=st.booleans(),
    row_slots=st.sampled_from([None, None, 16, 24, 64]),
)
def test_packed_loss_and_gradients_equal_padded_ones(data, sampling, bs, prefix_length, mapping, ended, ignore_index, double, row_slots):
    captions, rows = data
    model = build_model(mapping[0], prefix_length, mapping[1])
    embeddings = torch.randn(max(rows) + 1, CLIP_WIDTH, generator=torch.Generator().manual_seed(len(captions)))
    if double:
        model, embeddings = model.double(), embeddings.double()
    tolerance = 1e-10 if double else 1e-5
    tokens = tokenize_captions([tiny.words(ids) for ids in captions], TOKENIZER, END if ended else None)
    targets = [[*ids, END] if ended else ids for ids in captions]
    for numbers in plan_epoch(rows, bs, sampling, seed=3, epoch=1)[:2]:
        chosen = [targets[number] for number in numbers]
        if all(token == ignore_index for ids in chosen for token in ids):
            continue  # nothing to predict: no mean
        plain = padded_loss(model, embeddings, chosen, [rows[number] for number in numbers], ignore_index)
        packed, batch = packed_loss(model, embeddings, numbers, tokens, rows, ignore_index=ignore_index, row_slots=row_slots)
        assert len(batch.labels) == sum(token != ignore_index for ids in chosen for token in ids)
        assert packed.item() == pytest.approx(plain.item(), abs=tolerance)
        expected = gradients(model, plain)
        found = gradients(model, packed)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def test_images_share_one_prefix_each_and_rows_hold_several_images():
    captions = [[1, 2, 3]] * 20
    rows = [number // 5 for number in range(20)]
    tokens = tokenize_captions([tiny.words(ids) for ids in captions], TOKENIZER, END)
    batch = pack_captions(np.arange(20), tokens, rows, 4, blocks_a_row=(2,))
    assert sorted(batch.image_rows.tolist()) == [0, 1, 2, 3]
    assert len(batch.prefix_slots) == 4 * 4
    assert len(batch.input_ids) == 2


def test_little_of_a_batch_is_padding():
    draw = np.random.default_rng(0)
    captions = [list(range(1, length)) for length in draw.integers(6, 22, 200)]
    tokens = tokenize_captions([tiny.words(ids) for ids in captions], TOKENIZER, END)
    for captions_an_image in (1, 5):
        rows = np.arange(200) // captions_an_image
        batch = pack_captions(np.arange(40), tokens, rows, 10)
        assert (batch.block_ids > 0).float().mean() > 0.9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    captions_an_image=st.integers(1, 6),
    row_slots=st.sampled_from([16, 64, 128]),
    packed=st.booleans(),
)
def test_rows_of_a_fixed_length_hold_every_caption_whole(lengths, captions_an_image, row_slots, packed):
    tokens = Tokens(np.arange(sum(lengths), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    rows = np.arange(len(lengths)) // captions_an_image
    batch = pack_captions(np.arange(len(lengths)), tokens, rows, 5, row_slots=row_slots, packed=packed)
    assert sorted(batch.labels.tolist()) == list(range(sum(lengths)))
    blocks = np.bincount(rows, np.array(lengths) - 1) + 5 if packed else np.array(lengths) + 4
    held, slots = batch.block_ids.shape
    assert (batch.block_ids > 0).sum() == blocks.sum()
    if packed:
        assert slots % row_slots == 0
        assert slots - row_slots < blocks.max() <= slots
        assert held <= 1 + 2 * blocks.sum() // slots, "two rows that are less than half full would have been one"
    else:
        assert held == len(lengths)
        assert slots % 16 == 0


def test_rows_of_a_fixed_length_come_in_few_shapes():
    draw = np.random.default_rng(1)
    lengths = draw.integers(8, 22, 2000)
    tokens = Tokens(draw.integers(1, 9, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    rows = np.arange(2000) // 5
    shapes = {
        row_slots: {tuple(pack_captions(batch, tokens, rows, 10, row_slots=row_slots).input_ids.shape) for batch in plan_epoch(rows, 100)}
        for row_slots in (None, 256)
    }
    assert len(shapes[256]) <= 3 < 10 < len(shapes[None])


def test_what_else_is_in_the_row_does_not_change_a_caption():
    model = build_model("mlp", 3, 1).double()
    embeddings = torch.randn(3, CLIP_WIDTH, generator=torch.Generator().manual_seed(0)).double()
    captions, rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 1]], [0, 0, 1, 2]
    tokens = tokenize_captions([tiny.words(ids) for ids in captions], TOKENIZER, END)
    alone = [packed_loss(model, embeddings, [number], tokens, rows) for number in range(4)]
    together, batch = packed_loss(model, embeddings, [0, 1, 2, 3], tokens, rows)
    total = sum(loss * len(one.labels) for loss, one in alone)
    assert (together * len(batch.labels)).item() == pytest.approx(total.item(), abs=1e-10)


def test_tokens_are_the_tokenizers_own_with_the_end_token_last():
    tokenizer = tiny.train_tokenizer()
    end = tokenizer.eos_token_id
    plain = tokenize_captions(tiny.CAPTIONS, tokenizer)
    ended = tokenize_captions(tiny.CAPTIONS, tokenizer, end_token_id=end)
    assert len(plain.offsets) == len(tiny.CAPTIONS) + 1
    for number, caption in enumerate(tiny.CAPTIONS):
        ids = plain.ids[plain.offsets[number] : plain.offsets[number + 1]].tolist()
        assert tokenizer.decode(ids) == caption
        assert ended.ids[ended.offsets[number] : ended.offsets[number + 1]].tolist() == [*ids, end]


rows_of_captions = st.lists(st.integers(0, 9), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=rows_of_captions, bs=st.integers(1, 16), sampling=st.sampled_from(["images", "captions"]), epoch=st.integers(0, 3))
def test_an_epoch_hands_out_every_caption_exactly_once(rows, bs, sampling, epoch):
    batches = plan_epoch(rows, bs, sampling, seed=5, epoch=epoch, drop_last=False)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(rows)))
    assert [len(batch) for batch in batches[:-1]] == [bs] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= bs
    whole = plan_epoch(rows, bs, sampling, seed=5, epoch=epoch, drop_last=True)
    assert len(whole) == len(rows) // bs
    assert all(len(batch) == bs for batch in whole)
    assert len({int(number) for batch in whole for number in batch}) == len(whole) * bs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=rows_of_captions, bs=st.integers(1, 16))
def test_sampling_images_splits_an_image_only_where_a_batch_ends(rows, bs):
    order = np.concatenate(plan_epoch(rows, bs, "images", seed=2, epoch=0, drop_last=False))
    images = [rows[number] for number in order]
    runs = 1 + sum(before != after for before, after in zip(images, images[1:]))
    assert runs == len(set(rows)), "an image's captions stand apart"


@pytest.mark.parametrize("sampling", ["images", "captions"])
def test_an_epochs_order_follows_its_seed_and_number(sampling):
    rows = [number // 5 for number in range(200)]

    def order(seed, epoch):
        return np.concatenate(plan_epoch(rows, 40, sampling, seed=seed, epoch=epoch, drop_last=False)).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 0) != list(range(200))


def test_sampling_captions_mixes_images_in_a_batch():
    rows = [number // 5 for number in range(1000)]
    first = plan_epoch(rows, 40, "captions", seed=0, epoch=0, drop_last=True)[0]
    assert len({rows[number] for number in first}) > 30
