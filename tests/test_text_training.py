"""Training on texts alone: noise, offset and memory equal plain references; a checkpoint knows how it was trained."""

import json
import math

import numpy as np
import pytest
import torch

import check
import evaluate
import helpers
import parse_text
import predict
import tiny
import tiny_towers
import train
from evaluating import FAST, read
from features.store import load_features, save_features
from models.checkpoints import load_checkpoint
from models.decoding import generate
from models.encoders.text import load_text_tower
from models.texts import add_noise, project_onto_memory, to_text_space

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [f"{text} {number}" for number, text in enumerate(tiny_towers.TEXTS * 4)]
J = 24  # shared width of the towers in tiny_towers


def unit(vector):
    vector = np.asarray(vector, np.float64)
    return vector / math.sqrt(float((vector**2).sum()))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A folder with a CLIP whose picture embeddings stand before the projection, a CLAP, pictures' features, and a language model."""
    folder = tmp_path_factory.mktemp("towers")
    tiny_towers.save_hf_clip(folder / "clip")
    tiny_towers.save_clap(folder / "clap")
    tiny.save_gpt2(folder / "gpt2")
    return folder


@pytest.fixture
def data(towers, workdir):
    """texts.pkl of the CLIP's text tower; pictures.pkl as its encoder would give them (32 wide, not normalised)."""
    for name in ("clip", "clap", "gpt2"):
        (workdir / name).symlink_to(towers / name)
    (workdir / "captions.txt").write_text("\n".join([*TEXTS, "", " "]))
    helpers.call(parse_text.main, ["captions.txt", "--clip_model_type", "hf:clip", "--out", "texts.pkl", "--device", "cpu"])
    captions = [{"image_id": row, "caption": TEXTS[row], "clip_embedding": row} for row in range(5)]
    save_features("pictures.pkl", 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(4)), captions, {"encoder": "hf:clip"})
    return workdir


def run(*more, code=0):
    helpers.train_tiny("gpt2", "--data", "texts.pkl", "--max_steps", 3, *more, code=code)


CAPTION = ["-C", "out/coco_prefix-000.pt", "--data", "pictures.pkl", "--device", "cpu", "--entry_length", "6", "--decoding", "greedy"]


def test_noise_equals_a_plain_reference_and_has_the_variance_that_was_asked_for():
    embedding = 7 * torch.randn(50, 640, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    found = add_noise(embedding, 0.016)
    torch.manual_seed(2)
    noise = torch.randn(50, 640)
    for one, drawn, noisy in zip(embedding.numpy(), noise.numpy(), found.numpy()):
        assert np.allclose(noisy, unit(unit(one) + math.sqrt(0.016) * drawn), atol=1e-6)
    # Of unit vectors with independent noise of variance v on each of D coordinates, the cosine with the clean one is 1 / sqrt(1 + v D).
    cosines = (found * torch.nn.functional.normalize(embedding, dim=-1)).sum(-1)
    assert float(cosines.mean()) == pytest.approx(1 / math.sqrt(1 + 0.016 * 640), abs=0.02)
    assert torch.allclose(add_noise(embedding, 0), torch.nn.functional.normalize(embedding, dim=-1))


def test_the_projection_onto_a_memory_equals_a_plain_reference():
    draw = torch.Generator().manual_seed(3)
    queries, memory = (torch.nn.functional.normalize(torch.randn(n, 9, generator=draw), dim=-1) for n in (4, 30))
    for query, found in zip(queries.numpy(), project_onto_memory(queries, memory).numpy()):
        weights = [math.exp(float(query @ text) / 0.01) for text in memory.numpy().astype(np.float64)]
        mean = sum(weight / sum(weights) * text for weight, text in zip(weights, memory.numpy()))
        assert np.allclose(found, unit(mean), atol=1e-4)


def test_parse_text_writes_a_row_per_caption_of_the_text_tower(data, capsys):
    features = load_features("texts.pkl")
    assert features.texts == TEXTS
    assert features.caption_rows.tolist() == list(range(len(TEXTS)))
    assert torch.allclose(features.clip_embedding, load_text_tower("hf:clip").encode_text(TEXTS), atol=1e-6)
    assert check.main(["texts.pkl"]) == 0
    assert "embeddings of the captions themselves" in capsys.readouterr().out
    facts = {"encoder": "hf:clip", "modality": "text", "normalized": True, "picture_width": 32, "source": "captions.txt"}
    assert {name: features.meta[name] for name in facts} == facts


@pytest.mark.parametrize("name, content, expected", [
    ("a.csv", 'text\n"one, two"\nthree\n', ["one, two", "three"]),
    ("b.csv", "file_name,caption\n1.jpg,one\n2.jpg,two\n", ["one", "two"]),
    ("c.json", '["one", "two"]', ["one", "two"]),
    ("d.json", json.dumps([{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}]), ["one", "two"]),
    ("h.jsonl", '{"text": "one"}\n{"text": ["two", "three"]}\n', ["one", "two", "three"]),
    ("e.txt", "image,caption\n1.jpg,one, two\n", ["one, two"]),
    ("f.txt", "one\r\ntwo, three\n", ["one", "two, three"]),
    ("g.json", json.dumps({"dataset": "x", "images": [
        {"filename": f"{split}.jpg", "imgid": number, "split": split, "sentences": [{"raw": split}]}
        for number, split in enumerate(("train", "test", "restval"))
    ]}), ["train", "restval"]),
])  # fmt: skip
def test_captions_are_read_from_any_form_without_held_out_splits(workdir, name, content, expected):
    (workdir / name).write_bytes(content.encode())
    found = parse_text.read_captions(name)
    assert [text for _, text in found] == expected
    assert len({image_id for image_id, _ in found}) == (1 if name == "d.json" else len(expected))


def test_training_sees_noisy_texts_and_captioning_pictures_in_their_space(data, monkeypatch):
    run("--noise_variance", 0.02, "--modality_offset", "pictures.pkl", "--val_data", "pictures.pkl")
    model = load_checkpoint("out/coco_prefix-000.pt")
    settings, tower = model.config.text_training, load_text_tower("hf:clip")
    pictures, texts = load_features("pictures.pkl").clip_embedding, load_features("texts.pkl").clip_embedding
    shared = np.array([unit(row) for row in tower.project(pictures).numpy()])
    offset = shared.mean(0) - texts.double().numpy().mean(0)
    assert settings["noise_variance"] == 0.02 and settings["picture_width"] == 32
    assert np.allclose(settings["modality_offset"], offset, atol=1e-6)
    expected = np.array([unit(row - offset) for row in shared])
    assert np.allclose(to_text_space(model, pictures).numpy(), expected, atol=1e-5)

    seen = []
    monkeypatch.setattr(model.clip_project, "forward", lambda given, real=model.clip_project.forward: seen.append(given) or real(given))
    torch.manual_seed(5)
    with torch.no_grad():
        model.train().encode_prefix(texts)
        generate(model, pictures, "greedy", entry_length=2)
    torch.manual_seed(5)
    assert torch.allclose(seen[0], add_noise(texts, 0.02), atol=1e-6)
    assert np.allclose(seen[1].numpy(), expected, atol=1e-5)


def test_predict_and_evaluate_need_nothing_told_twice_and_take_a_memory(data):
    run("--noise_variance", 0)
    model, pictures = load_checkpoint("out/coco_prefix-000.pt"), load_features("pictures.pkl").clip_embedding
    assert model.config.text_training["noise_variance"] == 0 and model.config.normalize_prefix
    for more in ([], ["--memory", "texts.pkl"]):
        helpers.call(predict.main, [*CAPTION, *more, "--out", "predicted.json"])
        helpers.call(evaluate.main, [*CAPTION, *more, *FAST, "--out", "scores.json"])
        model.memory = load_features("texts.pkl").clip_embedding if more else None
        texts = [found[0][0] for found in generate(model, pictures, "greedy", entry_length=6)]
        # Scale does not matter: embeddings are normalised here.
        assert texts == [found[0][0] for found in generate(model, 5 * pictures, "greedy", entry_length=6)]
        for name in ("predicted.json", "scores.predictions.json"):
            assert [row["caption"] for row in read(data / name)] == texts
    bridged = to_text_space(model, pictures)
    assert torch.allclose(bridged, project_onto_memory(torch.nn.functional.normalize(load_text_tower("hf:clip").project(pictures), dim=-1),
                                                       model.memory), atol=1e-6)  # fmt: skip


def test_noise_is_016_by_default_and_a_resumed_run_keeps_it(data):
    run()
    assert load_checkpoint("out/coco_prefix-000.pt").config.text_training["noise_variance"] == 0.016
    run("--noise_variance", 0.02, "--resume", code=2)
    run("--resume", "--max_steps", 4)


def test_texts_of_pictures_are_a_datastore_for_pictures_and_for_texts(data):
    prompt = ["--prompt", "Similar: {retrieved} So: ", "--retrieved_captions", 2]
    helpers.train_tiny("gpt2", "--data", "pictures.pkl", "--datastore", "texts.pkl", *prompt, "--max_steps", 1)
    helpers.call(predict.main, CAPTION)
    model, tower = load_checkpoint("out/coco_prefix-000.pt"), load_text_tower("hf:clip")
    from prediction.datastores import _attach_datastores

    _attach_datastores([model], ["model"], [])
    pictures, texts = load_features("pictures.pkl").clip_embedding, load_features("texts.pkl")
    cosines = tower.project(pictures) @ texts.clip_embedding.T
    for picture, found in enumerate(model.datastore.retrieve(pictures)):
        shown = [TEXTS.index(text) for text in found.removesuffix(".").split(". ")]
        assert cosines[picture, shown].tolist() == pytest.approx(cosines[picture].topk(2).values.tolist(), abs=1e-6)
    run("--prefix", "both", *prompt, "--val_data", "pictures.pkl")
    helpers.call(predict.main, ["-C", "out/both-000.pt", *CAPTION[2:]])


def test_claps_texts_train_a_captioner_of_sounds(data):
    import soundfile

    words = ["captions.txt", "--clip_model_type", "clap:clap", "--out", "heard.pkl", "--device", "cpu"]
    helpers.call(parse_text.main, words)
    features = load_features("heard.pkl")
    assert features.meta["audio"]["spectrogram"] == "waveform" and features.width == J
    helpers.train_tiny("gpt2", "--data", "heard.pkl", "--max_steps", 1)
    soundfile.write("tone.wav", np.sin(np.arange(8000) / 9), 8000)
    helpers.call(predict.main, [*CAPTION[:2], "--memory", "heard.pkl", "tone.wav", *CAPTION[4:], "--out", "said.json"])
    assert [row["image_id"] for row in read(data / "said.json")] == ["tone.wav"]


def test_mistakes_give_one_line(data, capsys):
    run()
    helpers.train_tiny("gpt2", "--data", "pictures.pkl", "--max_steps", 1, "--prefix", "paired")
    texts, pictures = load_features("texts.pkl"), load_features("pictures.pkl")
    save_features("long.pkl", 2 * texts.clip_embedding, texts.captions, texts.meta)
    save_features("foreign.pkl", texts.clip_embedding, texts.captions, {**texts.meta, "encoder": "hf:other"})
    save_features("wide.pkl", torch.nn.functional.normalize(torch.randn(12, 9), dim=-1), texts.captions, texts.meta)
    save_features("rn.pkl", pictures.clip_embedding, pictures.captions, {"encoder": "RN50"})
    save_features("zeros.pkl", 0 * pictures.clip_embedding, pictures.captions, pictures.meta)
    start = ["--out_dir", "bad", "--gpt2_type", "gpt2", "--device", "cpu", "--max_steps", "1", "--data"]
    for words, message in (
        (["long.pkl"], "long.pkl holds a text embedding 0 that is not normalised"),
        (["pictures.pkl", "--noise_variance", "0.1"], "--noise_variance is for training on texts"),
        (["pictures.pkl", "--modality_offset", "pictures.pkl"], "--modality_offset is for training on texts"),
        (["texts.pkl", "--noise_variance", "-1"], "--noise_variance is -1"),
        (["texts.pkl", "--modality_offset", "rn.pkl"], "rn.pkl holds embeddings of RN50"),
        (["texts.pkl", "--modality_offset", "texts.pkl"], "texts.pkl holds embeddings of texts"),
        (["texts.pkl", "--val_data", "rn.pkl"], "rn.pkl holds embeddings of RN50"),
        (["pictures.pkl", "--val_data", "texts.pkl"], "texts.pkl holds embeddings of texts"),
        (["texts.pkl", "--prompt", "{retrieved}", "--datastore", "pictures.pkl"], "pictures.pkl holds embeddings of pictures"),
    ):  # fmt: skip
        assert message in helpers.error_line(train.main, capsys, [*start, *words])
    assert not (data / "bad").exists()
    for words, message in (
        (["--memory", "long.pkl"], "long.pkl holds a text embedding 0 that is not normalised"),
        (["--memory", "foreign.pkl"], "foreign.pkl holds embeddings of hf:other"), (["--memory", "wide.pkl"], "wide.pkl holds 9-wide"),
        (["--memory", "pictures.pkl"], "pictures.pkl holds embeddings of pictures"),
        (["--data", "rn.pkl"], "rn.pkl holds embeddings of RN50"),
        (["--data", "texts.pkl"], "texts.pkl holds embeddings of texts"), (["--data", "zeros.pkl"], "zeros only"),
        (["-C", "out/paired-000.pt", "--memory", "texts.pkl"], "--memory is for captioners trained on texts"),
    ):  # fmt: skip
        for script in (predict, evaluate):
            given = [*CAPTION[2:], *words] if words[0] == "-C" else [*CAPTION, *words]
            assert message in helpers.error_line(script.main, capsys, given), words
    (data / "empty.txt").write_text("\n \n")
    (data / "bad.json").write_text('["a", 3]')
    (data / "cut.json").write_text('["a", ')
    (data / "bad.jsonl").write_text('{"caption": 3}')
    (data / "other.csv").write_text("one,two\na,b\n")
    for words, message in (
        (["empty.txt"], "empty.txt holds no caption"), (["no.txt"], "no captions no.txt"), (["bad.json"], "something else beside texts"),
        (["cut.json"], "cut.json is not JSON"), (["bad.jsonl"], "bad.jsonl has a caption that is"),
        (["other.csv"], "other.csv has no column caption or text"),
        (["captions.txt", "--clip_model_type", "tinyvit"], "tinyvit has no text tower"), (["captions.txt", "--out", "clip"], "clip"),
    ):  # fmt: skip
        assert message in helpers.error_line(parse_text.main, capsys, words)
