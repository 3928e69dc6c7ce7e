"""Batches packed ahead: the same ones in the same order, whatever the number of processes, and rows of one length where there is a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import train
from features.packing import Tokens
from training import batches
from training.batches import choose_row_slots, packed_steps
from training.data import CaptionData

pytestmark = pytest.mark.usefixtures("one_thread")


class Features:
    """Five images."""

    clip_embedding = torch.arange(10.0).view(5, 2)


def caption_data(captions=23):
    lengths = np.random.default_rng(0).integers(3, 9, captions)
    tokens = Tokens(np.arange(lengths.sum(), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    return CaptionData(Features, tokens, np.arange(captions) % 5, 2)


def contents(step):
    return step.captions.tolist(), step.has_share, step.predicted, [part.labels.tolist() for part in step.parts]


@settings(max_examples=40, deadline=None)
@given(bs=st.integers(1, 23), accumulate=st.integers(1, 5), processes=st.integers(1, 4))
def test_processes_share_each_batch_and_packing_ahead_changes_nothing(bs, accumulate, processes):
    data = caption_data()
    drawn = [np.arange(start, min(start + bs, 23)) for start in range(0, 23, bs)]
    shares = []
    for rank in range(processes):
        plain = [contents(step) for step in packed_steps(data, drawn, accumulate, rank, processes, "cpu")]
        assert [contents(step) for step in packed_steps(data, drawn, accumulate, rank, processes, "mps")] == plain
        shares.append(plain)
    for number, captions in enumerate(drawn):
        expected = [token for caption in captions for token in data.tokens[caption].tolist()]
        found = [token for share in shares if share[number][1] for part in share[number][3] for token in part]
        assert sorted(found) == sorted(expected)
        assert sum(share[number][2] for share in shares) == len(expected)


def test_a_loop_that_stops_early_leaves_no_thread_behind(monkeypatch):
    import threading

    before = threading.active_count()
    steps = packed_steps(caption_data(), [np.arange(5)] * 50, 1, 0, 1, "mps")
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_is_raised_in_the_loop():
    steps = packed_steps(caption_data(), [np.arange(3), np.array([99])], 1, 0, 1, "mps")
    with pytest.raises(IndexError):
        list(steps)


def test_rows_are_of_one_length_on_a_gpu_only():
    data = caption_data()
    assert choose_row_slots(data, 10, "images", "cpu") is None
    assert choose_row_slots(data, 10, "images", "cuda") == 256


def test_the_length_that_wastes_least_is_taken():
    """Images of 150 slots: rows of 256 hold one, of 512 three, of 1,024 six, whose attention costs more."""
    lengths = np.full(60, 30)
    tokens = Tokens(np.ones(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    features = type("Features", (), {"clip_embedding": torch.zeros(12, 2)})
    data = CaptionData(features, tokens, np.arange(60) // 5, 5)
    assert choose_row_slots(data, 60, "images", "cuda") == 512


def test_train_learns_the_same_in_rows_of_one_length_packed_ahead(workdir, tiny_gpt2, monkeypatch):
    tiny.save_published_features(workdir / "train.pkl", [[caption] * 2 for caption in tiny.CAPTIONS])

    def weights(out, *more):
        words = f"--data train.pkl --out_dir {out} --gpt2_type {tiny_gpt2} --epochs 2 --bs 5 --lr 1e-3 --warmup_steps 2 --gpt2_dropout 0"
        assert train.main([*words.split(), "--device", "cpu", "--mixed_precision", "no", *more]) == 0
        return torch.load(workdir / out / "coco_prefix-001.pt", weights_only=True)

    plain = weights("plain")
    monkeypatch.setattr(batches, "PACKED_AHEAD", {"cpu": 3})
    chosen = weights("chosen")
    monkeypatch.setattr(batches, "ROW_SLOTS", (32,))
    short = weights("short")
    for name, tensor in plain.items():
        torch.testing.assert_close(chosen[name], tensor, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(short[name], tensor, rtol=0, atol=1e-5, msg=name)
