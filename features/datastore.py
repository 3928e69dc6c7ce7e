"""Captions of similar images, for {retrieved} in a prompt: retrieval as in SmallCap (arXiv:2209.15323).

A datastore is a feature file or directory of the captioner's own encoder, of pictures (or sounds) or of texts (parse_text.py). Of each of
the nearest images one caption is shown, the one that has most words in common with the image's others.
"""

import dataclasses

import numpy as np

from common import UserError
from features.captions import LazyCaptions
from features.content import check_compatible, drop_empty_captions, group_by_image, join_features
from features.image_ids import id_key
from features.neighbours import find_nearest
from features.store import load_features


@dataclasses.dataclass
class ImageCaptions:
    """The captions of some images of a feature file, image by image. C captions of T images."""

    features: object  # features.content.Features without empty captions
    numbers: object  # int64 [C], the captions in use, ordered by row
    rows: object  # int64 [T], ascending: rows of the images in use
    starts: object  # int64 [T + 1]: the captions of rows[t] are numbers[starts[t] : starts[t + 1]]

    @classmethod
    def of(cls, features, numbers=None):
        """Take the captions with these numbers (int64 [C]); None takes all."""
        rows = features.caption_rows
        numbers = np.arange(len(rows)) if numbers is None else numbers
        numbers = numbers[np.argsort(rows[numbers], kind="stable")]
        used, starts = np.unique(rows[numbers], return_index=True)
        return cls(features, numbers, used, np.append(starts, len(numbers)))

    def captions_of(self, places):
        """Read the captions of some images.

        Args:
            places: list of int, places in `rows`, in any order.

        Returns:
            List of lists of str.
        """
        several = [self.numbers[self.starts[place] : self.starts[place + 1]] for place in places]
        wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *several]))
        captions = self.features.captions
        texts = captions.select(wanted).texts[:] if isinstance(captions, LazyCaptions) else [captions[one]["caption"] for one in wanted]
        return [[texts[number] for number in np.searchsorted(wanted, numbers)] for numbers in several]


class Datastore:
    """Images whose captions are shown in prompts.

    Args:
        features: features.content.Features whose captions share one row per image.
        name: what it is called in an error.
        count: captions per prompt.
        project: function that carries embeddings of pictures into the space of the datastore's; None: they are in it.
    """

    def __init__(self, features, name, count, project=None):
        features = drop_empty_captions(features)[0]
        self.name, self.count, self.project = name, count, project
        self.images = ImageCaptions.of(features)
        if len(self.images.rows) < count:
            raise self._too_few(f"{len(self.images.rows)} images with captions")
        ids = np.fromiter((hash(id_key(image_id)) for image_id in features.image_ids()), np.int64, len(features.captions))
        self.keys = ids[self.images.numbers[self.images.starts[:-1]]]  # [T], of the image of each row
        self.shown = {}  # place -> the caption that is shown of it

    def _too_few(self, found):
        """Return the error of a datastore that is too small."""
        wanted = f"a prompt shows captions of {self.count}"
        return UserError(f"{self.name} holds {found}; {wanted}. Give a larger datastore, or train with fewer --retrieved_captions.")

    @property
    def digest(self):
        """A short name for the content."""
        return self.images.features.digest()

    def retrieve(self, clip_embedding, image_ids=None, device="cpu"):
        """Find captions of similar images for prompts.

        Args:
            clip_embedding: [B, D] or [B, L, D], tensor or MappedEmbeddings, as the encoder gives them.
            image_ids: B ids; captions of these images themselves are left out. None leaves nothing out.
            device: where embeddings are compared.

        Returns:
            List of B str: `count` captions, of the nearest image first.

        Raises:
            UserError: too few images are left.
        """
        embeddings, places = self.images.features.clip_embedding, self.images.rows
        queries = clip_embedding if self.project is None else self.project(clip_embedding[:]).cpu()
        own = np.array([hash(id_key(image_id)) for image_id in image_ids or ()], np.int64)
        most_own = max(np.unique(self.keys[np.isin(self.keys, own)], return_counts=True)[1], default=0)
        wanted = min(self.count + int(most_own), len(places))
        nearest = find_nearest(queries, range(len(queries)), embeddings, places, wanted, device)  # [B, wanted]
        if most_own:
            is_own = self.keys[nearest] == own[:, None]
            others = wanted - is_own.sum(1).max()
            if others < self.count:
                raise self._too_few(f"{others} images with captions besides the one to caption")
            nearest = np.take_along_axis(nearest, is_own.argsort(axis=1, kind="stable"), 1)  # the image's own behind all others
        nearest = nearest[:, : self.count].tolist()
        self._choose({place for several in nearest for place in several})
        return [" ".join(self.shown[place] for place in several) for several in nearest]

    def _choose(self, places):
        """Choose the caption to show of each image, and keep it."""
        places = sorted(places - self.shown.keys())
        self.shown |= {place: as_sentence(most_typical(texts)) for place, texts in zip(places, self.images.captions_of(places))}


def most_typical(texts):
    """Return the text with the most words in common with the others (mean Dice overlap of the sets of words); of equal ones the first."""
    words = [set(text.lower().replace(".", " ").replace(",", " ").split()) for text in texts]

    def agreement(place):
        own = words[place]
        return sum(2 * len(own & other) / max(len(own) + len(other), 1) for number, other in enumerate(words) if number != place)

    return texts[max(range(len(texts)), key=lambda place: (round(agreement(place), 9), -place))]


def as_sentence(text):
    """Return a caption on one line that ends with a punctuation mark."""
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?", ";", ":")) else f"{text}."


def open_datastore(paths, kind, count, wanted_by, load_projection):
    """Read a datastore.

    Args:
        paths: feature files or directories of one encoder.
        kind: features.content.EmbeddingKind that queries have.
        count: captions per prompt.
        wanted_by: what needs it, for an error.
        load_projection: function from an encoder's name to one that carries embeddings of its pictures into the space of its texts.

    Returns:
        Datastore.

    Raises:
        UserError: a file cannot be read, is of another encoder or width, or has too few images with captions.
    """
    features = join_features([group_by_image(load_features(path)) for path in paths], paths)
    found = features.kind if kind.are_texts else features.image_kind
    check_compatible(found, dataclasses.replace(kind, normalized=None), paths[0], wanted_by)
    projects = features.kind.are_texts and not kind.are_texts and features.meta.get("picture_width")
    return Datastore(features, paths[0], count, load_projection(kind.encoder or found.encoder) if projects else None)


def ids_by_row(features):
    """Return the image_id of each row of a feature file: that of its first caption, None where it has none."""
    ids = [None] * len(features.clip_embedding)
    for row, image_id in zip(features.caption_rows.tolist(), features.image_ids()):
        ids[row] = image_id if ids[row] is None else ids[row]
    return ids
