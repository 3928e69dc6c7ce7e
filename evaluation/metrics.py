"""The scores of captions: METRICS has one entry for each metric. To add one, write a function and add its entry.

pycocoevalcap computes most of them. Here they are called, kept per image, and checked for what they need. Its CIDEr is CIDEr-D
(arXiv:1411.5726, section 6). N images.
"""

import contextlib
import dataclasses
import subprocess
import threading
import unittest.mock
from pathlib import Path

from common import UserError
from evaluation.clipscore import clip_scores
from evaluation.statistics import Metric, mean_metric
from evaluation.tokens import PLAIN_WORDS, java_environment, java_is_here, java_reason

# METEOR 1.5 for English (Denkowski and Lavie 2014, the defaults of their program): weight of precision, exponent and size of the penalty,
# weight of content words, and the weight of an exact, stem, synonym and paraphrase match.
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
JAVA_SECONDS = 5  # to end by itself once its input ends


@dataclasses.dataclass
class Captions:
    """What metrics are computed from, one candidate per image, as words separated by single spaces (evaluation.tokens.tokenize)."""

    words: list  # N str
    references: list  # N lists of str
    embed: object = None  # () -> arguments of clip_scores; only metrics with needs_embeddings call it

    def select(self, places):
        """Keep the images at `places`, a list of int; without embeddings."""
        return Captions([self.words[place] for place in places], [self.references[place] for place in places])

    def as_dicts(self):
        """Give references and candidates in the form that pycocoevalcap takes."""
        return dict(enumerate(self.references)), dict(enumerate([one] for one in self.words))


@dataclasses.dataclass(frozen=True)
class MetricEntry:
    """One choice of --metrics."""

    help: str
    scores: tuple  # names of the scores it gives
    compute: object  # (Captions, scores computed so far) -> dict of score name to Metric
    default: bool = False  # computed unless --metrics says otherwise
    needs_java: bool = False
    needs_embeddings: bool = False
    parts: tuple = ()  # other metrics that it is made of, computed and shown with it
    over_corpus: bool = False  # an image's score depends on the other images
    histogram: bool = False  # cheap enough to score every caption of an image
    check: object = None  # () -> None; raises UserError where its files are missing


def usable_metrics(wanted, say):
    """Choose the metrics that can run on this machine.

    Args:
        wanted: keys of METRICS.
        say: function that takes one line about what is left out.

    Returns:
        List of keys of METRICS.

    Raises:
        UserError: a metric lacks its files, or all of them need Java and there is none.
    """
    names = wanted
    if not java_is_here():
        names = [name for name in wanted if not METRICS[name].needs_java]
        if not names:
            raise UserError(f"{no_java()}; every metric that was asked for needs it.")
        say(no_java())
    for name in names:
        if METRICS[name].check:
            METRICS[name].check()
    return list(names)


def no_java():
    """Explain what is missing without Java, and how to install it."""
    missing = [score for entry in METRICS.values() if entry.needs_java for score in entry.scores]
    return f"no Java here: {', '.join(missing)} are left out, and {PLAIN_WORDS}"


def score_captions(captions, metrics):
    """Compute metrics.

    Args:
        captions: Captions.
        metrics: keys of METRICS.

    Returns:
        dict of score name to Metric, in the order of METRICS.
    """
    wanted = {part for name in metrics for part in (name, *METRICS[name].parts)}
    scores = {}
    for name, entry in METRICS.items():
        if name in wanted:
            scores |= entry.compute(captions, scores)
    return scores


def score_subset(scores, captions, places):
    """Compute the scores of some images as if only they had been scored.

    Args:
        scores: what score_captions gave for all images.
        captions: Captions of all images.
        places: list of int, the images wanted.

    Returns:
        dict of score name to Metric.
    """
    subset, captions = {}, captions.select(places)
    for entry in METRICS.values():
        if entry.scores[0] not in scores:
            continue
        if entry.over_corpus:
            subset |= entry.compute(captions, subset)
            continue
        for name in entry.scores:
            metric, sums = scores[name], scores[name].sums[places]
            subset[name] = Metric(float(metric.combine(sums.sum(0))), metric.per_image[places], sums, metric.combine)
    return subset


def score_cider(candidates, references):
    """Compute CIDEr-D of captions given as words; document frequencies are those of these references.

    For a single image it is 0: every word of its references occurs in all images, and weighs nothing.

    Args:
        candidates: list of N str.
        references: list of N lists of str.

    Returns:
        Metric.
    """
    from pycocoevalcap.cider.cider import Cider

    if not any(map(any, references)):  # not a word in them: the library fails
        return mean_metric([0.0] * len(candidates))
    value, per_image = Cider().compute_score(*Captions(candidates, references).as_dicts())
    return mean_metric(per_image, value)


def _cider(captions, _):
    return {"CIDEr": score_cider(captions.words, captions.references)}


def _rouge(captions, _):
    from pycocoevalcap.rouge.rouge import Rouge

    value, per_image = Rouge().compute_score(*captions.as_dicts())
    return {"ROUGE-L": mean_metric(per_image, value)}


def _spider(captions, scores):
    """SPIDEr (arXiv:1612.00370): the mean of SPICE and CIDEr."""
    per_image = (scores["SPICE"].per_image + scores["CIDEr"].per_image) / 2
    return {"SPIDEr": mean_metric(per_image, (scores["SPICE"].value + scores["CIDEr"].value) / 2)}


def _clipscore(captions, _):
    return clip_scores(*captions.embed())


def _bleu(captions, _):
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for candidate, references in zip(captions.words, captions.references):
        scorer += (candidate, references)
    values, per_image = scorer.compute_score(option="closest")
    closest = [scorer._single_reflen(one["reflen"], "closest", one["testlen"]) for one in scorer.ctest]
    counts = [[one["testlen"], length, *one["guess"], *one["correct"]] for one, length in zip(scorer.ctest, closest)]
    sums = np.array(counts, np.float64)
    return {f"BLEU-{n}": Metric(values[n - 1], np.array(per_image[n - 1]), sums, _BleuOf(n)) for n in (1, 2, 3, 4)}


class _BleuOf:
    """Corpus BLEU-n (Papineni et al. 2002) from summed counts, with pycocoevalcap's two tiny numbers against division by zero.

    Sums: words of the candidates, words of the closest references, n-grams of the candidates (1 to 4), matched n-grams (1 to 4).
    """

    def __init__(self, n):
        self.n = n

    def __call__(self, sums):
        import numpy as np

        given, matched = sums[..., 2 : 2 + self.n], sums[..., 6 : 6 + self.n]
        ratio = (sums[..., 0] + 1e-15) / (sums[..., 1] + 1e-9)
        precision = ((matched + 1e-15) / (given + 1e-9)).prod(-1) ** (1 / self.n)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _meteor(captions, _):
    """Compute METEOR with its Java program, which is always ended; its counts for each image are kept."""
    import numpy as np
    from pycocoevalcap.meteor import meteor

    counts, answers = [], []

    class Recording(meteor.Meteor):
        def __init__(self):
            """Start Java as the library does, but with an English locale."""
            command = ["java", "-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self.meteor_p = subprocess.Popen(command, cwd=Path(meteor.__file__).parent, env=java_environment(), **pipes)
            self.lock = threading.Lock()

        def __del__(self):
            """Do nothing: the process is ended below. The library waits forever for a lock that an error left locked."""

        def _stat(self, hypothesis_str, reference_list):
            # "|||" separates the fields of a line; a reference that holds it would become two.
            line = super()._stat(hypothesis_str, [reference.replace("|||", "") for reference in reference_list])
            answers.append(line)
            counts.append([float(number) for number in line.split()])
            return line

    scorer = Recording()
    with scorer.meteor_p as process:
        try:
            value, per_image = scorer.compute_score(*captions.as_dicts())
        except (OSError, ValueError) as error:
            unread = answers[len(counts) :]  # a line that is no counts is a message
            reason = java_reason("\n".join([*unread, *_end(process)]), error)
            raise UserError(f"METEOR's Java program failed: {reason}. Try `java -version`, or leave meteor out of --metrics.") from error
        finally:
            process.kill()
    sums = np.array(counts)
    whole = (sums[:, 21:23] == sums[:, 0:2]).all(-1) & (sums[:, 20] == 1)
    sums[whole, 20] = 0  # its program's own sum leaves out the chunk of a candidate that equals a reference
    return {"METEOR": Metric(value, np.array(per_image), sums, _combine_meteor)}


def _end(process):
    """Close the input of a Java program, which ends it. Returns what it wrote to stdout and stderr."""
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(JAVA_SECONDS)
    process.kill()
    return [stream.read().decode("utf-8", "replace") for stream in (process.stdout, process.stderr)]


def _combine_meteor(sums):
    """Compute METEOR 1.5 from summed counts, as its program does.

    Sums [..., 23]: words of candidate and reference; function words of each; for each of four kinds of match the content words of
    candidate and reference, then the function words of each; chunks; matched words of candidate and reference.
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


def check_spice():
    """Raise UserError when the models that SPICE parses with are not where pycocoevalcap looks for them."""
    import pycocoevalcap.spice as package
    from pycocoevalcap.spice.get_stanford_models import CORENLP, JAR, SPICELIB

    folder = Path(package.__file__).parent / SPICELIB
    missing = [name for name in (f"{JAR}.jar", f"{JAR}-models.jar") if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"SPICE lacks {' and '.join(missing)} in {folder}. Run `python -m pycocoevalcap.spice.get_stanford_models` with a network, or "
            f"unpack them there from nlp.stanford.edu/software/{CORENLP}.zip; or leave spice and spider out of --metrics."
        )


def _spice(captions, _):
    import numpy as np
    from pycocoevalcap.spice.spice import Spice

    try:
        with unittest.mock.patch.dict("os.environ", java_environment()):  # which Java inherits; the library takes no other
            value, per_image = Spice().compute_score(*captions.as_dicts())
    except (subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"SPICE's Java program failed ({error}); it is known to run on Java 8. Leave spice and spider out.") from error
    return {"SPICE": mean_metric(np.array([one["All"]["f"] for one in per_image]), value)}


METRICS = {
    "bleu": MetricEntry("n-gram precision", tuple(f"BLEU-{n}" for n in (1, 2, 3, 4)), _bleu, default=True, histogram=True),
    "meteor": MetricEntry("words, stems and synonyms matched", ("METEOR",), _meteor, default=True, needs_java=True),
    "rouge": MetricEntry("longest common subsequence", ("ROUGE-L",), _rouge, default=True, histogram=True),
    "cider": MetricEntry("n-grams weighted by rarity", ("CIDEr",), _cider, default=True, over_corpus=True, histogram=True),
    "spice": MetricEntry("objects, attributes and relations matched", ("SPICE",), _spice, needs_java=True, check=check_spice),
    "spider": MetricEntry("mean of SPICE and CIDEr", ("SPIDEr",), _spider, needs_java=True, parts=("cider", "spice"), over_corpus=True,
                          check=check_spice),
    "clipscore": MetricEntry("cosine of image and caption", ("CLIPScore", "RefCLIPScore"), _clipscore, needs_embeddings=True),
}  # fmt: skip
# Choices of --histogram: name of the choice -> (metric, score).
HISTOGRAMS = {
    name if len(entry.scores) == 1 else f"{name}{n}": (name, score)
    for name, entry in METRICS.items()
    if entry.histogram
    for n, score in enumerate(entry.scores, start=1)
}
