"""The scores of captions. pycocoevalcap computes them; here they are called, kept image by image, and checked for what they need.

N images. Candidates and references are given as words (evaluation.tokens.tokenize), one candidate an image. pycocoevalcap's CIDEr is
CIDEr-D (arXiv:1411.5726, section 6): there is one number, called CIDEr.
"""

from pathlib import Path

from common import UserError
from evaluation.statistics import Metric, mean_metric
from evaluation.tokens import NO_JAVA, java_is_here

CHOICES = ("bleu", "meteor", "rouge", "cider", "spice", "spider", "clipscore")
NEED_JAVA = ("meteor", "spice", "spider")
# METEOR 1.5 for English: the weight of precision, the penalty's exponent and size, content against function words, and what a match
# of each kind counts (exact, stem, synonym, paraphrase). Denkowski and Lavie 2014, and the program's own defaults.
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_WEIGHTS = (1.0, 0.6, 0.8, 0.6)


def usable_metrics(wanted, say):
    """Those of `wanted` that can run here; says what is left out where there is no Java.

    Raises UserError when SPICE is wanted without its models, and when nothing is left.
    """
    if not java_is_here():
        left = [name for name in wanted if name not in NEED_JAVA]
        if not left:
            raise UserError(f"{NO_JAVA}; nothing else was asked for.")
        say(NO_JAVA)
        return left
    if {"spice", "spider"} & set(wanted):
        check_spice()
    return list(wanted)


def check_spice():
    """Raise UserError when the models that SPICE parses with are not where pycocoevalcap looks for them."""
    import pycocoevalcap.spice as package
    from pycocoevalcap.spice.get_stanford_models import CORENLP, JAR, SPICELIB

    folder = Path(package.__file__).parent / SPICELIB
    missing = [name for name in (f"{JAR}.jar", f"{JAR}-models.jar") if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"SPICE lacks {' and '.join(missing)} in {folder}. Run `python -m pycocoevalcap.spice.get_stanford_models` with a network, or "
            f"put them there out of nlp.stanford.edu/software/{CORENLP}.zip; or leave spice and spider out of --metrics."
        )


def score_captions(candidates, references, metrics):
    """Score captions → dict of name → Metric: BLEU-1 … BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE, SPIDEr.

    candidates: list of str [N]; references: list of N lists of str; metrics: some of CHOICES (clipscore is not computed here).
    """
    from pycocoevalcap.rouge.rouge import Rouge

    results = dict(enumerate([one] for one in candidates))
    truth = dict(enumerate(references))
    scores = {}
    if "bleu" in metrics:
        scores |= _score_bleu(candidates, references)
    if "meteor" in metrics:
        scores["METEOR"] = _score_meteor(truth, results)
    if "rouge" in metrics:
        value, per_image = Rouge().compute_score(truth, results)
        scores["ROUGE-L"] = mean_metric(per_image, value)
    if {"cider", "spider"} & set(metrics):
        scores["CIDEr"] = score_cider(candidates, references)
    if {"spice", "spider"} & set(metrics):
        scores["SPICE"] = _score_spice(truth, results)
    if "spider" in metrics:
        scores["SPIDEr"] = _spider(scores)
    return scores


def score_cider(candidates, references):
    """CIDEr-D of captions given as words → Metric; document frequencies are those of these references."""
    from pycocoevalcap.cider.cider import Cider

    value, per_image = Cider().compute_score(dict(enumerate(references)), dict(enumerate([one] for one in candidates)))
    return mean_metric(per_image, value)


def score_subset(metrics, places, candidates, references):
    """The scores of some of the images, as if only they had been scored → dict of name → Metric.

    metrics: what score_captions gave for all of them; places: list of int, which images; candidates, references: of all.
    CIDEr is computed anew, for its document frequencies are those of the images scored; the others are sums over images.
    """
    scores = {}
    for name, metric in metrics.items():
        sums = metric.sums[places]
        scores[name] = Metric(float(metric.combine(sums.sum(0))), metric.per_image[places], sums, metric.combine)
    if "CIDEr" in scores:
        scores["CIDEr"] = score_cider([candidates[place] for place in places], [references[place] for place in places])
    if "SPIDEr" in scores:
        scores["SPIDEr"] = _spider(scores)
    return scores


def _spider(scores):
    """SPIDEr (arXiv:1612.00370): the mean of SPICE and CIDEr."""
    per_image = (scores["SPICE"].per_image + scores["CIDEr"].per_image) / 2
    return mean_metric(per_image, (scores["SPICE"].value + scores["CIDEr"].value) / 2)


def _score_bleu(candidates, references):
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for candidate, truth in zip(candidates, references):
        scorer += (candidate, truth)
    values, per_image = scorer.compute_score(option="closest")
    closest = [scorer._single_reflen(one["reflen"], "closest", one["testlen"]) for one in scorer.ctest]
    counts = [[one["testlen"], length, *one["guess"], *one["correct"]] for one, length in zip(scorer.ctest, closest)]
    sums = np.array(counts, np.float64)
    return {f"BLEU-{n}": Metric(values[n - 1], np.array(per_image[n - 1]), sums, _BleuOf(n)) for n in (1, 2, 3, 4)}


class _BleuOf:
    """Corpus BLEU-n (Papineni et al. 2002) from summed counts, with pycocoevalcap's two tiny numbers against division by zero.

    Sums: words of the candidates, words of the closest references, n-grams of the candidates (1 to 4), those matched (1 to 4).
    """

    def __init__(self, n):
        self.n = n

    def __call__(self, sums):
        import numpy as np

        given, matched = sums[..., 2 : 2 + self.n], sums[..., 6 : 6 + self.n]
        ratio = (sums[..., 0] + 1e-15) / (sums[..., 1] + 1e-9)
        precision = ((matched + 1e-15) / (given + 1e-9)).prod(-1) ** (1 / self.n)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _score_meteor(truth, results):
    """METEOR through its Java program, ended whatever happens; its counts for each image are kept."""
    import numpy as np
    from pycocoevalcap.meteor.meteor import Meteor

    counts = []

    class Recording(Meteor):
        def __del__(self):
            """Nothing: the process is ended below. The library's own waits for ever for a lock that an error has left held."""

        def _stat(self, hypothesis_str, reference_list):
            # "|||" divides the fields of a line: one within a reference would make two of it.
            line = super()._stat(hypothesis_str, [reference.replace("|||", "") for reference in reference_list])
            counts.append([float(number) for number in line.split()])
            return line

    scorer = Recording()
    try:
        value, per_image = scorer.compute_score(truth, results)
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR's Java program broke off ({error}); it wants 2 GB of memory. Leave meteor out of --metrics.") from error
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.communicate()
    sums = np.array(counts)
    whole = (sums[:, 21:23] == sums[:, 0:2]).all(-1) & (sums[:, 20] == 1)
    sums[whole, 20] = 0  # its own sum leaves out the chunk of a candidate that is a reference, word by word
    return Metric(value, np.array(per_image), sums, _combine_meteor)


def _combine_meteor(sums):
    """METEOR 1.5 from summed counts, as its own program combines them.

    Sums [..., 23]: words of candidate and reference, function words of each; for each of four kinds of match content words of
    candidate and reference, then function words of each; chunks; words matched in candidate and reference.
    """
    import numpy as np

    words, function_words, chunks, matched = sums[..., 0:2], sums[..., 2:4], sums[..., 20], sums[..., 21:23]
    kinds = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # kind, content or function, candidate or reference
    weighted = np.einsum("...kws,k,w->...s", kinds, METEOR_WEIGHTS, (METEOR_DELTA, 1 - METEOR_DELTA))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = weighted / (METEOR_DELTA * (words - function_words) + (1 - METEOR_DELTA) * function_words)
        precision, recall = share[..., 0], share[..., 1]
        mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
        score = mean * (1 - METEOR_GAMMA * (chunks / (matched.sum(-1) / 2)) ** METEOR_BETA)
    return np.where(np.isfinite(score), score, 0.0)


def _score_spice(truth, results):
    import subprocess

    import numpy as np
    from pycocoevalcap.spice.spice import Spice

    check_spice()
    try:
        value, per_image = Spice().compute_score(truth, results)
    except (subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"SPICE's Java program failed ({error}); it is known to run on Java 8. Leave spice and spider out.") from error
    return mean_metric(np.array([one["All"]["f"] for one in per_image]), value)
