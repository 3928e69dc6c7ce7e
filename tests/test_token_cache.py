"""The token cache: the same tokens as without it, never those of other captions or of another tokenizer."""

import random

import numpy as np
import pytest

import tiny
from features import tokens as token_cache
from features.packing import tokenize_captions

TEXTS = [*tiny.CAPTIONS, "", "Ein Hund 🐕 läuft.", "  spaces  "]


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Tokenise through a cache file that is used however few the captions are; counts how often it really tokenised."""
    calls = []
    monkeypatch.setattr(token_cache, "CACHED_FROM", 1)
    monkeypatch.setattr(token_cache, "tokenize_captions", lambda *words: calls.append(1) or tokenize_captions(*words))
    path = tmp_path / "train.pkl.tokens.npz"

    def tokenize(texts, tokenizer, end=5, room=None, write=True):
        return token_cache.tokenize_with_cache(texts, tokenizer, end, room, path, write)

    tokenize.calls, tokenize.path = calls, path
    return tokenize


def same(one, other):
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.offsets, other.offsets) and one.cut == other.cut


def test_tokens_are_those_of_the_library_call():
    tokenizer = tiny.train_tokenizer()
    tokens = tokenize_captions(TEXTS, tokenizer, 7)
    assert [tokens[number].tolist() for number in range(len(TEXTS))] == [tokenizer.encode(text) + [7] for text in TEXTS]


def test_a_second_run_reads_what_the_first_one_made(cached):
    tokenizer = tiny.train_tokenizer()
    first, second = cached(TEXTS, tokenizer, room=6), cached(TEXTS, tokenizer, room=6)
    assert len(cached.calls) == 1
    assert same(first, second)
    assert first.cut > 0


def test_what_there_is_room_for_is_cut_from_the_same_tokens(cached):
    tokenizer = tiny.train_tokenizer()
    for end in (5, None):
        for room in (None, 9, 4, 1000, 1):
            assert same(cached(TEXTS, tokenizer, end, room), tokenize_captions(TEXTS, tokenizer, end, room))
        kept = [ids + [5] * (end == 5) for ids in tokenizer(TEXTS)["input_ids"]]
        short = cached(TEXTS, tokenizer, end, 4)
        expected = [ids if len(ids) <= 4 else [*ids[:3], 5] if end else ids[:4] for ids in kept]
        assert [short[number].tolist() for number in range(len(TEXTS))] == expected
    assert len(cached.calls) == 2, "once for each end"


def test_other_captions_another_tokenizer_or_another_end_are_tokenised_anew(cached):
    one, other = tiny.train_tokenizer(), tiny.train_tokenizer(vocab_size=300)
    cached(TEXTS, one)
    for texts, tokenizer, end, room in ((TEXTS[:-1], one, 5, None), (TEXTS, other, 5, None), (TEXTS, one, None, 4)):
        before = len(cached.calls)
        assert same(cached(texts, tokenizer, end, room), tokenize_captions(texts, tokenizer, end, room))
        assert len(cached.calls) == before + 1


@pytest.mark.parametrize("damage", [b"", b"no zip", b"PK\x03\x04 cut short"])
def test_a_damaged_cache_is_replaced(cached, damage):
    tokenizer = tiny.train_tokenizer()
    cached.path.write_bytes(damage)
    expected = tokenize_captions(TEXTS, tokenizer, 5)
    assert same(cached(TEXTS, tokenizer), expected)
    assert same(cached(TEXTS, tokenizer), expected)
    assert len(cached.calls) == 1


def test_a_place_that_cannot_be_written_is_done_without(cached, tmp_path):
    tokenizer = tiny.train_tokenizer()
    (tmp_path / "file").write_text("")
    tokens = token_cache.tokenize_with_cache(TEXTS, tokenizer, 5, None, tmp_path / "file" / "cache.npz")
    assert same(tokens, tokenize_captions(TEXTS, tokenizer, 5))
    cached(TEXTS, tokenizer, write=False)
    assert not cached.path.exists()


def test_a_cache_with_any_bit_flipped_is_made_anew_or_read_rightly(cached):
    tokenizer, draw = tiny.train_tokenizer(), random.Random(0)
    expected = cached(TEXTS, tokenizer)
    whole = cached.path.read_bytes()
    directory = whole.index(b"PK\x01\x02")  # flags, versions and ways of packing stand here
    for number in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(directory if number % 2 else 0, len(whole))] ^= 1 << draw.randrange(8)
        cached.path.write_bytes(damaged)
        assert same(cached(TEXTS, tokenizer), expected)
    assert len(cached.calls) > 100
