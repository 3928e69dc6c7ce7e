"""Scores of one set of captions, or of several of the same images, from tokenising to intervals. N images."""

import dataclasses

from common import UserError
from evaluation.metrics import score_captions, score_cider, score_subset
from evaluation.references import DOMAINS, list_some
from evaluation.statistics import bootstrap
from evaluation.tokens import PLAIN, PTB, java_is_here, tokenize
from evaluation.variety import describe_captions

# What --histogram may draw: scores that a caption has by itself, at no cost worth naming.
HISTOGRAMS = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rouge": "ROUGE-L", "cider": "CIDEr"}


@dataclasses.dataclass
class Truth:
    """The references of the images that are scored, in their order."""

    keys: list  # N keys
    texts: list  # N lists of str, as written
    words: list  # the same, tokenised
    domains: list  # N domain names or None
    tokeniser: str

    def describe(self):
        """What a score hangs on → dict of plain values: images, references_per_image (fewest, most, mean), tokeniser."""
        counts = [len(several) for several in self.texts]
        return {
            "images": len(counts),
            "references_per_image": {"fewest": min(counts), "most": max(counts), "mean": sum(counts) / len(counts)},
            "tokeniser": self.tokeniser,
        }


@dataclasses.dataclass
class Scored:
    """One set of captions with its scores."""

    words: list  # N captions, tokenised
    metrics: dict  # name → evaluation.statistics.Metric
    intervals: dict  # name → (low, high), or empty
    captions: dict  # what describe_captions says
    domains: dict  # domain → dict of name → score, and images; empty but for nocaps


def prepare_truth(keys, references):
    """Tokenise the references of the images to be scored → Truth."""
    texts = [references.captions[key] for key in keys]
    words = iter(tokenize([text for several in texts for text in several]))
    words = [[next(words) for _ in several] for several in texts]
    return Truth(keys, texts, words, [references.domains.get(key) for key in keys], PTB if java_is_here() else PLAIN)


def check_same_images(systems, sources):
    """Raise UserError, with some ids, when two sets of predictions are not of the same images."""
    for other, source in zip(systems[1:], sources[1:]):
        differing = [*(key for key in systems[0] if key not in other), *(key for key in other if key not in systems[0])]
        if differing:
            found = f"{sources[0]} and {source} differ in {len(differing):,} images: {list_some(differing)}"
            raise UserError(f"{found}. Compare captions of the same images.")


def score_system(predictions, truth, metrics, options, more_metrics=None, train_words=None):
    """Score a set of captions → Scored.

    predictions: dict of key → Prediction; truth: Truth; metrics: names as evaluation.metrics.CHOICES; options: bootstrap and seed;
    more_metrics: list of candidates' texts → dict of name → Metric (CLIPScore), or None; train_words: training captions, or None.
    """
    best = [predictions[key].captions[0] for key in truth.keys]
    words = tokenize(best)
    scores = score_captions(words, truth.words, metrics)
    if more_metrics is not None:
        scores |= more_metrics(best)
    intervals = bootstrap(scores, options.bootstrap, options.seed) if options.bootstrap else {}
    ended = [predictions[key].ended for key in truth.keys]
    summary = describe_captions(words, train_words, [one[0] for one in ended] if all(ended) else None)
    domains = {}
    for domain in DOMAINS.values():
        places = [place for place, name in enumerate(truth.domains) if name == domain]
        if places:
            of_domain = score_subset(scores, places, words, truth.words)
            domains[domain] = {"images": len(places), **{name: metric.value for name, metric in of_domain.items()}}
    if domains:
        domains["overall"] = {"images": len(words), **{name: metric.value for name, metric in scores.items()}}
    return Scored(words, scores, intervals, summary, domains)


def best_of_captions(predictions, truth, kind):
    """The best score among each image's captions, looked up in the references → list of N floats.

    predictions: dict of key → Prediction; kind: a key of HISTOGRAMS.
    """
    import numpy as np

    several = [predictions[key].captions for key in truth.keys]
    places = [place for place, captions in enumerate(several) for _ in captions]
    words = tokenize([caption for captions in several for caption in captions])
    if kind == "cider":
        # Document frequencies count each image once, so every rank is scored by itself, with no words where an image has no such caption.
        of_image = [[] for _ in several]
        for place, caption in zip(places, words):
            of_image[place].append(caption)
        ranks = [[one[rank] if rank < len(one) else "" for one in of_image] for rank in range(max(map(len, several)))]
        return np.max([score_cider(rank, truth.words).per_image for rank in ranks], axis=0).tolist()
    best = [0.0] * len(several)
    scores = score_captions(words, [truth.words[place] for place in places], [kind.rstrip("1234")])[HISTOGRAMS[kind]].per_image
    for place, score in zip(places, scores.tolist()):
        best[place] = max(best[place], score)
    return best
