"""Choice among captions by agreement: the one most similar to the others (minimum Bayes risk decoding, arXiv:2401.02749).

It takes no encoder, so it works for pictures and sounds alike.
"""

import numpy as np

from prediction.ngrams import compare_chrf, compare_cider, count_documents, mean_of_others

FEWEST_DOCUMENTS = 100  # images; the captions of fewer do not tell rare words from common ones
DIGITS = 9  # agreements that differ by less are equal: they are sums in different orders


def order_by_agreement(texts, frequencies=None):
    """Order captions of one image by their mean similarity to the others, the most agreed-on first; equal ones keep their order.

    Captions that occur several times count as often: of samples, they are the likelier ones.

    Args:
        texts: list of M str.
        frequencies: prediction.ngrams.DocumentFrequencies for CIDEr-D; None for chrF.

    Returns:
        List of M places in `texts`.
    """
    similarity = compare_chrf(texts) if frequencies is None else compare_cider(texts, frequencies)
    return np.argsort(-mean_of_others(similarity).round(DIGITS), kind="stable").tolist()


def rerank_by_agreement(captions, kept, frequencies=None):
    """Order each image's captions by agreement.

    Args:
        captions: list of N lists of tuples that begin with the text.
        kept: captions to keep per image.
        frequencies: DocumentFrequencies of the training set. None: those of `captions`, or chrF for fewer than FEWEST_DOCUMENTS images.

    Returns:
        List of N lists of the same tuples.
    """
    texts = [[one[0] for one in several] for several in captions]
    if frequencies is None and len(texts) >= FEWEST_DOCUMENTS:
        frequencies = count_documents(texts)
    return [[several[place] for place in order_by_agreement(own, frequencies)[:kept]] for own, several in zip(texts, captions)]
