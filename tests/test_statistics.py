"""How sure a score is: bootstrap intervals and the paired test."""

import math

import numpy as np
import pytest
from test_metrics import score

from evaluation import statistics


def random_captions(seed, count=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdef"), size=rng.integers(3, 9))) for _ in range(count)]


REFERENCES = [list(pair) for pair in zip(random_captions(1), random_captions(2))]


def test_a_drawn_set_of_images_scores_as_bleu_of_that_set():
    candidates = random_captions(3)
    found = score(candidates, REFERENCES, ["bleu", "rouge"])
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(0, 60, 60)
        again = score([candidates[place] for place in drawn], [REFERENCES[place] for place in drawn], ["bleu", "rouge"])
        for name, metric in found.items():
            assert float(metric.combine(np.bincount(drawn, minlength=60) @ metric.sums)) == pytest.approx(again[name].value, abs=1e-9)


def test_intervals_repeat_with_their_seed_and_hold_the_score():
    found = score(random_captions(3), REFERENCES, ["bleu", "rouge", "cider"])
    intervals = statistics.bootstrap(found, draws=500, seed=1)
    assert intervals == statistics.bootstrap(found, draws=500, seed=1) != statistics.bootstrap(found, draws=500, seed=2)
    for name, (low, high) in intervals.items():
        assert low < found[name].value < high
    error = found["ROUGE-L"].per_image.std() / math.sqrt(60)
    low, high = intervals["ROUGE-L"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_paired_test_tells_a_better_system_from_an_equal_one():
    first = score(random_captions(3), REFERENCES, ["bleu", "rouge"])
    better = [texts[0] if place % 2 else caption for place, (caption, texts) in enumerate(zip(random_captions(3), REFERENCES))]
    found = statistics.compare(first, score(better, REFERENCES, ["bleu", "rouge"]), draws=400, seed=0)
    for one in found.values():
        assert one["difference"] > 0
        assert one["interval"][0] > 0
        assert one["p_value"] < 0.01
    same = statistics.compare(first, first, draws=100)
    assert all(one["difference"] == 0 and one["p_value"] == 1 for one in same.values())


def test_the_paired_test_is_rarely_sure_of_a_difference_that_is_not_there():
    sure = 0
    for seed in range(60):
        scores = np.random.default_rng(seed).random((2, 40))
        first, second = ({"x": statistics.mean_metric(one)} for one in scores)
        sure += statistics.compare(first, second, draws=200, seed=seed)["x"]["p_value"] < 0.05
    assert sure <= 9, "more than three times as often as 5 %"
