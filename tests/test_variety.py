"""CLIPScore worked out by hand, and what a set of captions is like."""

import numpy as np
import pytest

from evaluation.clipscore import clip_scores
from evaluation.variety import describe_captions, repeats_ngram


def test_clipscore_is_worked_out_as_its_paper_says():
    images = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    candidates = np.array([[0.6, 0.8], [-0.6, 0.8], [0.0, 1.0]])
    found = clip_scores(images, candidates, [np.array([[1.0, 0.0], [0.8, 0.6]]), np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])])
    assert found["CLIPScore"].per_image.tolist() == pytest.approx([1.5, 0, 0])
    # 0.6 · 0.8 + 0.8 · 0.6 = 0.96 is the closer reference; the harmonic mean of 1.5 and 0.96.
    assert found["RefCLIPScore"].per_image.tolist() == pytest.approx([2 * 1.5 * 0.96 / (1.5 + 0.96), 0, 0])


def test_variety_counts_what_it_says():
    found = describe_captions(["a b a b", "a b a b", "c d", ""], train_captions=["c d"], ended=[True, False, True, True])
    assert found["distinct"] == 3
    assert found["distinct_share"] == 0.75
    assert found["vocabulary"] == 4
    assert found["mean_length"] == 2.5
    assert found["repeated_2grams"] == 0.5
    assert found["repeated_3grams"] == 0
    assert found["empty"] == 1
    assert found["novel_share"] == 0.75
    assert found["ended_share"] == 0.75
    assert "novel_share" not in describe_captions(["a"])
    assert "ended_share" not in describe_captions(["a"])
    assert repeats_ngram("a a a".split(), 2)
    assert not repeats_ngram("a b c".split(), 1)
    assert not repeats_ngram([], 2)
