"""Captions of similar images in the prompt: what is found equals a plain reference, and an image's own captions are never among them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import evaluate
import helpers
import predict
import tiny
import train
from evaluating import FAST, read
from features import neighbours
from features.datastore import Datastore, most_typical
from features.store import load_features, save_features
from models.checkpoints import load_checkpoint
from models.decoding import generate
from training.identity import find_differences

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "Similar images show {retrieved} This image shows "
WIDTH, IMAGES, K = 32, 9, 3


def words_of(row, number):
    return f"{tiny.CAPTIONS[row % 8].split('.')[0]} number {row} {number}"


def save_set(path, images=IMAGES, seed=0, first=0, captions=words_of, per_image=2, **meta):
    """Write a feature file of random embeddings; image 1000 + row has the captions of `captions`. Returns Features."""
    rows = [row for row in range(images) for _ in range(per_image)]
    texts = [{"image_id": 1000 + first + row, "caption": captions(first + row, number % per_image), "clip_embedding": row}
             for number, row in enumerate(rows)]  # fmt: skip
    embeddings = torch.randn(images, WIDTH, generator=torch.Generator().manual_seed(seed))
    save_features(path, embeddings, texts, {"encoder": "ViT-B/32", "normalized": False, **meta})
    return load_features(path)


def find_plainly(queries, store, count, own=None):
    """For each query the first captions, as sentences, of the images with the highest cosines, without those of its own id."""
    first = {}
    for caption in store.captions:
        first.setdefault(caption["clip_embedding"], caption)
    found = []
    for place, query in enumerate(queries.double()):
        cosines = [float(query @ known / query.norm() / known.norm()) for known in store.clip_embedding.double()]
        order = sorted(first, key=lambda row: -cosines[row])
        kept = [row for row in order if own is None or first[row]["image_id"] != own[place]][:count]
        found.append(" ".join(f"{first[row]['caption']}." for row in kept))
    return found


@pytest.fixture
def data(workdir):
    """train.pkl, val.pkl of other images, and other.pkl, a datastore of others still."""
    save_set("val.pkl", 4, seed=1, first=100)
    save_set("other.pkl", 6, seed=2, first=200, captions=lambda row, number: f"Zebra {row} {number}")
    return save_set("train.pkl")


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """As everywhere, but with room for the captions in a prompt."""
    return tiny.save_gpt2(tmp_path_factory.mktemp("roomy") / "gpt2", positions=512)


def run(tiny_gpt2, *more, code=0):
    helpers.train_tiny(tiny_gpt2, "--prompt", PROMPT, "--retrieved_captions", K, *more, code=code)


@pytest.mark.parametrize("with_faiss", [False, True])
def test_captions_are_those_of_the_nearest_images_without_the_images_own(data, monkeypatch, with_faiss):
    if with_faiss:
        monkeypatch.setattr(neighbours, "FAISS_FROM", 5)
        monkeypatch.setattr(neighbours, "FAISS_ROWS", 4)
        monkeypatch.setattr(neighbours, "_find_with_torch", None)
    own, store = [1000 + row for row in range(IMAGES)], Datastore(data, "train.pkl", K)
    expected = find_plainly(data.clip_embedding, data, K, own)
    assert store.retrieve(data.clip_embedding, own) == expected
    assert store.retrieve(data.clip_embedding) == find_plainly(data.clip_embedding, data, K) != expected
    queries = load_features("val.pkl").clip_embedding
    assert store.retrieve(queries, [str(100), "000000001003.jpg", 1001, "x"]) == find_plainly(queries, data, K, [None, 1003, 1001, None])


def test_all_rows_of_an_image_are_left_out_and_its_neighbours_fill_the_prompt(data):
    """As in a datastore of texts, which has a row for each caption."""
    captions = [{**caption, "clip_embedding": row} for row, caption in enumerate(data.captions)]
    save_features("texts.pkl", data.clip_embedding[data.caption_rows] + 0.01 * torch.randn(len(captions), WIDTH), captions, data.meta)
    texts, own = load_features("texts.pkl"), [1000 + row for row in range(IMAGES)]
    assert Datastore(texts, "texts.pkl", 7).retrieve(data.clip_embedding, own) == find_plainly(data.clip_embedding, texts, 7, own)


def test_the_caption_shown_of_an_image_has_most_words_in_common_with_its_others():
    assert most_typical(["blurred", "A red dog runs.", "the red dog, running", "red dog"]) == "red dog"
    assert most_typical(["b a", "a b", "c"]) == "b a" and most_typical(["x"]) == "x"


def prompts_of(monkeypatch):
    """Catch the filled prompts of every training data set that is tokenized."""
    from features import tokens

    seen, real = [], tokens.tokenize_prompted
    monkeypatch.setattr(tokens, "tokenize_prompted", lambda texts, prompts, *more: seen.append(prompts) or real(texts, prompts, *more))
    return seen


def test_no_caption_of_an_image_stands_in_its_own_prompt_in_training(data, tiny_gpt2, monkeypatch):
    seen = prompts_of(monkeypatch)
    run(tiny_gpt2, "--val_data", "val.pkl", "--max_steps", 1)
    val = load_features("val.pkl")
    for prompts, some in zip(seen, (data, val), strict=True):
        own = [some.captions[2 * row]["image_id"] for row in range(len(prompts))]
        found = find_plainly(some.clip_embedding, data, K, own)
        assert prompts == [f"Similar images show {texts} This image shows " for texts in found]
        for caption in some.captions:
            assert caption["caption"] not in prompts[caption["clip_embedding"]]
    run(tiny_gpt2, "--datastore", "other.pkl", "train.pkl", "--max_steps", 1, "--prefix", "joined")
    assert all(caption["caption"] not in seen[-1][caption["clip_embedding"]] for caption in data.captions)
    assert "Zebra" in "".join(seen[-1])


def test_a_checkpoint_knows_its_datastore_and_takes_another_without_training(data, tiny_gpt2, workdir, monkeypatch):
    run(tiny_gpt2, "--val_data", "val.pkl", "--epochs", 1)
    recorded = json.loads((workdir / "out/coco_prefix.json").read_text())["model"]["retrieval"]
    assert recorded == {"captions": K, "datastore": ["train.pkl"], "digest": data.digest()}
    model, val, shown = load_checkpoint("out/coco_prefix-000.pt"), load_features("val.pkl"), []
    retrieve = Datastore.retrieve
    monkeypatch.setattr(Datastore, "retrieve", lambda store, *more: shown.append(retrieve(store, *more)) or shown[-1])
    words = ["-C", "out/coco_prefix-000.pt", "--data", "val.pkl", "--device", "cpu", "--entry_length", 8, "--decoding", "greedy"]
    for store, more in (("train.pkl", []), ("other.pkl", ["--datastore", "other.pkl"])):
        helpers.call(predict.main, [*words, *more, "--out", "predicted.json"])
        helpers.call(evaluate.main, [*words, *more, *FAST, "--out", "scores.json"])
        expected = find_plainly(val.clip_embedding, load_features(store), K)
        assert shown[-2:] == [expected, expected]
        model.datastore = Datastore(load_features(store), store, K)
        texts = [found[0][0] for found in generate(model, val.clip_embedding, "greedy", entry_length=8)]
        with monkeypatch.context() as one_by_one:
            one_by_one.setattr("models.prompts.MOST_TOGETHER", 1)
            assert texts == [found[0][0] for found in generate(model, val.clip_embedding, "greedy", entry_length=8)]
        del shown[-2:]
        for name in ("predicted.json", "scores.predictions.json"):
            assert [row["caption"] for row in read(workdir / name)] == texts
    helpers.call(predict.main, [*words[:3], "train.pkl", *words[4:], "--rerank", "consensus", "--decoding", "beam", "--out", "own.json"])
    assert shown[-1] == find_plainly(data.clip_embedding, data, K, [1000 + row for row in range(IMAGES)])


def test_a_resumed_run_may_move_its_datastore_but_not_change_it(data, tiny_gpt2, workdir):
    run(tiny_gpt2, "--datastore", "other.pkl", "--max_steps", 1)
    (workdir / "other.pkl").rename("moved.pkl")
    run(tiny_gpt2, "--datastore", "moved.pkl", "--max_steps", 2, "--resume")
    save_set("moved.pkl", 6, seed=3)
    run(tiny_gpt2, "--datastore", "moved.pkl", "--max_steps", 3, "--resume", code=2)
    model = dataclasses.asdict(load_checkpoint("out/coco_prefix-000.pt").config)
    other = model | {"retrieval": {**model["retrieval"], "captions": K + 1}}
    assert list(find_differences({"model": model}, {"model": other})) == ["retrieval"]


def test_base_captions_and_retrieved_ones_stand_in_one_prompt(data, tiny_gpt2):
    from models.captioner import fill_prompt

    assert fill_prompt("{base}|{retrieved}|{base}", " {retrieved} ", "{base}") == "{retrieved}|{base}|{retrieved}"
    helpers.train_tiny(tiny_gpt2, "--max_steps", 1, "--prefix", "base")
    more = ["--prompt", "{base} Others show {retrieved} So: ", "--base_checkpoint", "out/base-000.pt", "--max_steps", 1]
    helpers.train_tiny(tiny_gpt2, *more)
    words = ["-C", "out/coco_prefix-000.pt", "--data", "val.pkl", "--device", "cpu", "--entry_length", 4, "--decoding", "greedy"]
    helpers.call(predict.main, words)


def test_mistakes_give_one_line(data, tiny_gpt2, workdir, capsys):
    run(tiny_gpt2, "--max_steps", 1)
    helpers.train_tiny(tiny_gpt2, "--max_steps", 1, "--prefix", "plain")
    save_set("few.pkl", 2)
    save_set("three.pkl", 3)
    save_set("blank.pkl", captions=lambda row, number: " ")
    save_set("rn.pkl", encoder="RN50x4")
    save_features("wide.pkl", torch.randn(9, 16), data.captions, {"encoder": "RN50"})
    save_features("empty.pkl", torch.zeros(0, WIDTH), [], {"encoder": "ViT-B/32"})
    save_features("captionless.pkl", torch.randn(4, WIDTH), [], {"encoder": "ViT-B/32"})
    stores = {
        "few.pkl": "few.pkl holds 2 images with captions; a prompt shows captions of 3",
        "blank.pkl": "blank.pkl holds 0 images with captions",
        "rn.pkl": "rn.pkl holds embeddings of RN50x4", "wide.pkl": "wide.pkl holds 16-wide embeddings", "empty.pkl": "holds no caption",
        "captionless.pkl": "captionless.pkl holds no caption", "no.pkl": "no feature file no.pkl", "https://x.org/a.pkl": "URL",
    }  # fmt: skip
    training = ["--data", "train.pkl", "--out_dir", "out", "--prefix", "bad", "--gpt2_type", tiny_gpt2, "--device", "cpu"]
    captioning = ["--data", "val.pkl", "--device", "cpu", "-C"]
    for store, message in stores.items():
        if "URL" not in message:
            more = ["--prompt", PROMPT, "--retrieved_captions", K, "--datastore", store]
            assert message in helpers.error_line(train.main, capsys, [*training, *more])
        for script in (predict, evaluate):
            found = helpers.error_line(script.main, capsys, [*captioning, "out/coco_prefix-000.pt", "--datastore", store])
            assert message in found, (script, found)
    assert "three.pkl holds 2 images with captions besides the one" in helpers.error_line(
        train.main, capsys, [*training, "--prompt", PROMPT, "--retrieved_captions", K, "--datastore", "three.pkl"]
    )
    for more, message in (
        (["--datastore", "other.pkl"], "no {retrieved} in --prompt"), (["--retrieved_captions", 3], "no {retrieved} in --prompt"),
        (["--prompt", PROMPT, "--retrieved_captions", 0], "--retrieved_captions is 0"),
    ):  # fmt: skip
        assert message in helpers.error_line(train.main, capsys, [*training, *more])
    found = helpers.error_line(predict.main, capsys, [*captioning, "out/plain-000.pt", "--datastore", "other.pkl"])
    assert "the prompt of out/plain-000.pt shows no captions of similar images" in found
    (workdir / "train.pkl").unlink()
    assert "which is not here" in helpers.error_line(predict.main, capsys, [*captioning, "out/coco_prefix-000.pt"])
    model = load_checkpoint("out/coco_prefix-000.pt")
    with pytest.raises(ValueError, match="no datastore"):
        generate(model, torch.randn(1, WIDTH))
    assert not list(workdir.glob("out/bad*"))


def test_a_feature_directory_is_a_datastore_too(data, tiny_gpt2):
    save_features("folder", data.clip_embedding, data.captions, data.meta)
    mapped = load_features("folder")
    own = [1000 + row for row in range(IMAGES)]
    assert Datastore(mapped, "folder", K).retrieve(mapped.clip_embedding, own) == find_plainly(data.clip_embedding, data, K, own)
    assert np.array_equal(Datastore(mapped, "folder", K).keys, Datastore(data, "train.pkl", K).keys)
