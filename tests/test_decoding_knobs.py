"""What decoding may be told: n-grams, length, prompt. Each equals a slow, plain search that looks at one caption at a time."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import END, STOP, TOKENIZER, VOCABULARY, embeddings, prefixes, random_model

from benchmarks import published
from common import UserError
from models.constraints import Constraints
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")


def repeats(tokens, size):
    """Whether some `size` tokens in a row occur twice."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return size > 0 and len(set(grams)) < len(grams)


def allowed(before, token, prompt, size, min_length, stop):
    """Whether `token` may follow, by the rules as one would say them; `before` holds none that breaks them."""
    if token == stop and len(before) < min_length:
        return False
    text = [*prompt, *before]
    grams = {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
    return not size or tuple([*text, token][-size:]) not in grams or len(text) + 1 < size


def plain_search(model, prefix, beams, entry_length, stop, size=0, min_length=0, penalty=1.0, prompt=()):
    """Beam search over lists of tokens → [(tokens, sum of log-probabilities)], best first by sum / length ** penalty."""
    running, finished_steps = [([], 0.0)], 0
    while finished_steps < entry_length:
        candidates = []
        for tokens, total in running:
            if tokens and tokens[-1] == stop:
                candidates.append((tokens, total))
                continue
            costs = published.next_logits(model.gpt, prefix, [[*prompt, *tokens]]).log_softmax(dim=-1)[0].tolist()
            rows = [token for token in range(VOCABULARY) if allowed(tokens, token, prompt, size, min_length, stop)] or [stop]
            candidates += [([*tokens, token], total + costs[token]) for token in rows]
        candidates.sort(key=lambda candidate: -candidate[1] / len(candidate[0]) ** penalty)
        running = candidates[:beams]
        finished_steps += 1
    return running


def text_of(tokens, prompt=()):
    return TOKENIZER.decode([*prompt, *(tokens[:-1] if tokens[-1] == END else tokens)])


@pytest.mark.parametrize("part", range(3))
def test_every_knob_equals_the_plain_search_on_90_random_models(part):
    changed = 0
    for seed in range(part * 30, part * 30 + 30):
        draw = random.Random(seed)
        stop = draw.choice([STOP, END])
        model = random_model(seed, likely=stop, strength=draw.choice([-4.0, 0.0, 2.0, 4.0]))
        prompt = draw.choice([[], [4], [4, 9, 4, 9]])
        knobs = {
            "no_repeat_ngram_size": draw.choice([0, 1, 2, 3]),
            "min_length": draw.choice([0, 0, 2, 5]),
            "length_penalty": draw.choice([1.0, 0.0, 0.6, 2.0, -0.5]),
            "text_prompt": " ".join(f"t{token}" for token in prompt) or None,
        }
        beams, entry_length = draw.choice([1, 3, 5]), draw.choice([5, 8])
        common = {"entry_length": entry_length, "stop_token": f"t{STOP}" if stop == STOP else None}
        common |= {"decoding": "greedy"} if beams == 1 else {"beam_size": beams, "num_captions": beams}
        pictures = embeddings(2, seed)
        found = generate(model, pictures, **common, **knobs, return_ended=True)
        plain = generate(model, pictures, **common)
        changed += [[one[0] for one in each] for each in found] != [[one[0] for one in each] for each in plain]
        for got, prefix in zip(found, prefixes(model, pictures)):
            rules = {"size": knobs["no_repeat_ngram_size"], "min_length": knobs["min_length"], "penalty": knobs["length_penalty"]}
            expected = plain_search(model, prefix, beams, entry_length, stop, **rules, prompt=prompt)
            assert [text for text, _, _ in got] == [text_of(tokens, prompt) for tokens, _ in expected]
            assert [score for _, score, _ in got] == pytest.approx([total / len(tokens) for tokens, total in expected], abs=1e-9)
            assert [ended for _, _, ended in got] == [tokens[-1] == stop for tokens, _ in expected]
    assert changed > 15, "the knobs hardly ever change a caption: the test shows less than it says"


def test_knobs_left_alone_change_nothing_and_pairs_stay_pairs():
    for decoding in ("beam", "greedy", "sample"):
        model = random_model(3, likely=STOP, strength=2.0)
        plain = generate(model, embeddings(3), decoding=decoding, seed=1, entry_length=8)
        knobs = {"no_repeat_ngram_size": 0, "length_penalty": 1.0, "min_length": 0, "text_prompt": "  "}
        assert generate(model, embeddings(3), decoding=decoding, seed=1, entry_length=8, **knobs) == plain
        assert {len(one) for image in plain for one in image} == {2}


def test_samples_obey_the_rules_too_and_their_scores_are_the_models_own():
    model = random_model(7, layers=2, likely=END, strength=3.0)
    prompt = [2, 5]
    options = {"decoding": "sample", "num_captions": 8, "entry_length": 12, "seed": 0}
    free = generate(model, embeddings(3), **options)
    assert any(repeats([int(word[1:]) for word in text.split()], 2) for one in free for text, _ in one), "nothing to forbid"
    found = generate(model, embeddings(3), **options, no_repeat_ngram_size=2, min_length=6, text_prompt="t2 t5", return_ended=True)
    for captions, prefix in zip(found, prefixes(model, embeddings(3))):
        for text, score, ended in captions:
            tokens = [int(word[1:]) for word in text.split()]
            assert tokens[:2] == prompt
            assert not repeats(tokens, 2)
            assert 6 <= len(tokens) - 2 <= 12
            assert ended == (len(tokens) - 2 < 12)
            tokens += [END] * ended
            costs = [
                published.next_logits(model.gpt, prefix, [tokens[:place]]).log_softmax(dim=-1)[0, tokens[place]].item()
                for place in range(2, len(tokens))
            ]
            assert score == pytest.approx(sum(costs) / len(costs), abs=1e-9)


def test_a_greater_length_penalty_never_gives_shorter_best_captions_on_the_whole():
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        total = 0
        for seed in range(10):
            model = random_model(seed, likely=STOP, strength=2.0)
            found = generate(model, embeddings(3, seed), entry_length=10, stop_token=f"t{STOP}", length_penalty=penalty)
            total += sum(len(one[0][0].split()) for one in found)
        lengths.append(total)
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.lists(st.integers(0, 5), max_size=9),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_what_is_forbidden_is_what_the_rules_say(prompt, before, size, min_length):
    rules = Constraints(size, min_length, 5, prompt)
    found = rules.forbidden(torch.zeros(1, 6), torch.tensor([before]) if before else None)
    expected = [not allowed(before, token, prompt, size, min_length, 5) for token in range(6)]
    if all(expected):
        expected[5] = False
    assert (found is None and not any(expected)) or found[0].tolist() == expected


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 1e-40}, {"temperature": 1e300}, {"temperature": float("nan")}, {"length_penalty": 1e6}, {"seed": 2**64},
     {"entry_length": 10**12, "min_length": 10**10}, {"num_captions": 10**9, "decoding": "sample"}, {"stop_token": "\ud800"},
     {"text_prompt": "a\udfff"}, {"no_repeat_ngram_size": -1},
     {"min_length": -1}, {"min_length": 9}, {"length_penalty": float("nan")}, {"text_prompt": "t1 " * 70}],
    ids=str,
)  # fmt: skip
def test_a_knob_that_cannot_be_is_the_users_error(knobs):
    with pytest.raises(UserError):
        generate(random_model(1), embeddings(1), **{"entry_length": 8, **knobs})


EXTREMES = [{"length_penalty": 23.0}, {"length_penalty": -100.0}, {"length_penalty": 100.0, "min_length": 7}, {"temperature": 1e-4},
            {"temperature": 1e4}, {"top_p": 1e-320}, {"no_repeat_ngram_size": 10**12}, {"seed": 2**63 - 1}, {"seed": -(2**63)}]  # fmt: skip


@pytest.mark.parametrize("decoding", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("knobs", EXTREMES, ids=str)
def test_extreme_numbers_give_finite_scores(decoding, knobs):
    model = random_model(4, likely=STOP, strength=2.0).float()
    found = generate(model, embeddings(3).float(), decoding, stop_token=f"t{STOP}", entry_length=40, **knobs)
    assert all(math.isfinite(score) for one in found for _, score in one)


def test_a_large_length_penalty_takes_the_longest_caption():
    model = random_model(4, likely=STOP, strength=2.0).float()
    found = generate(model, embeddings(3).float(), entry_length=60, stop_token=f"t{STOP}", length_penalty=60.0, return_ended=True)
    assert all(len(text.split()) == 60 and not ended for [(text, _, ended)] in found)
