"""Scores of one set of captions, or of two of the same images, from words to intervals. N images."""

import dataclasses
import math

from common import UserError
from evaluation.metrics import HISTOGRAMS, METRICS, Captions, score_captions, score_subset
from evaluation.references import DOMAINS, list_some
from evaluation.statistics import bootstrap
from evaluation.tokens import tokenize, tokenizer_name
from evaluation.variety import describe_captions


@dataclasses.dataclass
class Truth:
    """The references of the images that are scored, in their order."""

    keys: list  # N keys
    texts: list  # N lists of str, as written
    words: list  # the same, tokenized
    domains: list  # N domain names or None
    tokeniser: str  # its name

    def describe(self):
        """Return what a score depends on: a dict with images, references_per_image (fewest, most, mean) and tokeniser."""
        counts = [len(several) for several in self.texts]
        return {
            "images": len(counts),
            "references_per_image": {"fewest": min(counts), "most": max(counts), "mean": sum(counts) / len(counts)},
            "tokeniser": self.tokeniser,
        }


@dataclasses.dataclass
class Scored:
    """One set of captions with its scores."""

    source: str  # the file of the captions, or the checkpoint that wrote them
    predictions: dict  # key -> evaluation.references.Prediction
    metrics: dict  # score name -> evaluation.statistics.Metric
    intervals: dict  # score name -> (low, high), or empty
    variety: dict  # what describe_captions returns
    domains: dict  # domain -> dict of score name to score, and images; empty but for nocaps
    best: list | None  # the best score among each image's captions, where --histogram asked for one


def prepare_truth(keys, references):
    """Tokenize the references of the images to be scored.

    Args:
        keys: list of N keys.
        references: evaluation.references.References.

    Returns:
        Truth.

    Raises:
        UserError: not one reference holds a word.
    """
    texts = [references.captions[key] for key in keys]
    words = iter(tokenize([text for several in texts for text in several]))
    words = [[next(words) for _ in several] for several in texts]
    if not any(map(any, words)):
        raise UserError(f"none of the references of {len(keys):,} images holds a word: nothing to score against. Give others.")
    return Truth(keys, texts, words, [references.domains.get(key) for key in keys], tokenizer_name())


def check_same_images(systems, sources):
    """Raise UserError, naming some ids, when two sets of predictions are not of the same images."""
    for other, source in zip(systems[1:], sources[1:]):
        differing = [*(key for key in systems[0] if key not in other), *(key for key in other if key not in systems[0])]
        if differing:
            found = f"{sources[0]} and {source} differ in {len(differing):,} images: {list_some(differing)}"
            raise UserError(f"{found}. Compare captions of the same images.")


def score_system(source, predictions, truth, metrics, embed=None, train_words=None, histogram=None, draws=1000, seed=0):
    """Score a set of captions.

    Args:
        source: what to call them.
        predictions: dict of key to Prediction.
        truth: Truth.
        metrics: keys of METRICS.
        embed: list of N captions -> arguments of evaluation.clipscore.clip_scores; None where no metric needs embeddings.
        train_words: tokenized captions of the training set, or None.
        histogram: a key of HISTOGRAMS, or None.
        draws: draws of the bootstrap; 0 for no intervals.
        seed: seed of the draws.

    Returns:
        Scored.
    """
    best = [predictions[key].captions[0] for key in truth.keys]
    captions = Captions(tokenize(best), truth.words, lambda: embed(best))
    scores = score_captions(captions, metrics)
    intervals = bootstrap(scores, draws, seed) if draws else {}
    ended = [predictions[key].ended for key in truth.keys]
    variety = describe_captions(captions.words, train_words, [one[0] for one in ended] if all(ended) else None)
    domains = _score_domains(scores, captions, truth)
    of_best = best_of_captions(predictions, truth, histogram) if histogram else None
    return Scored(source, predictions, scores, intervals, variety, domains, of_best)


def _score_domains(scores, captions, truth):
    """Score each of nocaps' domains, and all together; an empty dict for other data sets."""
    domains = {}
    for domain in DOMAINS.values():
        places = [place for place, name in enumerate(truth.domains) if name == domain]
        if places:
            of_domain = score_subset(scores, captions, places)
            domains[domain] = {"images": len(places), **{name: metric.value for name, metric in of_domain.items()}}
    if domains:
        domains["overall"] = {"images": len(truth.keys), **{name: metric.value for name, metric in scores.items()}}
    return domains


def describe_oddities(scored):
    """List what makes scores mean less than they seem to: one line each.

    Args:
        scored: Scored.
    """
    images, lines = len(scored.predictions), []
    single = [f"{name} ({one['images']:,} image)" for name, one in scored.domains.items() if one["images"] == 1]
    if "CIDEr" in scored.metrics and (images == 1 or single):
        lines.append(f"CIDEr of a single image is 0 by definition: {', '.join(single) or scored.source}")
    if scored.variety["empty"] == images:
        lines.append(f"no caption of {scored.source} holds a word")
    broken = [name for name, metric in scored.metrics.items() if not math.isfinite(metric.value)]
    if broken:
        lines.append(f"{', '.join(broken)} of {scored.source} is not a number, and null in the file")
    return lines


def best_of_captions(predictions, truth, kind):
    """Find the best score among each image's captions, which takes the references to choose.

    Args:
        predictions: dict of key to Prediction.
        truth: Truth.
        kind: a key of HISTOGRAMS.

    Returns:
        List of N floats.
    """
    import numpy as np

    metric, score = HISTOGRAMS[kind]
    several = [predictions[key].captions for key in truth.keys]
    words = iter(tokenize([caption for captions in several for caption in captions]))
    of_image = [[next(words) for _ in captions] for captions in several]
    if METRICS[metric].over_corpus:
        # The corpus counts each image once, so each rank is scored alone, without words where an image has no such caption.
        ranks = [[one[rank] if rank < len(one) else "" for one in of_image] for rank in range(max(map(len, of_image)))]
        scored = [score_captions(Captions(rank, truth.words), [metric])[score].per_image for rank in ranks]
        return np.max(scored, axis=0).tolist()
    places = [place for place, captions in enumerate(of_image) for _ in captions]
    pairs = Captions([caption for captions in of_image for caption in captions], [truth.words[place] for place in places])
    best = [0.0] * len(of_image)
    for place, value in zip(places, score_captions(pairs, [metric])[score].per_image.tolist()):
        best[place] = max(best[place], value)
    return best
