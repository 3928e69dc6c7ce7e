"""Decoding equals slow, plain references: one picture at a time, without a cache, in float64 so that ties do not flip."""

import copy
import random

import pytest
import torch

import tiny
from benchmarks import published
from common import UserError
from models.captioner import ClipCaptionModel
from models.config import CaptionConfig
from models.decoding import generate

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, CLIP_WIDTH, STOP = 23, 16, 6, 13
END = VOCABULARY - 1
TOKENIZER = tiny.word_tokenizer(VOCABULARY)
GPT = tiny.random_gpt2(VOCABULARY, WIDTH, layers=1, heads=2, positions=64)


def random_model(seed, layers=1, likely=None, strength=0.0):
    """A captioner of fresh random float64 weights; `likely` is a token that `strength` makes more probable everywhere."""
    gpt = copy.deepcopy(GPT) if layers == 1 else tiny.random_gpt2(VOCABULARY, WIDTH, layers=layers, heads=2, positions=64)
    config = CaptionConfig(encoder=None, clip_width=CLIP_WIDTH, prefix_length=1 + seed % 4, mapping_type="mlp")
    model = ClipCaptionModel(config, gpt, TOKENIZER).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.normal_(0.0, 0.6, generator=generator)
        if likely is not None:
            row = gpt.transformer.wte.weight[likely]
            gpt.transformer.ln_f.bias += strength * row / row.norm()
    return model


def embeddings(count, seed=0):
    return torch.randn(count, CLIP_WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def prefixes(model, clip_embedding):
    """The prefix of each picture, [1, P, E] each."""
    with torch.no_grad():
        return [model.clip_project(one[None]).view(1, -1, WIDTH) for one in clip_embedding]


def text_of(tokens):
    """What a caption's tokens should read as: an end-of-text token at the end is no text."""
    return TOKENIZER.decode(tokens[:-1] if tokens[-1] == END else tokens)


def assert_same(found, expected):
    """found: [(text, score)], expected: [(tokens, score)]."""
    assert [text for text, _ in found] == [text_of(tokens) for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-9)


@pytest.mark.parametrize("part", range(4))
def test_beam_search_equals_the_plain_one_on_200_random_models(part):
    stopped_early = never_stopped = 0
    for seed in range(part * 50, part * 50 + 50):
        draw = random.Random(seed)
        beam_size = 1 + seed % 8
        stop = draw.choice([STOP, END])
        strength = draw.choice([-8.0, 0.0, 2.0, 4.0])  # the stop token never, by chance, or very likely
        temperature = draw.choice([1.0, 1.0, 0.5, 1.7, 0.0, -1.0])
        entry_length = draw.choice([1, 2, 7, 12])
        model = random_model(seed, likely=stop, strength=strength)
        pictures = embeddings(2, seed)
        found = generate(
            model,
            pictures,
            beam_size=beam_size,
            num_captions=beam_size,
            entry_length=entry_length,
            temperature=temperature,
            stop_token=f"t{STOP}" if stop == STOP else None,
        )
        for got, prefix in zip(found, prefixes(model, pictures)):
            expected = published.beam_search(model.gpt, prefix, beam_size, entry_length, temperature, stop)
            assert_same(got, expected)
            stopped = sum(tokens[-1] == stop and len(tokens) < entry_length for tokens, _ in expected)
            stopped_early += stopped > 0
            never_stopped += stopped == 0
    assert stopped_early > 10, "the models are all of one kind: the test shows less than it says"
    assert never_stopped > 10, "the models are all of one kind: the test shows less than it says"


def test_beams_of_different_lengths_are_ranked_by_mean_log_probability():
    """Somewhere a beam that stopped early stands behind a longer one, and somewhere before it."""
    orders = set()
    for seed in range(20):
        model = random_model(seed, likely=STOP, strength=2.0)
        found = generate(model, embeddings(1, seed), beam_size=4, num_captions=4, entry_length=8, stop_token=f"t{STOP}")[0]
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        lengths = [len(text.split()) for text, _ in found]
        orders |= {(before > after) - (before < after) for before, after in zip(lengths, lengths[1:])}
    assert orders == {-1, 0, 1}


def test_beam_search_with_layers_and_the_published_length_equals_the_plain_one():
    for seed in (1000, 1001):
        model = random_model(seed, layers=3, likely=STOP, strength=-6.0)
        pictures = embeddings(1, seed)
        found = generate(model, pictures, beam_size=5, num_captions=5, stop_token=f"t{STOP}", entry_length=40)
        assert_same(found[0], published.beam_search(model.gpt, prefixes(model, pictures)[0], 5, 40, 1.0, STOP))


def test_greedy_equals_a_plain_greedy_and_a_beam_of_one():
    for seed in range(20):
        model = random_model(seed, likely=STOP, strength=random.Random(seed).choice([0.0, 2.0]))
        pictures = embeddings(3, seed)
        temperature = [1.0, 0.3, 2.0, 0.0][seed % 4]
        options = dict(entry_length=10, temperature=temperature, stop_token=f"t{STOP}")
        found = generate(model, pictures, decoding="greedy", **options)
        for got, prefix in zip(found, prefixes(model, pictures)):
            assert_same(got, [published.greedy_search(model.gpt, prefix, 10, temperature, STOP)])
        beam = generate(model, pictures, beam_size=1, **options)
        assert [[text for text, _ in one] for one in beam] == [[text for text, _ in one] for one in found]
        for got, same in zip(beam, found):
            assert got[0][1] == pytest.approx(same[0][1], abs=1e-9)


def test_a_temperature_of_zero_or_less_means_one():
    model = random_model(3)
    for decoding, extra in (("beam", {}), ("greedy", {}), ("sample", {"seed": 1})):
        expected = generate(model, embeddings(2), decoding=decoding, entry_length=6, temperature=1.0, **extra)
        for temperature in (0.0, -1.0):
            assert generate(model, embeddings(2), decoding=decoding, entry_length=6, temperature=temperature, **extra) == expected


def test_draws_do_not_depend_on_those_that_stop_beside_them():
    model = random_model(11, likely=STOP, strength=2.0)
    pictures = embeddings(5, seed=4)
    options = dict(decoding="sample", entry_length=12, num_captions=6, stop_token=f"t{STOP}")
    together = generate(model, pictures, seed=3, **options)
    lengths = {len(text.split()) for one in together for text, _ in one}
    assert len(lengths) > 5, "all stop together"
    for number in range(5):
        [alone] = generate(model, pictures[[number]], seed=3 + number, **options)
        assert [text for text, _ in alone] == [text for text, _ in together[number]]
        assert [score for _, score in alone] == pytest.approx([score for _, score in together[number]], abs=1e-9)


@pytest.mark.parametrize("decoding", ["beam", "greedy"])
def test_a_caption_does_not_depend_on_the_batch_around_it(decoding):
    model = random_model(11, likely=STOP, strength=2.0)
    pictures = embeddings(7, seed=4)
    options = dict(decoding=decoding, entry_length=10, stop_token=f"t{STOP}")
    together = generate(model, pictures, **options)
    assert len({text for one in together for text, _ in one}) > 1, "every picture has the same caption"
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = generate(model, pictures[order], **options)
    alone = [generate(model, pictures[[number]], **options)[0] for number in range(7)]
    for number in range(7):
        for other in (shuffled[order.index(number)], alone[number]):
            assert [text for text, _ in other] == [text for text, _ in together[number]]
            assert [score for _, score in other] == pytest.approx([score for _, score in together[number]], abs=1e-9)


@pytest.mark.parametrize("decoding", ["beam", "greedy", "sample"])
def test_the_cached_pass_gives_the_scores_of_one_full_forward(decoding):
    model = random_model(21, layers=2, likely=END, strength=-8.0)
    pictures = embeddings(3, seed=21)
    found = generate(model, pictures, decoding=decoding, beam_size=3, entry_length=9, seed=0)
    for one, prefix in zip(found, prefixes(model, pictures)):
        text, score = one[0]
        tokens = torch.tensor([[int(word[1:]) for word in text.split()]])
        assert tokens.shape == (1, 9)
        with torch.no_grad():
            logits = published.caption_logits(model.gpt, prefix, tokens, torch.ones_like(tokens, dtype=torch.bool))
        costs = logits.log_softmax(dim=-1).gather(2, tokens[..., None])
        assert score == pytest.approx(costs.mean().item(), abs=1e-9)


def test_samples_repeat_with_their_seed_and_differ_without():
    model = random_model(5)
    pictures = embeddings(4)
    options = dict(decoding="sample", entry_length=10, num_captions=3)
    first = generate(model, pictures, seed=1, **options)
    assert generate(model, pictures, seed=1, **options) == first
    assert generate(model, pictures, seed=2, **options) != first
    assert all(len({text for text, _ in one}) > 1 for one in first), "an image's samples are all the same"
    for one in first:
        scores = [score for _, score in one]
        assert scores == sorted(scores, reverse=True)


def test_sampling_leaves_torchs_own_random_numbers_alone():
    model = random_model(5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate(model, embeddings(2), decoding="sample", entry_length=4, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_two_samples_of_the_same_picture_in_one_batch_are_independent():
    model = random_model(5)
    found = generate(model, embeddings(1).expand(40, -1), decoding="sample", temperature=3.0, entry_length=6, seed=0)
    assert len({one[0][0] for one in found}) > 30


def test_a_tiny_nucleus_samples_what_greedy_takes():
    for seed in range(5):
        model = random_model(seed)
        pictures = embeddings(3, seed)
        greedy = generate(model, pictures, decoding="greedy", entry_length=8)
        sample = generate(model, pictures, decoding="sample", top_p=1e-6, entry_length=8, seed=seed)
        assert [one[0][0] for one in sample] == [one[0][0] for one in greedy]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.7, 1.0), (1.5, 0.7)])
def test_sampled_tokens_follow_the_models_distribution(temperature, top_p):
    model = random_model(8)
    with torch.no_grad():
        model.gpt.transformer.ln_f.weight *= 0.3  # flatter, so that many tokens have a chance
    picture = embeddings(1)
    draws = 4000
    found = generate(model, picture.expand(draws, -1), decoding="sample", entry_length=1, temperature=temperature, top_p=top_p, seed=0)
    counts = torch.zeros(VOCABULARY)
    for one in found:
        text = one[0][0]
        counts[int(text[1:]) if text else END] += 1
    probabilities = (published.next_logits(model.gpt, prefixes(model, picture)[0], [[]]) / temperature).softmax(dim=-1)[0]
    # The nucleus: the fewest tokens, likeliest first, whose probabilities reach top_p.
    kept, reached = torch.zeros(VOCABULARY, dtype=torch.bool), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if reached >= top_p:
            break
        kept[token] = True
        reached += probabilities[token].item()
    assert counts[~kept].sum() == 0
    expected = probabilities * kept / probabilities[kept].sum() * draws
    often = expected >= 5
    assert often.sum() >= 4
    chi_square = ((counts[often] - expected[often]) ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, f"chi-square {chi_square:.1f} at {freedom} degrees of freedom"


def test_n_best_captions_are_different_and_sorted_and_start_with_the_best():
    model = random_model(13, likely=STOP, strength=1.0)
    pictures = embeddings(3)
    every = generate(model, pictures, beam_size=6, num_captions=6, entry_length=8, stop_token=f"t{STOP}")
    for count in (1, 2, 6):
        some = generate(model, pictures, beam_size=6, num_captions=count, entry_length=8, stop_token=f"t{STOP}")
        assert [one[:count] for one in every] == some
    for one in every:
        assert len({text for text, _ in one}) == 6
        assert [score for _, score in one] == sorted((score for _, score in one), reverse=True)


def test_the_stop_token_is_the_checkpoints_own_unless_told_otherwise():
    model = random_model(17, likely=STOP, strength=4.0)
    model.config.stop_token = f"t{STOP}"
    text = generate(model, embeddings(1), decoding="greedy", entry_length=20)[0][0][0]
    assert text.split()[-1] == f"t{STOP}", "the stop token is part of the text unless it is the end of text"
    overridden = generate(model, embeddings(1), decoding="greedy", entry_length=20, stop_token="<|endoftext|>")[0][0][0]
    assert len(overridden.split()) > len(text.split())


def test_decoding_leaves_no_gradient_and_the_weights_as_they_were():
    model = random_model(1)
    before = copy.deepcopy(model.state_dict())
    generate(model, embeddings(2), entry_length=5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_picture_gives_no_caption():
    assert generate(random_model(1), embeddings(1)[:0]) == []


@pytest.mark.parametrize(
    "options",
    [
        {"decoding": "nucleus"},
        {"beam_size": 0},
        {"beam_size": VOCABULARY + 1},
        {"entry_length": 0},
        {"top_p": 0.0, "decoding": "sample"},
        {"top_p": 1.5, "decoding": "sample"},
        {"num_captions": 0},
        {"num_captions": 6, "beam_size": 5},
        {"num_captions": 2, "decoding": "greedy"},
        {"stop_token": "t1 t2"},
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_is_the_users_error(options):
    with pytest.raises(UserError):
        generate(random_model(1), embeddings(1), **options)
