"""The feature directory: the same features as in a .pkl, mapped; clip-retrieval's own layout; damaged parts are one line each."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import train
from common import UserError
from features import directory_writer
from features.store import drop_empty_captions, group_by_image, join_features, load_features, save_features

pytestmark = pytest.mark.usefixtures("one_thread")
META = {"encoder": "ViT-B/32", "normalized": False}
IDS = st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.text(max_size=4), st.just("\udc80.jpg"))
EXTRA = st.fixed_dictionaries({}, optional={"id": st.integers(), "file_name": st.text(max_size=4), "domain": st.none() | st.booleans()})


def save_clip_retrieval(folder, parts, captions=True, **columns):
    """Write arrays [n, D] as clip-retrieval does; a part's metadata has image_path and caption. → captions, part after part"""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    texts = []
    for number, array in enumerate(parts):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", array)
        mine = [f"text {number}.{row}" for row in range(len(array))]
        frame = pd.DataFrame({"image_path": [f"{number:05d}{row:04d}" for row in range(len(array))], **columns})
        if captions:
            frame["caption"] = mine
        frame.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
        texts += mine
    return texts


def unit_rows(rows, width=8, seed=0, dtype=np.float16):
    array = np.random.default_rng(seed).normal(size=(rows, width))
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(dtype)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(3,), (2, 3)]), part_rows=st.integers(1, 5))
def test_what_is_saved_in_a_directory_is_loaded_image_by_image(tmp_path_factory, data, shape, part_rows):
    images = data.draw(st.integers(1, 6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64, torch.bfloat16]))
    embedding = torch.randn(images, *shape).to(dtype)
    made = [{"image_id": data.draw(IDS), "caption": data.draw(st.text(max_size=9)), "clip_embedding": row, **data.draw(EXTRA)}
            for row in data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=9))]  # fmt: skip
    folder = tmp_path_factory.mktemp("directory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_writer, "PART_ROWS", part_rows)
        save_features(folder / "a", embedding, made, META)
    features = load_features(folder / "a")
    assert torch.equal(features.clip_embedding[:], embedding.float() if dtype == torch.bfloat16 else embedding)
    expected = sorted(made, key=lambda caption: caption["clip_embedding"])
    assert list(features.captions) == expected
    assert list(features.texts) == [caption["caption"] for caption in expected] == features.texts[:]
    assert list(features.image_ids()) == [caption["image_id"] for caption in expected]
    assert features.caption_rows.tolist() == [caption["clip_embedding"] for caption in expected]
    assert features.width == 3
    assert features.embeddings_per_image == (2 if len(shape) == 2 else 1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_mapped_rows_are_what_a_tensor_gives(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("rows")
    parts = [unit_rows(n, 4, seed) for seed, n in enumerate(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))]
    save_clip_retrieval(folder / "a", parts)
    whole, mapped = torch.from_numpy(np.concatenate(parts)), load_features(folder / "a").clip_embedding
    index = st.integers(-len(whole), len(whole) - 1)
    rows = data.draw(st.lists(index, max_size=6))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=6)))
    assert torch.equal(mapped[rows], whole[rows])
    assert torch.equal(mapped[torch.tensor(rows).long()], whole[rows])
    assert torch.equal(mapped.select(chosen)[:], whole[chosen])
    start, end = data.draw(index), data.draw(index)
    assert torch.equal(mapped[start:end], whole[start:end])
    assert torch.equal(mapped[start], whole[start])
    with pytest.raises(IndexError):
        mapped[len(whole)]


def test_what_clip_retrieval_writes_is_read_as_it_is(tmp_path):
    parts = [unit_rows(3, seed=0), unit_rows(2, seed=1)]
    texts = save_clip_retrieval(tmp_path / "ViT-B_32_cc", parts)
    features = load_features(tmp_path / "ViT-B_32_cc")
    assert torch.equal(features.clip_embedding[:], torch.from_numpy(np.concatenate(parts)))
    assert features.captions[:] == [
        {"image_id": f"{row // 3:05d}{row % 3:04d}", "caption": text, "clip_embedding": row} for row, text in enumerate(texts)
    ]
    assert features.meta == {"encoder": "ViT-B/32", "normalized": True}
    assert features.captions[-1]["caption"] == "text 1.1"
    assert isinstance(features.clip_embedding.parts[0], np.memmap)


def test_a_tool_that_reads_clip_retrieval_reads_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(directory_writer, "PART_ROWS", 1)
    made = [{"image_id": row, "file_name": f"{row}.jpg", "caption": f"{row} {n}", "id": 7, "clip_embedding": row}
            for row in range(12) for n in range(2)]  # fmt: skip
    save_features(tmp_path / "ours", torch.randn(12, 4), made, META)
    save_features(tmp_path / "again", load_features(tmp_path / "ours").clip_embedding, load_features(tmp_path / "ours").captions, META)
    files = sorted((tmp_path / "ours" / "img_emb").iterdir())
    assert [file.name for file in files[::11]] == ["img_emb_00.npy", "img_emb_11.npy"]
    frame = pd.read_parquet(tmp_path / "ours" / "metadata" / "metadata_03.parquet")
    assert (frame.image_path[0], frame.caption[0], list(frame.more_captions[0])) == ("3.jpg", "3 0", ["3 1"])
    array = np.load(files[3])
    assert array.shape == (1, 4)
    np.save(tmp_path / "numpy.npy", array)
    assert files[3].read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    for file in (tmp_path / "ours").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "ours")).read_bytes()


def test_an_image_listed_once_a_caption_shares_a_row_and_empty_captions_go(tmp_path):
    array = unit_rows(3)[[0, 0, 1, 2, 0]]
    save_clip_retrieval(tmp_path / "a", [array], captions=False, image_id=[1, 1, 1, 2, 1], caption=["a", "b", "c", " ", None])
    features = load_features(tmp_path / "a")
    assert [caption["caption"] for caption in features.captions] == ["a", "b", "c", " "]
    grouped = group_by_image(features)
    assert grouped.caption_rows.tolist() == [0, 0, 1, 2]
    assert torch.equal(grouped.clip_embedding[:], torch.from_numpy(array[[0, 2, 3]]))
    kept, dropped = drop_empty_captions(grouped)
    assert dropped == 1
    assert list(kept.texts) == ["a", "b", "c"]
    assert kept.captions[2]["clip_embedding"] == 1
    assert kept.texts[1] == "b"
    assert kept.texts[::-2] == ["c", "a"]
    assert kept.digest() != grouped.digest()


def test_files_and_directories_are_joined_in_any_order(tmp_path):
    embeddings = [torch.randn(n, 4) for n in (2, 3, 2)]
    made, names = [], ["a", "b.pkl", "c"]
    for name, embedding in zip(names, embeddings):
        captions = [{"image_id": f"{name}{row}", "caption": f"{name} {row}", "clip_embedding": row} for row in range(len(embedding))]
        save_features(tmp_path / name, embedding, captions, META)
        made += [{**caption, "clip_embedding": caption["clip_embedding"] + sum(map(len, embeddings[: names.index(name)]))}
                 for caption in captions]  # fmt: skip
    joined = join_features([load_features(tmp_path / name) for name in names], names)
    assert torch.equal(joined.clip_embedding[:], torch.cat(embeddings))
    assert list(joined.captions) == made
    assert list(joined.texts) == [caption["caption"] for caption in made]
    assert list(joined.image_ids()) == [caption["image_id"] for caption in made]
    assert torch.equal(joined.clip_embedding[[6, 0, 4]], torch.cat(embeddings)[[6, 0, 4]])


def test_normalised_and_unnormalised_features_do_not_go_together(tmp_path):
    save_clip_retrieval(tmp_path / "ViT-B_32_cc", [unit_rows(2)])
    save_features(tmp_path / "b.pkl", torch.randn(1, 8), [{"image_id": 1, "caption": "x", "clip_embedding": 0}], META)
    names = ["ViT-B_32_cc", "b.pkl"]
    with pytest.raises(UserError, match="unnormalised"):
        join_features([load_features(tmp_path / name) for name in names], names)


def test_the_digest_of_a_directory_sees_one_changed_number(tmp_path):
    save_clip_retrieval(tmp_path / "a", [unit_rows(40), unit_rows(40, seed=1)])
    before = load_features(tmp_path / "a").digest()
    assert load_features(tmp_path / "a").digest() == before
    array = np.load(tmp_path / "a" / "img_emb" / "img_emb_1.npy")
    array[20, 3] += 0.01
    np.save(tmp_path / "a" / "img_emb" / "img_emb_1.npy", array)
    assert load_features(tmp_path / "a").digest() != before


def test_training_from_a_directory_gives_the_losses_of_the_file(workdir, tiny_gpt2):
    tiny.save_published_features(workdir / "train.pkl", [[f"a dog number {i}", f"one dog {i}"] for i in range(9)], width=32)
    features = load_features(workdir / "train.pkl")
    save_features("folder", features.clip_embedding, features.captions, {"encoder": None, "normalized": False})
    losses = []
    for data in ("train.pkl", "folder"):
        words = f"--data {data} --val_data {data} --out_dir out_{data} --device cpu --mixed_precision no --prefix_length 4 --bs 5"
        words = [*words.split(), "--epochs", "2", "--warmup_steps", "2", "--lr", "1e-3", "--log_every", "1"]
        assert train.main([*words, "--gpt2_type", str(tiny_gpt2)]) == 0
        lines = map(json.loads, open(f"out_{data}/coco_prefix_metrics.jsonl"))
        losses.append([line.get("loss", line.get("val_loss")) for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_training_on_normalised_features_normalises_pictures_too(workdir, tiny_gpt2):
    save_clip_retrieval(workdir / "ViT-B_32_cc", [unit_rows(6, 32)])
    words = "--data ViT-B_32_cc --out_dir out --device cpu --mixed_precision no --prefix_length 4 --bs 3 --max_steps 1 --warmup_steps 1"
    assert train.main([*words.split(), "--gpt2_type", str(tiny_gpt2)]) == 0
    assert json.loads(open("out/coco_prefix.json").read())["model"]["normalize_prefix"] is True


def damage(folder, how):
    arrays, tables = folder / "img_emb", folder / "metadata"
    first = arrays / "img_emb_0.npy"
    if how == "no arrays":
        shutil.rmtree(arrays)
    elif how == "missing array":
        os.remove(arrays / "img_emb_1.npy")
    elif how == "missing table":
        os.remove(tables / "metadata_1.parquet")
    elif how == "fewer rows":
        np.save(first, np.load(first)[:-1])
    elif how == "whole numbers":
        np.save(first, np.ones((3, 8), np.int64))
    elif how == "flat":
        np.save(first, np.ones(3, np.float32))
    elif how == "objects":
        np.save(first, np.array([[Payload(folder / "was_run")]]), allow_pickle=True)
    elif how == "other width":
        np.save(first, unit_rows(3, 4))
    elif how == "NaN":
        np.save(arrays / "img_emb_1.npy", np.full((2, 8), np.nan, np.float32))
    elif how == "cut":
        first.write_bytes(first.read_bytes()[:-9])
    elif how == "cut table":
        (tables / "metadata_0.parquet").write_bytes((tables / "metadata_0.parquet").read_bytes()[:-9])
    elif how == "empty file":
        first.write_bytes(b"")
    elif how == "no captions column":
        pd.DataFrame({"image_path": ["a", "b", "c"]}).to_parquet(tables / "metadata_0.parquet")
    elif how == "captions of numbers":
        pd.DataFrame({"caption": [1, 2, 3]}).to_parquet(tables / "metadata_0.parquet")
    elif how == "meta of another":
        (folder / "meta.json").write_text('{"images": 6}')
    elif how == "meta damaged":
        (folder / "meta.json").write_text("{")


class Payload:
    """Pickles to a call that leaves a folder behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


DAMAGES = {
    "no arrays": "no img_emb/img_emb", "missing array": "no img_emb_1.npy", "missing table": "no metadata_1.parquet",
    "fewer rows": "has 3 rows, img_emb_0.npy 2", "whole numbers": "int64", "flat": "expected \\[n, D\\]", "objects": "holds object",
    "other width": "need one encoder", "NaN": "NaN or infinity in row 3", "cut": "cut short", "cut table": "cannot be read as parquet",
    "empty file": "cannot be read", "no captions column": "it has image_path", "captions of numbers": "captions of type int64",
    "meta of another": "meta.json says 6", "meta damaged": "is not JSON",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_directory_is_one_line(tmp_path, how):
    save_clip_retrieval(tmp_path / "a", [unit_rows(3), unit_rows(2, seed=1)])
    damage(tmp_path / "a", how)
    with pytest.raises(UserError, match=DAMAGES[how]) as caught:
        load_features(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)
    assert not (tmp_path / "a" / "was_run").exists()


def test_a_directory_is_whole_or_as_it_was(tmp_path):
    captions = [{"image_id": 1, "caption": "x", "clip_embedding": 0}]
    save_features(tmp_path / "a", torch.ones(1, 4), captions, META)
    with pytest.raises(UserError, match="valid Unicode"):
        save_features(tmp_path / "a", torch.zeros(1, 4), [{**captions[0], "caption": "\ud800"}], META)
    assert load_features(tmp_path / "a").clip_embedding[0].tolist() == [1.0] * 4
    save_features(tmp_path / "a", torch.zeros(1, 4), captions, META)
    assert load_features(tmp_path / "a").clip_embedding[0].tolist() == [0.0] * 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other things"):
        save_features(tmp_path / "other", torch.zeros(1, 4), captions, META)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other"]
