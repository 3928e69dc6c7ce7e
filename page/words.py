"""The words of a caption with what each attends to, joined from the pieces that the tokenizer makes of them."""

import dataclasses

from models.captioner import position_count
from reports.explain import explain_caption

MOST_SHOWN = 8  # prefix vectors listed for a word


@dataclasses.dataclass
class Word:
    """A word of a caption.

    Attributes:
        text: as it stands in the caption.
        attended: list of (number of a prefix vector from 1, share of the attention, words it resembles), most attended first.
    """

    text: str
    attended: list


def explain_words(model, clip_embedding, caption):
    """Measure what the words of a caption attend to in the prefix.

    Args:
        model: ClipCaptionModel.
        clip_embedding: [1, D], or [1, L, D].
        caption: text.

    Returns:
        List of Word; empty for an empty caption, and for one that fills more positions than the language model has when read again.
    """
    tokens, positions = model.tokenizer.encode(caption, add_special_tokens=False), position_count(model.gpt)
    if not caption.strip() or positions is not None and len(tokens) + model.config.prefix_length > positions:
        return []
    found = explain_caption(model, clip_embedding, caption)
    return [Word(text, _most_attended(found, pieces)) for text, pieces in join_pieces(found["words"], caption)]


def join_pieces(pieces, caption):
    """Find the words of a caption that a tokenizer's pieces belong to.

    Args:
        pieces: texts of the tokens in order, without spaces around them.
        caption: the text they were made of.

    Returns:
        List of (word, places of its pieces). A piece that cannot be found in the caption, such as half of a character, belongs to the
        word before it.
    """
    owners = [number for number, word in enumerate(caption.split()) for _ in word]  # for each character that is no space, its word
    solid = "".join(caption.split())
    words, position = [(word, []) for word in caption.split()], 0
    for place, piece in enumerate(pieces):
        piece = "".join(piece.split())
        start = solid.find(piece, position) if piece else -1
        if start < 0:
            start, end = min(position, len(solid) - 1), position
        else:
            end = start + len(piece)
        words[owners[start]][1].append(place)
        position = end
    return [(word, places) for word, places in words if places]


def _most_attended(found, pieces):
    """List the prefix vectors that the pieces of a word attend to most. found: what explain_caption returns."""
    shares = found["attention"][pieces].mean(0)  # [P]
    order = shares.argsort()[::-1][:MOST_SHOWN]
    resembled = [", ".join(dict.fromkeys(word for word, _ in found["nearest"][place])) for place in order]
    return [(int(place) + 1, float(shares[place]), near) for place, near in zip(order, resembled)]
