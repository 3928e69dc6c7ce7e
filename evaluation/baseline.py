"""Captions taken from the training set by similarity of the images: what a captioner must beat to have learned anything.

Two of them: the first caption of the nearest training image; and, of all captions of the NEIGHBOURS nearest ones, the one that agrees most
with the others (as the nearest-neighbour baseline of arXiv:1505.04467 does). N evaluated images, T training images in use, D width.
"""

import dataclasses

import numpy as np

from common import UserError
from evaluation.references import Prediction, match_references
from evaluation.scoring import score_system
from evaluation.statistics import compare
from evaluation.truth import find_rows
from features.content import check_compatible, drop_empty_captions, group_by_image
from features.datastore import ImageCaptions
from features.image_ids import id_key, match_ids, without_suffix
from features.neighbours import find_nearest
from prediction.consensus import order_by_agreement
from prediction.ngrams import MOST_COMPARED, count_documents

NEIGHBOURS = 15
BASELINES = {"nearest": "nearest training image", "agreed": f"agreed of {NEIGHBOURS} nearest"}  # -> heading of their column
TEXTS = 20_000  # training images whose captions are Python strings together
DECIDING = ("CIDEr", "SPIDEr", "SPICE", "METEOR", "ROUGE-L", "BLEU-4", "CLIPScore")  # the first that is computed tells who is better


@dataclasses.dataclass
class TrainingImages(ImageCaptions):
    """Training images to take captions from."""

    left_out: int  # images that are evaluated, too

    def describe(self, train_data):
        """Say in a line how many images there are to take captions from."""
        left_out = f"; {self.left_out:,} more are evaluated here, and left out" if self.left_out else ""
        return f"copied captions come from {len(self.rows):,} images of {train_data}{left_out}"

    def documents(self):
        """Iterate over the captions of every image: lists of str."""
        for start in range(0, len(self.rows), TEXTS):
            yield from self.captions_of(range(start, min(start + TEXTS, len(self.rows))))


def open_training_images(train, pictures, references, train_data, data):
    """Prepare a training set for taking captions from it, without the images that are evaluated.

    Args:
        train: features.content.Features of the training set.
        pictures: evaluation.truth.Pictures of the evaluated images.
        references: evaluation.references.References of these.
        train_data: the training set's name, for errors.
        data: the evaluated feature file's name, for errors.

    Returns:
        TrainingImages.

    Raises:
        UserError: the embeddings do not go together, or no image with a caption is left.
    """
    check_compatible(train.kind, pictures.features.kind, train_data, data)
    train = group_by_image(drop_empty_captions(train)[0])
    rows = train.caption_rows
    keys = [id_key(image_id) for image_id in train.image_ids()]
    own = _match_own(set(keys), {*pictures.rows, *match_references(pictures.rows, references).values()})
    is_own = np.fromiter((key in own for key in keys), bool, len(keys))
    kept = np.flatnonzero(~np.isin(rows, rows[is_own]))
    if not len(kept):
        found = (
            f"{train_data} holds captions of images that are all in {data} too" if len(rows) else f"{train_data} holds blank captions only"
        )
        raise UserError(f"{found}; --baseline needs captions of other images. Give the training set as --train_data.")
    return TrainingImages(**vars(ImageCaptions.of(train, kept)), left_out=len(np.unique(rows[is_own])))


def _match_own(keys, evaluated):
    """Find the training set's keys that are evaluated images, also where one file leaves out suffixes or folders. Returns a set."""

    def shorten(key):
        return without_suffix(key).rpartition("/")[2]

    known = {shorten(key) for key in evaluated}
    return set(match_ids([key for key in keys if shorten(key) in known], evaluated))


def take_captions(store, pictures, references, predictions, keys):
    """Caption images with captions of the training set.

    Args:
        store: TrainingImages.
        pictures: evaluation.truth.Pictures.
        references: evaluation.references.References.
        predictions: dict of key to Prediction of the captioner, whose image_ids are taken over.
        keys: N of the references' keys.

    Returns:
        dict of the names in BASELINES to dicts of key to Prediction.

    Raises:
        UserError: an image has no embedding.
    """
    queries = pictures.features.clip_embedding
    places = find_nearest(
        queries, find_rows(pictures, references, keys), store.features.clip_embedding, store.rows, min(NEIGHBOURS, len(store.rows))
    )
    frequencies = count_documents(store.documents())
    taken = {name: {} for name in BASELINES}
    for key, nearest in zip(keys, places):
        several = store.captions_of(nearest)
        texts = [text for captions in several for text in captions][:MOST_COMPARED]
        agreed = texts[order_by_agreement(texts, frequencies)[0]]
        for name, text in (("nearest", several[0][0]), ("agreed", agreed)):
            taken[name][key] = Prediction(predictions[key].image_id, [text])
    return taken


@dataclasses.dataclass
class Baseline:
    """Captions of the training set with their scores, beside the captioner's."""

    scored: object  # evaluation.scoring.Scored
    comparison: dict  # captioner - baseline, as evaluation.statistics.compare returns it; empty without draws
    verdict: str | None  # a line where the captioner does not beat it


def score_baselines(taken, captioner, truth, metrics, embed, train_words, **settings):
    """Score captions of the training set, and compare the captioner with them.

    Args:
        taken: what take_captions returns.
        captioner: evaluation.scoring.Scored.
        truth, metrics, embed, train_words, settings: as evaluation.scoring.score_system takes them.

    Returns:
        dict of name to Baseline.
    """
    baselines = {}
    for name, predictions in taken.items():
        scored = score_system(BASELINES[name], predictions, truth, metrics, embed, train_words, **settings)
        draws = settings["draws"]
        comparison = compare(scored.metrics, captioner.metrics, draws, settings["seed"]) if draws else {}
        baselines[name] = Baseline(scored, comparison, _judge(captioner, scored, comparison))
    return baselines


def _judge(captioner, baseline, comparison):
    """Say in a line that a captioner does not beat a baseline; None where it does: its score is higher, and the interval above 0."""
    name = next((name for name in DECIDING if name in captioner.metrics), None)
    if name is None:
        return None
    ours, theirs = captioner.metrics[name].value, baseline.metrics[name].value
    low, high = comparison[name]["interval"] if name in comparison else (ours - theirs,) * 2
    if ours > theirs and low > 0:
        return None
    interval = f", 95 % interval of the difference {100 * low:+.2f} to {100 * high:+.2f}" if name in comparison else ""
    found = f"{name} {100 * ours:.2f} against {100 * theirs:.2f}{interval}"
    return f"{captioner.source} does not beat captions copied from the training set ({baseline.source}): {found}"
