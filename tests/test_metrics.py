"""Scores: worked out by hand, equal to pycocoevalcap's own classes on real captions, and what is added to them."""

import dataclasses
import json
import math
import os
import re
import subprocess

import pytest

import evaluate
from common import UserError
from evaluation import metrics, statistics, tokens

needs_java = pytest.mark.skipif(not tokens.java_is_here(), reason="no Java here")
ODD = [
    "", "   ", ".", "...", "|||", "a ||| b", "SCORE ||| a ||| b", "two\nlines of a caption", "a tab\tand\u00a0a hard space",
    "“quotes” ‘and’ ``more''",
    "Café ☃ 日本 😀 in the snow", "brackets (round) [square] {curly}", "a/b & c @ d # e", "he's got 3.5 lbs. at 5 p.m.",
    "ALL CAPITALS", "nul\x00byte",
    "a man riding a wave p.m.",
]  # fmt: skip
METRICS = ("bleu", "meteor", "rouge", "cider")
WITHOUT_METEOR = ("bleu", "rouge", "cider")  # whose Java takes many seconds


def score(candidates, references, names):
    return metrics.score_captions(metrics.Captions(candidates, references), names)


def bleu4(candidates, references):
    return score(candidates, references, ["bleu"])["BLEU-4"].value


def test_bleu_by_hand_one_word_wrong():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 fours match; as long as its reference: no penalty.
    assert bleu4(["a b c d x"], [["a b c d e"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), abs=1e-6)


def test_bleu_by_hand_too_short():
    # Everything matches; 4 words against 6: the penalty is exp(1 - 6 / 4).
    assert bleu4(["a b c d"], [["a b c d e f"]]) == pytest.approx(math.exp(-0.5), abs=1e-6)


def test_bleu_by_hand_two_images_and_clipped_counts():
    # Image 1: "a" counts 3 times at most (second reference), "b" once: 4 of 5. Pairs: "a a" twice of 3, "a b" once: 3 of 4. Triples:
    # "a a a" once of 2, "a a b" once: 2 of 3. Fours: "a a a b" alone: 1 of 2. Of the lengths 4 and 6, both one off, the shorter counts.
    # Image 2: 4 of 4, 3 of 3, 2 of 2, 1 of 1, length 4 against 6. Together 9 words against 10: exp(1 - 10 / 9).
    precisions = (4 + 4) / (5 + 4) * (3 + 3) / (4 + 3) * (2 + 2) / (3 + 2) * (1 + 1) / (2 + 1)
    found = bleu4(["a a a a b", "a b c d"], [["a a b c", "a a a b d e"], ["a b c d e f"]])
    assert found == pytest.approx(precisions ** (1 / 4) * math.exp(-1 / 9), abs=1e-6)


def test_cider_by_hand_captions_that_are_their_references():
    # Every n-gram occurs in one image of two: weight log 2. All four cosines are 1, their mean is 1, times 10.
    found = metrics.score_cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert found.per_image.tolist() == pytest.approx([10, 10])
    assert found.value == pytest.approx(10)


def test_cider_by_hand_half_the_words_and_a_second_reference():
    # Image 1, first reference: words (a, b) and (a, c), weight L each: cosine L² / (√2 L · √2 L) = 1/2; no pair matches: mean 1/8.
    # Second reference: nothing matches: 0. Mean of both times 10: 0.625. Image 2: the one word matches, there are no pairs: 10 / 4.
    found = metrics.score_cider(["a b", "e"], [["a c", "f g"], ["e"]])
    assert found.per_image.tolist() == pytest.approx([0.625, 2.5])
    assert found.value == pytest.approx(1.5625)


def test_cider_by_hand_too_short_and_a_word_of_every_image():
    # "the" stands in both images: weight log(2 / 2) = 0. Words: "a b" within "a b c d": 2 L² / (√2 L · 2 L) = 1/√2. Pairs, all of one
    # image: (the a, a b) within (the a, a b, b c, c d): 2 / (√2 · 2) = 1/√2. Triples: 1 of (the a b, a b c, b c d): 1/√3. No fours.
    # Lengths are counted in pairs: 2 against 4, so exp(-(2²) / (2 · 6²)).
    found = metrics.score_cider(["the a b", "the e"], [["the a b c d"], ["the e"]])
    expected = 10 * (1 / math.sqrt(2) + 1 / math.sqrt(2) + 1 / math.sqrt(3)) / 4 * math.exp(-4 / 72)
    assert found.per_image[0] == pytest.approx(expected)


def test_predictions_equal_to_a_reference_score_as_the_metrics_define():
    references = [["a man rides a wave", "someone surfs"], ["two dogs play in a park"], ["a cat"]]
    found = score([several[0] for several in references], references, ["bleu", "rouge"])
    assert found["ROUGE-L"].value == 1
    assert all(found[f"BLEU-{n}"].value == pytest.approx(1, abs=1e-6) for n in (1, 2, 3, 4))
    nothing = score(["x y z"] * 3, references, ["bleu", "rouge", "cider"])
    assert all(metric.value == pytest.approx(0, abs=1e-3) for metric in nothing.values())


def theirs(candidates, references, meteor=None):
    """What pycocoevalcap's own tokeniser and scorers give: dict of name → (score, score of each image); METEOR's if a scorer is given."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = PTBTokenizer().tokenize({place: [{"caption": text} for text in texts] for place, texts in enumerate(references)})
    results = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(candidates)})
    scores, per_image = Bleu(4).compute_score(truth, results, verbose=0)
    found = {f"BLEU-{n}": (scores[n - 1], per_image[n - 1]) for n in (1, 2, 3, 4)}
    scorers = {"METEOR": meteor, "ROUGE-L": Rouge(), "CIDEr": Cider()}
    for name, scorer in scorers.items() if meteor else list(scorers.items())[1:]:
        found[name] = scorer.compute_score(truth, results)
    return found


def assert_equal_to_theirs(found, expected):
    assert list(found) == list(expected)
    for name, (value, per_image) in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-6), name
        assert found[name].per_image.tolist() == pytest.approx(list(per_image), abs=1e-6), name
        assert float(found[name].combine(found[name].sums.sum(0))) == pytest.approx(value, abs=1e-6), name


def ours(candidates, references):
    words = iter(tokens.tokenize([text for several in references for text in several]))
    return tokens.tokenize(candidates), [[next(words) for _ in several] for several in references]


def coco(shared_data, count=None):
    """The first caption of each image as candidate, the others as references."""
    captions = {}
    for row in json.loads((shared_data / "coco_mini/captions_only_val2017.json").read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    chosen = list(captions.values())[:count]
    return [texts[0] for texts in chosen], [texts[1:] for texts in chosen]


@pytest.fixture(scope="module")
def meteor():
    """pycocoevalcap's own METEOR, its Java started once."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    yield scorer
    scorer.meteor_p.kill()


@pytest.fixture(scope="module", params=[WITHOUT_METEOR, pytest.param(METRICS, marks=pytest.mark.slow)], ids=["quick", "with METEOR"])
def scored(request, shared_data):
    """120 real images, odd captions among candidates and references → candidates, references, their METEOR, words of both, our scores."""
    candidates, references = coco(shared_data, 120)
    candidates[5 : 5 + len(ODD)] = ODD
    for place, text in enumerate(ODD, start=40):
        references[place] = [*references[place], text]
    candidates[60] = references[60][0]
    words, truth = ours(candidates, references)
    meteor = request.getfixturevalue("meteor") if "meteor" in request.param else None
    return candidates, references, meteor, words, truth, score(words, truth, request.param)


@needs_java
def test_every_metric_equals_pycocoevalcaps_on_real_and_odd_captions(scored):
    candidates, references, meteor, words, truth, found = scored
    assert "" in words
    assert any("|" in one for one in words)
    assert_equal_to_theirs(found, theirs(candidates, references, meteor))


@needs_java
def test_a_subset_scores_as_if_it_stood_alone(scored):
    candidates, references, meteor, words, truth, found = scored
    for places in ([*range(0, 120, 3)], [7], [3, 2, 60, 61]):
        expected = theirs([candidates[place] for place in places], [references[place] for place in places], meteor)
        subset = metrics.score_subset(found, metrics.Captions(words, truth), places)
        for name, (value, _) in expected.items():
            assert subset[name].value == pytest.approx(value, abs=1e-6), (name, places)


@pytest.mark.slow
@needs_java
def test_every_metric_equals_pycocoevalcaps_on_all_of_val2017(shared_data, meteor):
    candidates, references = coco(shared_data)
    assert_equal_to_theirs(score(*ours(candidates, references), METRICS), theirs(candidates, references, meteor))


@needs_java
def test_a_line_end_within_a_caption_shifts_no_other():
    ends = ["\r", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]
    found = tokens.tokenize([f"one{end}two" for end in ends] + ["three", "\ud800 four", ""])
    assert found == ["one two"] * len(ends) + ["three", "four", ""]
    assert tokens.tokenize([]) == []


@needs_java
def test_meteors_java_ends_with_the_scoring_even_when_it_breaks(monkeypatch):
    started = []
    real = subprocess.Popen

    def start(*words, **options):
        started.append(real(*words, **options))
        return started[-1]

    monkeypatch.setattr("pycocoevalcap.meteor.meteor.subprocess.Popen", start)
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.METEOR_JAR", "no such file.jar")
    with pytest.raises(UserError, match="METEOR.*Unable to access jarfile"):
        score(["a cat"], [["a dog"]], ["meteor"])
    assert len(started) == 1
    assert started[0].poll() is not None


def test_java_counts_in_english_whatever_the_users_locale(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xss4m -Duser.language=de")
    monkeypatch.delenv("_JAVA_OPTIONS", raising=False)
    made = tokens.java_environment()
    assert made["JAVA_TOOL_OPTIONS"].startswith("-Xss4m -Duser.language=de -Duser.language=en -Duser.country=US")
    assert made["_JAVA_OPTIONS"].startswith("-Duser.language=en")
    assert "_JAVA_OPTIONS" not in os.environ


@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("setting", ["JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"])
def test_meteor_is_the_same_under_a_locale_with_a_decimal_comma(monkeypatch, setting):
    pairs = ["a cat sits on a mat", "two dogs"], [["a cat sat on the mat"], ["three dogs run"]]
    expected = score(*pairs, ["meteor"])["METEOR"].per_image.tolist()
    monkeypatch.setenv(setting, "-Duser.language=de -Duser.country=DE")
    assert score(*pairs, ["meteor"])["METEOR"].per_image.tolist() == expected


@needs_java
def test_a_failing_java_is_quoted(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xms900000G")
    with pytest.raises(UserError, match="METEOR.*[Hh]eap"):
        score(["a cat"], [["a dog"]], ["meteor"])
    with pytest.raises(UserError, match="tokenizer.*[Hh]eap"):
        tokens.tokenize(["a cat"])


def test_without_java_words_are_told_apart_plainly_and_meteor_is_left_out(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    said = []
    assert metrics.usable_metrics(["bleu", "meteor", "cider"], said.append) == ["bleu", "cider"]
    assert len(said) == 1
    assert re.search("apt-get install .*conda install", said[0])
    assert tokens.tokenize(["A man's T-shirt, (red) & 3.5 m.", ""]) == ["a man's t-shirt red & 3.5 m", ""]
    with pytest.raises(UserError, match="no Java"):
        metrics.usable_metrics(["meteor"], said.append)


def test_spice_without_its_models_is_the_users_error(monkeypatch):
    monkeypatch.setattr("pycocoevalcap.spice.get_stanford_models.JAR", "no-such-models")
    for name in ("spice", "spider"):
        with pytest.raises(UserError, match="no-such-models.*get_stanford_models"):
            metrics.check_spice()
    monkeypatch.setattr(metrics, "java_is_here", lambda: True)
    with pytest.raises(UserError, match="SPICE"):
        metrics.usable_metrics(["bleu", "spider"], print)


def test_spider_is_the_mean_of_spice_and_cider(monkeypatch):
    """SPICE's models cannot be had here: its call is replaced, what is made of it is not."""
    spice = dataclasses.replace(metrics.METRICS["spice"], compute=lambda *_: {"SPICE": statistics.mean_metric([0.25, 0.75])})
    monkeypatch.setitem(metrics.METRICS, "spice", spice)
    captions = metrics.Captions(["a b c d", "e f g h"], [["a b c d"], ["e f x h"]])
    found = metrics.score_captions(captions, ["spider"])
    assert list(found) == ["CIDEr", "SPICE", "SPIDEr"]
    assert found["SPIDEr"].value == pytest.approx((0.5 + found["CIDEr"].value) / 2)
    cider = found["CIDEr"].per_image
    assert found["SPIDEr"].per_image.tolist() == pytest.approx([(0.25 + cider[0]) / 2, (0.75 + cider[1]) / 2])
    alone = metrics.score_subset(found, captions, [1])
    assert alone["CIDEr"].value == 0
    assert alone["SPICE"].value == 0.75
    assert alone["SPIDEr"].value == 0.375


def test_a_metric_is_one_entry_that_options_and_scores_follow(monkeypatch):
    """A new entry is a choice of --metrics, is in its help, and is scored; what the house knows of it stands in the entry alone."""

    def length(captions, _):
        return {"Length": statistics.mean_metric([len(one.split()) for one in captions.words])}

    monkeypatch.setitem(metrics.METRICS, "length", metrics.MetricEntry("words of a caption", ("Length",), length))
    options = evaluate.build_parser().parse_args(["--metrics", "length"])
    assert options.metrics == ["length"]
    assert "length: words of a caption" in " ".join(evaluate.build_parser().format_help().split())
    assert score(["a b", "a b c d"], [["a"], ["b"]], options.metrics)["Length"].value == 3
    assert metrics.usable_metrics(["length"], print) == ["length"]


def test_choices_of_the_histogram_are_those_published():
    assert list(metrics.HISTOGRAMS) == ["bleu1", "bleu2", "bleu3", "bleu4", "rouge", "cider"]
    assert metrics.HISTOGRAMS["bleu4"] == ("bleu", "BLEU-4")
    assert metrics.HISTOGRAMS["rouge"] == ("rouge", "ROUGE-L")
