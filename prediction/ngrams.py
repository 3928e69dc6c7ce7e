"""How similar captions are to one another, by the n-grams that they share: CIDEr-D and chrF between all pairs of a few captions.

M captions, G different n-grams of one size, N documents. An n-gram is a 64-bit key, computed from its words or characters alone.
"""

import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np

CIDER_SIZES, CIDER_SIGMA, CIDER_SCALE = 4, 6.0, 10.0  # CIDEr-D, arXiv:1411.5726, section 6
CHRF_SIZES, CHRF_BETA = 6, 2.0  # chrF (Popović 2015, aclanthology W15-3049): character n-grams, recall counts twice
MOST_WORDS, MOST_CHARACTERS = 200, 1000  # of one caption that are compared; bounds the memory
MOST_COMPARED = 500  # captions compared with one another; bounds the memory
BLOCK = 50_000  # documents whose n-grams are counted together


def tokenize_plain(texts):
    """Split captions into lower-case words at spaces and punctuation, which is removed.

    Args:
        texts: list of str.

    Returns:
        List of str, words separated by single spaces.
    """
    return [" ".join(re.findall(r"\w+(?:[-'’.]\w+)*|[^\w\s.,:;!?'\"`…()\[\]{}-]", text.lower())) for text in texts]


def number_words(texts):
    """Turn captions into numbers, one per word of tokenize_plain. Returns list of M uint64 arrays."""
    numbers = (map(_number_word, text.split()[:MOST_WORDS]) for text in tokenize_plain(texts))
    return [np.fromiter(of_caption, np.uint64) for of_caption in numbers]


def number_characters(texts):
    """Turn captions into numbers, one per character that is no space. Returns list of M uint64 arrays."""
    kept = ("".join(text.split())[:MOST_CHARACTERS] for text in texts)
    return [np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) for text in kept]


@functools.lru_cache(2**17)
def _number_word(word):
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def iterate_ngrams(sequences, longest):
    """Iterate over the n-grams of captions, size by size.

    Args:
        sequences: list of M uint64 arrays, the captions' words or characters.
        longest: the largest size.

    Yields:
        For each size from 1: owners int64 [X], the caption of each n-gram, ascending; keys uint64 [X].
    """
    numbers = np.concatenate([np.zeros(0, np.uint64), *sequences])
    owners = np.repeat(np.arange(len(sequences)), [len(one) for one in sequences])
    keys = np.zeros(len(numbers), np.uint64)
    for size in range(1, longest + 1):
        last = numbers[size - 1 :]
        keys = _mix(keys[: len(last)] + last)
        inside = owners[: len(last)] == owners[size - 1 :]
        yield owners[: len(last)][inside], keys[inside]


def _mix(keys):
    """Scramble 64-bit keys one to one (the finalizer of splitmix64), so that sums of them do not coincide."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(31))


# -- Document frequencies --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
    """In how many documents n-grams of 1 to 4 words occur. A document is the captions of one image."""

    keys: object  # uint64 [K], ascending
    counts: object  # int64 [K]
    documents: int  # N

    def weigh(self, keys):
        """Compute the weights of n-grams as CIDEr does: log N - log(max(1, documents with it)); float64, as many as keys."""
        places = np.searchsorted(self.keys, keys)
        found = np.zeros(len(keys), np.int64)
        known = places < len(self.keys)
        known[known] = self.keys[places[known]] == keys[known]
        found[known] = self.counts[places[known]]
        return np.log(max(self.documents, 1)) - np.log(np.maximum(found, 1))


def count_documents(documents):
    """Count in how many documents each n-gram of up to 4 words occurs.

    Args:
        documents: iterable of lists of str, the captions of each image.

    Returns:
        DocumentFrequencies.
    """
    total, fresh, documents_seen = (np.zeros(0, np.uint64), np.zeros(0, np.int64)), [], 0
    for block in _blocks(documents):
        fresh.append(_count_block(block))
        documents_seen += len(block)
        if sum(len(keys) for keys, _ in fresh) > len(total[0]):  # seldom enough that millions of n-grams are sorted a few times only
            total, fresh = _add_counts([total, *fresh]), []
    keys, counts = _add_counts([total, *fresh])
    return DocumentFrequencies(keys, counts, documents_seen)


def _blocks(documents):
    """Cut an iterable into lists of BLOCK documents."""
    documents = iter(documents)
    while block := list(itertools.islice(documents, BLOCK)):
        yield block


def _count_block(block):
    """Count the n-grams of a list of documents. Returns keys, ascending, and counts."""
    owner_of = np.repeat(np.arange(len(block)), [len(document) for document in block])  # of each caption
    sequences = number_words([text for document in block for text in document])
    pairs = []
    for captions, keys in iterate_ngrams(sequences, CIDER_SIZES):
        owners = owner_of[captions]
        order = np.lexsort((keys, owners))
        keys, owners = keys[order], owners[order]
        first = np.ones(len(keys), bool)  # of this n-gram in its document
        first[1:] = (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])
        pairs.append(np.unique(keys[first], return_counts=True))
    return _add_counts(pairs)


def _add_counts(pairs):
    """Add up pairs of keys and counts. Returns the same, keys ascending and each once."""
    keys, places = np.unique(np.concatenate([keys for keys, _ in pairs]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, places, np.concatenate([counts for _, counts in pairs]))
    return keys, counts


# -- Similarity ------------------------------------------------------------------------------------------------------------


def compare_cider(texts, frequencies, candidates=None):
    """Compute CIDEr-D of each caption against each other as its only reference.

    Args:
        texts: list of M str.
        frequencies: DocumentFrequencies.
        candidates: K, to compare the first K captions only; None for all M.

    Returns:
        float64 [K, M], 0 to 10: row the candidate, column the reference.
    """
    sequences, total = number_words(texts), 0
    for counts, keys in _count_ngrams(sequences, CIDER_SIZES):
        weights = frequencies.weigh(keys)
        norms = np.sqrt(counts**2 @ weights**2)
        matched, norms = _match(counts, counts * weights**2, candidates), np.outer(norms[:candidates], norms)
        total += np.divide(matched, norms, out=np.zeros_like(matched), where=norms > 0)
    bigrams = np.array([max(len(one) - 1, 0) for one in sequences])  # what pycocoevalcap takes for the length
    penalty = np.exp(-((bigrams[:candidates, None] - bigrams) ** 2) / (2 * CIDER_SIGMA**2))
    return CIDER_SCALE * total / CIDER_SIZES * penalty


def compare_chrf(texts, candidates=None):
    """Compute chrF of each caption against each other as its reference; it needs no document frequencies.

    Args:
        texts: list of M str.
        candidates: K, to compare the first K captions only; None for all M.

    Returns:
        float64 [K, M], 0 to 1: row the candidate, column the reference. Sizes that either caption is too short for are left out.
    """
    shape = (len(texts[:candidates]), len(texts))
    precision, recall, sizes = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for counts, _ in _count_ngrams(number_characters(texts), CHRF_SIZES):
        matched, lengths = _match(counts, np.ones_like(counts), candidates), counts.sum(1)
        longer = np.maximum(lengths, 1)
        precision += matched / longer[:candidates, None]
        recall += matched / longer
        sizes += np.outer(lengths[:candidates] > 0, lengths > 0)
    precision, recall = precision / np.maximum(sizes, 1), recall / np.maximum(sizes, 1)
    below = CHRF_BETA**2 * precision + recall
    return np.divide((1 + CHRF_BETA**2) * precision * recall, below, out=np.zeros(shape), where=below > 0)


def _count_ngrams(sequences, longest):
    """For each size, count the n-grams of each caption. Yields float64 [M, G] and the keys, uint64 [G]."""
    for owners, found in iterate_ngrams(sequences, longest):
        keys, places = np.unique(found, return_inverse=True)
        shape = (len(sequences), len(keys))
        yield np.bincount(owners * len(keys) + places, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64), keys


def _match(counts, weights, rows=None):
    """Sum min(counts of the row, counts of the column) x the column's weights over n-grams. counts, weights [M, G] -> [rows, M]."""
    own = (counts * weights).sum(1)[:rows]
    matched, below, reach, levels = np.zeros((len(own), len(counts))), 0, counts > 0, np.unique(counts)
    for level in levels[levels > 0]:
        # Most n-grams are in one caption only, and few occur twice in any.
        shared = (reach.sum(0) > 1) & reach[:rows].any(0)
        counts, weights = counts[:, shared], weights[:, shared]
        reach = counts >= level
        matched += (level - below) * (reach[:rows].astype(np.float64) @ (reach * weights).T)
        below, reach = level, counts > level
    np.fill_diagonal(matched, own)
    return matched


def mean_of_others(similarity):
    """Average each row of [M, M] without its own place: float64 [M]; zeros for a single caption."""
    total = similarity.sum(1) - np.diag(similarity)
    return total / max(len(similarity) - 1, 1)
