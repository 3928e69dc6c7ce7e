"""Tokens of captions: kept between runs, and behind prompts.

The cache is keyed by the captions themselves and by the tokenizer, so that it cannot be out of date.

A prompt is text between prefix and caption. Prompt and caption are tokenized as one string, so that a space at the prompt's end belongs to
the caption's first word, as in any running text. What an image's captions have in common of the prompt is laid out once. Tokens of the
prompt that differ from caption to caption come first in the caption; they are read and never predicted.
"""

import hashlib
from pathlib import Path

import numpy as np

from common import ARCHIVE_ERRORS, UserError, replace_file
from features.packing import TOKENIZED_TOGETHER, Tokens, shorten_captions, tokenize_captions

CACHED_FROM = 100_000  # captions; fewer are tokenized in about a second


def tokenize_with_cache(texts, tokenizer, end_token_id, max_tokens, path, write=True):
    """Tokenize captions, or read their tokens from a cache that holds these captions under this tokenizer.

    A cache that cannot be read or written is done without.

    Args:
        texts: sequence of str.
        tokenizer, end_token_id, max_tokens: as tokenize_captions takes them.
        path: the cache, an .npz file.
        write: whether this process may write it (one of several must).

    Returns:
        Tokens.
    """
    if len(texts) < CACHED_FROM:
        return tokenize_captions(texts, tokenizer, end_token_id, max_tokens)
    # Kept whole, since the room for captions differs from prefix to prefix.
    return shorten_captions(_whole_captions(texts, tokenizer, end_token_id, path, write), max_tokens, end_token_id)


def _whole_captions(texts, tokenizer, end_token_id, path, write):
    """Return the Tokens of captions that are not cut."""
    key = _key(texts, tokenizer, end_token_id)
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return Tokens(kept["ids"], kept["offsets"])
    except (OSError, *ARCHIVE_ERRORS):
        pass
    tokens = tokenize_captions(texts, tokenizer, end_token_id)
    if write:
        try:
            with replace_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, key=key, ids=tokens.ids, offsets=tokens.offsets)
        except UserError:  # a place that cannot be written: the next run tokenizes again
            pass
    return tokens


def _key(texts, tokenizer, end_token_id):
    """Return SHA-256 over captions, tokenizer and settings, in hexadecimal."""
    digest = hashlib.sha256(f"{len(texts)}".encode())
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        digest.update("".join(f"\0{text}" for text in texts[start : start + TOKENIZED_TOGETHER]).encode("utf-8", "surrogatepass"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest.update(f"\0{described}\0{end_token_id}\0special tokens as text".encode())
    return digest.hexdigest()


def tokenize_prompted(texts, prompts, caption_rows, tokenizer, end_token_id=None, most_tokens=None):
    """Tokenize captions behind the prompts of their images.

    Args:
        texts: sequence of C str, the captions.
        prompts: list of str, one per row of the features.
        caption_rows: [C] int, the row of each caption.
        tokenizer: a fast one, which knows where a token stands in its text.
        end_token_id: token that ends each caption, or None.
        most_tokens: room for a prompt and a caption together, in tokens; a longer caption loses its end and is counted.

    Returns:
        Tokens of the captions, and Tokens of the prompts (one per row of the features).

    Raises:
        UserError: a prompt leaves no room for a caption, or the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--prompt needs a fast tokenizer, which knows where a token stands in its text. Save it with tokenizer.json.")
    joined = [prompts[row] + text for row, text in zip(caption_rows, texts)]
    encoded = tokenizer(joined, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
    heads, shared = [], {}  # tokens of the prompt before each caption; what an image's captions share of them
    for row, ids, places in zip(caption_rows, encoded["input_ids"], encoded["offset_mapping"]):
        head = next((n for n, (_, end) in enumerate(places) if end > len(prompts[row])), len(ids))
        heads.append(head)
        prompt = ids[:head]
        common = shared.setdefault(int(row), prompt)
        length = next((n for n, (a, b) in enumerate(zip(common, prompt)) if a != b), min(len(common), len(prompt)))
        shared[int(row)] = common[:length]

    end = [] if end_token_id is None else [end_token_id]
    captions, skip, cut = [], [], 0
    for row, ids, head in zip(caption_rows, encoded["input_ids"], heads):
        start = len(shared[int(row)])
        ids, unpredicted = ids[start:], head - start
        if most_tokens is not None:
            room = most_tokens - start - len(end)
            if room <= unpredicted:
                raise UserError(f"a prompt of {head} tokens leaves no room for a caption: {prompts[row][:60]!r}... Use a shorter one.")
            cut += len(ids) > room
            ids = ids[:room]
        captions.append(ids + end)
        skip.append(unpredicted)
    tokens = flat_tokens(captions, cut)
    tokens.skip = np.array(skip, np.int64) if any(skip) else None
    return tokens, flat_tokens([shared.get(row, []) for row in range(len(prompts))])


def flat_tokens(lists, cut=0):
    """Lay lists of token ids out as one flat array. Returns Tokens."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return Tokens(np.fromiter((token for ids in lists for token in ids), np.int32, count=offsets[-1]), offsets, cut)
