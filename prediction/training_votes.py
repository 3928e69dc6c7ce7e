"""Choice among captions by the training set: the one that should score best, judged by the captions of the training images.

m-RNN (arXiv:1412.6632, section 8) chooses the caption most similar to those of the nearest training images, which all count alike. Here an
image counts as much as ridge regression from embeddings to captions says, and may count against a caption. The weighted mean of the CIDEr
with their captions estimates the CIDEr that a caption will have. T training images, D width.
"""

import numpy as np

from common import UserError
from features.content import drop_empty_captions, group_by_image
from features.datastore import ImageCaptions
from features.image_ids import id_key
from features.neighbours import find_nearest, unit_vectors
from prediction.consensus import DIGITS, FEWEST_DOCUMENTS
from prediction.ngrams import MOST_COMPARED, compare_chrf, compare_cider, count_documents

# Penalty of the regression on embeddings of norm 1. By leave-one-out on 800 photographs of Flickr8k, 1 to 5 are nearly equal.
RIDGE = 3.0
VOTERS = 50  # training images that count most for a caption, and as many that count most against it
BLOCK = 4096  # embeddings in memory as float64


def count_image_captions(features):
    """Count in how many images' captions each n-gram occurs. Returns prediction.ngrams.DocumentFrequencies."""
    documents = {}
    for image_id, text in zip(features.image_ids(), features.texts):
        documents.setdefault(id_key(image_id), []).append(text)
    return count_documents(documents.values())


class TrainingVotes:
    """A training set that judges captions.

    Args:
        features: features.content.Features of the training set.
        name: what it is called in an error.

    Raises:
        UserError: it holds no captions.
    """

    def __init__(self, features, name):
        features = group_by_image(drop_empty_captions(features)[0])
        self.images = ImageCaptions.of(features)
        if not len(self.images.rows):
            raise UserError(f"{name} holds blank captions only; --rerank train compares with its captions. Give the training set.")
        keys = np.fromiter((hash(id_key(image_id)) for image_id in features.image_ids()), np.int64, len(features.captions))
        self.keys = keys[self.images.numbers[self.images.starts[:-1]]]  # [T]
        few = len(self.images.rows) < FEWEST_DOCUMENTS
        self.frequencies = None if few else count_documents(self.images.captions_of(range(len(self.images.rows))))
        self._solve = self._fit()

    def _fit(self):
        """Factorize X^T X + RIDGE. Returns a function that multiplies queries [N, D] with its inverse."""
        import torch

        gram = 0
        for start in range(0, len(self.images.rows), BLOCK):
            block = unit_vectors(self.images.features.clip_embedding, self.images.rows[start : start + BLOCK]).double()
            gram = gram + block.T @ block  # [D, D]
        factor = torch.linalg.cholesky(gram + RIDGE * torch.eye(len(gram), dtype=torch.float64))
        return lambda queries: torch.cholesky_solve(queries.double().T, factor).T.float()

    def weigh(self, embeddings, image_ids=None):
        """Compute how much training images count for other images.

        Args:
            embeddings: [N, D] or [N, L, D] tensor or MappedEmbeddings; several of an image are added up.
            image_ids: N ids. A training image does not count for itself, which is the regression without it. None leaves nothing out.

        Returns:
            int64 [N, V] places in `images`, float [N, V] their weights; V is 2 x (VOTERS + 1), or 2 x T in a smaller training set.
        """
        import torch

        queries = self._solve(unit_vectors(embeddings, np.arange(len(embeddings))))
        known, rows = self.images.features.clip_embedding, self.images.rows
        count = min(VOTERS + 1, len(rows))  # one of them may be the image itself
        places = [find_nearest(sign * queries, range(len(queries)), known, rows, count) for sign in (1, -1)]
        places = np.concatenate(places, 1)  # [N, 2 x count]
        weights = np.empty(places.shape, np.float32)
        for number, of_image in enumerate(places):
            weights[number] = torch.mv(unit_vectors(known, rows[of_image]), queries[number]).numpy()
            again = np.ones(len(of_image), bool)  # in a small training set an image may stand on both sides
            again[np.unique(of_image, return_index=True)[1]] = False
            own = False if image_ids is None else self.keys[of_image] == hash(id_key(image_ids[number]))
            weights[number, again | own] = 0
        return places, weights

    def judge(self, captions, embeddings, image_ids=None):
        """Estimate the similarity of captions to what people would say of the image.

        Args:
            captions: list of N lists of str.
            embeddings, image_ids: as `weigh` takes them.

        Returns:
            List of N float arrays, as many numbers as captions.
        """
        judged = []
        for texts, places, weights in zip(captions, *self.weigh(embeddings, image_ids)):
            order = np.argsort(-np.abs(weights), kind="stable")
            voters, shares = [], []
            for place, own in zip(order, self.images.captions_of(places[order])):
                voters += own
                shares += [weights[place] / len(own)] * len(own)
            voters = voters[: MOST_COMPARED - len(texts)]
            similarity = self._compare([*texts, *voters], len(texts))[:, len(texts) :]
            judged.append(similarity @ np.array(shares[: len(voters)]))
        return judged

    def _compare(self, texts, candidates):
        if self.frequencies is None:
            return compare_chrf(texts, candidates)
        return compare_cider(texts, self.frequencies, candidates)


def rerank_by_training_set(captions, kept, embeddings, image_ids, votes):
    """Order each image's captions by what the training set says of them; equal ones keep their order.

    Args:
        captions: list of N lists of tuples that begin with the text.
        kept: captions to keep per image.
        embeddings, image_ids: as TrainingVotes.weigh takes them.
        votes: TrainingVotes.

    Returns:
        List of N lists of the same tuples.
    """
    judged = votes.judge([[one[0] for one in several] for several in captions], embeddings, image_ids)
    orders = (np.argsort(-of_image.round(DIGITS), kind="stable")[:kept] for of_image in judged)
    return [[several[place] for place in order] for order, several in zip(orders, captions)]
