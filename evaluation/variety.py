"""What captions are like, without looking at the references: how many differ, how many are new, how long, how repetitive."""

NGRAMS = (2, 3, 4)


def describe_captions(captions, train_captions=None, ended=None):
    """Describe a set of captions.

    Args:
        captions: list of str, words separated by single spaces.
        train_captions: the same of the training set, or None.
        ended: list of bool, whether each caption ended with its stop token; None where that is not known.

    Returns:
        dict of plain values. distinct, distinct_share: different captions; novel_share: captions that are not in the training set;
        vocabulary: different words; mean_length: words; repeated_2grams to repeated_4grams: share of captions with an n-gram that
        occurs twice; empty: captions without a word.
    """
    words = [caption.split() for caption in captions]
    summary = {
        "distinct": len(set(captions)),
        "distinct_share": len(set(captions)) / len(captions),
        "vocabulary": len({word for one in words for word in one}),
        "mean_length": sum(map(len, words)) / len(words),
        "empty": sum(not one for one in words),
    }
    for size in NGRAMS:
        summary[f"repeated_{size}grams"] = sum(repeats_ngram(one, size) for one in words) / len(words)
    if train_captions is not None:
        known = set(train_captions)
        summary["novel_share"] = sum(caption not in known for caption in captions) / len(captions)
    if ended is not None:
        summary["ended_share"] = sum(ended) / len(ended)
    return summary


def repeats_ngram(words, size):
    """Return whether a list of words has an n-gram of `size` words twice."""
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(grams)) < len(grams)
