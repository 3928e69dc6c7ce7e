"""Tokens kept between runs, keyed by the captions themselves and by the tokenizer, so that they cannot go stale."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from common import UserError, replace_file
from features.packing import TOKENIZED_TOGETHER, Tokens, shorten_captions, tokenize_captions

CACHED_FROM = 100_000  # captions; fewer are tokenised in about a second


def tokenize_with_cache(texts, tokenizer, end_token_id, max_tokens, path, write=True):
    """What tokenize_captions gives, read from `path` when it holds these captions under this tokenizer, else made and kept there.

    path: the cache, an .npz file; write: whether this process may write it (one of several must). A cache that cannot be read or
    written is done without.
    """
    if len(texts) < CACHED_FROM:
        return tokenize_captions(texts, tokenizer, end_token_id, max_tokens)
    # Kept whole, since what there is room for differs from prefix to prefix.
    return shorten_captions(_whole_captions(texts, tokenizer, end_token_id, path, write), max_tokens, end_token_id)


def _whole_captions(texts, tokenizer, end_token_id, path, write):
    key = _key(texts, tokenizer, end_token_id)
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return Tokens(kept["ids"], kept["offsets"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    tokens = tokenize_captions(texts, tokenizer, end_token_id)
    if write:
        try:
            with replace_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, key=key, ids=tokens.ids, offsets=tokens.offsets)
        except UserError:  # a place that cannot be written: the next run tokenises again
            pass
    return tokens


def _key(texts, tokenizer, end_token_id):
    """SHA-256 over captions, tokenizer and what is asked of them, in hexadecimal."""
    digest = hashlib.sha256(f"{len(texts)}".encode())
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        digest.update("".join(f"\0{text}" for text in texts[start : start + TOKENIZED_TOGETHER]).encode("utf-8", "surrogatepass"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest.update(f"\0{described}\0{end_token_id}".encode())
    return digest.hexdigest()
