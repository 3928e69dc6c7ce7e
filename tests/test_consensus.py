"""Captions chosen by agreement: each similarity equals a plain reference, and the order is that of its means."""

import collections
import json
import math
import random

import pytest
import torch

import evaluate
import predict
import tiny
from evaluating import FAST, read
from evaluation.metrics import score_cider
from features.store import load_features, save_features
from helpers import captioner, error_line
from models.checkpoints import save_checkpoint
from prediction.consensus import FEWEST_DOCUMENTS, order_by_agreement, rerank_by_agreement
from prediction.ngrams import compare_chrf, compare_cider, count_documents, tokenize_plain

pytestmark = pytest.mark.usefixtures("one_thread")
SOUND = {"sample_rate": 44100, "spectrogram": "mel", "windows": {"columns": 128, "hop": 64}}
WORDS = "a a a the dog cat red runs on grass . ! two St. it's".split()


def draw_captions(draw, count, most=9):
    return [" ".join(draw.choices(WORDS, k=draw.randrange(most))) for _ in range(count)]


def ngrams(items, size):
    return collections.Counter(tuple(items[start : start + size]) for start in range(len(items) - size + 1))


def plain_frequencies(documents):
    found = collections.Counter()
    for document in documents:
        found.update({gram for text in tokenize_plain(document) for size in range(1, 5) for gram in ngrams(text.split(), size)})
    return found


def plain_cider(candidate, reference, documents, frequencies=None):
    """CIDEr-D as section 6 of arXiv:1411.5726 and pycocoevalcap have it, for one reference."""
    frequencies, total = frequencies or plain_frequencies(documents), 0
    candidate, reference = (text.split() for text in tokenize_plain([candidate, reference]))
    for size in range(1, 5):
        ours, theirs = (
            {gram: count * (math.log(len(documents)) - math.log(max(1, frequencies[gram]))) for gram, count in ngrams(words, size).items()}
            for words in (candidate, reference)
        )
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in (ours, theirs)]
        matched = sum(min(value, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, value in ours.items())
        total += matched / (norms[0] * norms[1]) if all(norms) else 0
    difference = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
    return 10 * total / 4 * math.exp(-(difference**2) / 72)


def plain_chrf(candidate, reference):
    """chrF of Popović 2015 with beta 2 over character 1- to 6-grams, spaces left out."""
    precisions, recalls = [], []
    for size in range(1, 7):
        ours, theirs = (ngrams(text.replace(" ", ""), size) for text in (candidate, reference))
        if ours and theirs:
            matched = (ours & theirs).total()
            precisions.append(matched / ours.total())
            recalls.append(matched / theirs.total())
    precision, recall = (sum(values) / len(values) if values else 0 for values in (precisions, recalls))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0


@pytest.mark.parametrize("seed", range(3))
def test_cider_and_chrf_between_captions_equal_plain_references(seed):
    draw = random.Random(seed)
    texts = [*draw_captions(draw, 8), "", "the the the the the the the", "Dogs\tRUN café 狗"]
    documents = [draw_captions(draw, draw.randrange(1, 4)) for _ in range(20)]
    cider, chrf = compare_cider(texts, count_documents(documents)), compare_chrf(texts)
    for row, candidate in enumerate(texts):
        for column, reference in enumerate(texts):
            assert cider[row, column] == pytest.approx(plain_cider(candidate, reference, documents), abs=1e-9)
            assert chrf[row, column] == pytest.approx(plain_chrf(candidate.replace("\t", " "), reference.replace("\t", " ")), abs=1e-9)


def test_cider_between_captions_is_that_of_the_scores():
    draw = random.Random(5)
    candidates, references = (tokenize_plain([f"dog {text}" for text in draw_captions(draw, 30)]) for _ in range(2))
    expected = score_cider(candidates, [[one] for one in references]).per_image
    frequencies = count_documents([[one] for one in references])
    found = [compare_cider([ours, theirs], frequencies)[0, 1] for ours, theirs in zip(candidates, references)]
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


def test_document_frequencies_do_not_depend_on_how_documents_are_cut_into_blocks(monkeypatch):
    draw = random.Random(6)
    documents = [draw_captions(draw, draw.randrange(4)) for _ in range(50)]
    whole = count_documents(documents)
    monkeypatch.setattr("prediction.ngrams.BLOCK", 7)
    cut = count_documents(iter(documents))
    assert whole.documents == cut.documents == 50
    assert (whole.keys == cut.keys).all() and (whole.counts == cut.counts).all()
    assert sorted(whole.counts.tolist()) == sorted(plain_frequencies(documents).values())


def choose_plainly(texts, similarity):
    """The caption with the highest mean similarity to the others; of equal ones the first."""
    means = [sum(similarity(one, other) for j, other in enumerate(texts) if j != i) / (len(texts) - 1) for i, one in enumerate(texts)]
    return min(range(len(texts)), key=lambda place: (-round(means[place], 9), place))


def test_the_chosen_caption_is_that_of_a_plain_reference_for_each_utility():
    draw = random.Random(7)
    pools = [draw_captions(draw, 5) for _ in range(FEWEST_DOCUMENTS)]
    captions = [[(text, -float(rank), True) for rank, text in enumerate(pool)] for pool in pools]
    training = [draw_captions(draw, 2) for _ in range(30)]

    def chosen(images, documents, similarity):
        found = rerank_by_agreement(captions[:images], 1, count_documents(documents) if documents else None)
        expected = [choose_plainly(pool, similarity) for pool in pools[:12]]
        assert [of_image[0] for of_image in found[:12]] == [captions[image][place] for image, place in enumerate(expected)]
        return expected

    ways = [
        chosen(FEWEST_DOCUMENTS, training, lambda one, other: plain_cider(one, other, training)),
        chosen(FEWEST_DOCUMENTS, None, lambda one, other: plain_cider(one, other, pools)),
        chosen(FEWEST_DOCUMENTS - 1, None, plain_chrf),
    ]
    assert ways[0] != ways[2] and any(place for way in ways for place in way)


def test_a_caption_that_occurs_twice_counts_twice_and_equal_ones_keep_their_order():
    assert order_by_agreement(["a dog", "two cats", "two cats"]) == [1, 2, 0]
    assert order_by_agreement(["x", "y", "z"]) == [0, 1, 2]
    assert order_by_agreement(["", ""]) == [0, 1] and order_by_agreement(["a dog"]) == [0]


def words_for(mini_demo, *more):
    words = ["-C", mini_demo / "checkpoints/demo-003.pt", "--data", mini_demo / "heldout.pkl", "--device", "cpu", "--entry_length", "30"]
    return [str(word) for word in (*words, *more)]


@pytest.mark.parametrize("decoding", ["beam", "sample"])
def test_predict_puts_the_caption_first_that_is_most_like_the_others(mini_demo, workdir, decoding):
    words = words_for(mini_demo, "--decoding", decoding, "--num_captions", "5")
    assert predict.main([*words, "--out", "plain.jsonl"]) == 0
    assert predict.main([*words, "--rerank", "consensus", "--out", "chosen.jsonl"]) == 0
    plain, chosen = (
        [json.loads(line) for line in (workdir / name).read_text(encoding="utf-8").splitlines()] for name in ("plain.jsonl", "chosen.jsonl")
    )
    for start in range(0, len(plain), 5):
        before, after = ([(row["caption"], row["score"]) for row in rows[start : start + 5]] for rows in (plain, chosen))
        assert sorted(before) == sorted(after)
        assert after[0] == before[choose_plainly([text for text, _ in before], plain_chrf)]


@pytest.fixture
def sounds(tiny_gpt2, workdir):
    """A checkpoint of random weights over sounds, model.pt, and features of three sounds, sounds.pkl."""
    save_checkpoint(captioner(tiny_gpt2, audio=SOUND), "model.pt")
    captions = [{"image_id": f"{row}.wav", "caption": tiny.CAPTIONS[row], "clip_embedding": row} for row in range(3)]
    save_features("sounds.pkl", torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), captions, {"audio": SOUND})
    return ["-C", "model.pt", "--data", "sounds.pkl", "--device", "cpu", "--entry_length", "6"]


def test_consensus_needs_no_encoder_and_chooses_for_sounds_too(sounds, workdir, capsys):
    assert predict.main([*sounds, "--rerank", "consensus", "--out", "captions.json"]) == 0
    assert len(read(workdir / "captions.json")) == 3
    assert evaluate.main([*sounds, "--rerank", "consensus", *FAST]) == 0


def test_wrong_uses_of_rerank_give_one_line(sounds, capsys):
    predictions = ["--predictions", "sounds.json", "--data", "sounds.pkl"]
    for script, words, expected in (
        (predict, [*sounds, "--decoding", "greedy"], "beam or sample"), (evaluate, [*sounds, "--decoding", "greedy"], "beam or sample"),
        (predict, [*sounds, "--beam_size", "1"], "give --beam_size 5"), (evaluate, [*sounds, "--num_captions", "501"], "at most 500"),
        (predict, [*sounds, "--rerank_weight", "1"], "--rerank_weight weighs"),
        (evaluate, predictions, "--rerank chooses while captions are decoded"),
    ):  # fmt: skip
        assert expected in error_line(script.main, capsys, [*words, "--rerank", "consensus"])
    for script in (predict, evaluate):
        assert "invalid choice: 'agreement'" in error_line(script.main, capsys, [*sounds, "--rerank", "agreement"])


def test_evaluate_chooses_with_the_document_frequencies_of_the_training_set(mini_demo, workdir):
    words = words_for(mini_demo, "--metrics", "bleu", "--bootstrap", "0", "--num_captions", "5", "--beam_size", "5")
    words += ["--train_data", str(mini_demo / "train.pkl")]
    assert evaluate.main([*words, "--out", "plain.json"]) == 0
    assert evaluate.main([*words, "--rerank", "consensus", "--out", "chosen.json"]) == 0
    documents = {}
    for caption in load_features(mini_demo / "train.pkl").captions:
        documents.setdefault(caption["image_id"], []).append(caption["caption"])
    documents, rows = list(documents.values()), read(workdir / "chosen.predictions.json")
    for before, after in list(zip(read(workdir / "plain.predictions.json"), rows))[:3]:
        pool = before["captions"]
        assert after["caption"] == pool[choose_plainly(pool, lambda one, other: plain_cider(one, other, documents))]
    assert all(isinstance(row["ended"], bool) and row["score"] < 0 for row in rows)
