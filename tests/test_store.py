"""The feature file: what goes in comes out, published files are read, and nothing in a file is run."""

import os
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from common import UserError
from features.store import group_by_image, join_features, load_features, save_features

META = {"encoder": "ViT-B/32", "normalized": False}


def rows_of(texts, images):
    return [{"image_id": 7 + i % images, "caption": text, "id": i, "clip_embedding": i % images} for i, text in enumerate(texts)]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    images=st.integers(1, 4),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.bfloat16]),
)
def test_what_is_saved_is_loaded(tmp_path_factory, texts, images, width, dtype):
    folder = tmp_path_factory.mktemp("store")
    embedding = torch.randn(images, width).to(dtype)
    captions = rows_of(texts, images)
    save_features(folder / "a.pkl", embedding, captions, META)
    save_features(folder / "b.pkl", embedding.clone(), [dict(caption) for caption in captions], dict(META))
    features = load_features(folder / "a.pkl")
    assert torch.equal(features.clip_embedding, embedding)
    assert features.clip_embedding.dtype == dtype
    assert features.captions == captions
    assert features.meta["encoder"] == "ViT-B/32"
    assert features.meta["width"] == width
    assert features.meta["captions"] == len(texts)
    assert (folder / "a.pkl").read_bytes() == (folder / "b.pkl").read_bytes()


def test_several_embeddings_an_image_are_kept_apart(tmp_path):
    embedding = torch.randn(2, 3, 4)
    embedding[1, 2] = 0  # no vector here
    for name in ("a.pkl", "a"):
        save_features(tmp_path / name, embedding, rows_of(["one", "two"], 2), META)
        features = load_features(tmp_path / name)
        assert torch.equal(features.clip_embedding[[0, 1]], embedding)
        assert (features.width, features.embeddings_per_image, features.meta["embeddings_per_image"]) == (4, 3, 3)
    save_features(tmp_path / "flat.pkl", torch.randn(2, 4), rows_of(["one", "two"], 2), META)
    names = ["a.pkl", "flat.pkl"]
    with pytest.raises(UserError, match="one embedding per image"):
        join_features([load_features(tmp_path / name) for name in names], names)
    assert load_features(tmp_path / "flat.pkl").embeddings_per_image == 1


def test_the_published_train_py_can_read_ours(tmp_path):
    save_features(tmp_path / "a.pkl", torch.randn(2, 4), rows_of(["one", "two", "three"], 2), META)
    with open(tmp_path / "a.pkl", "rb") as file:
        content = pickle.load(file)
    assert content["clip_embedding"].shape == (2, 4)
    captions = [(c["image_id"], c["caption"], c["clip_embedding"]) for c in content["captions"]]
    assert captions == [(7, "one", 0), (8, "two", 1), (7, "three", 0)]


def test_a_published_file_with_a_row_a_caption_is_grouped_by_image(tmp_path):
    embedding = torch.randn(2, 640).repeat_interleave(5, dim=0).half()
    captions = [{"image_id": str(row // 5), "caption": f"text {row}", "id": row, "clip_embedding": row} for row in range(10)]
    with open(tmp_path / "oscar_split_RN50x4_train.pkl", "wb") as file:
        pickle.dump({"clip_embedding": embedding, "captions": captions}, file)
    features = load_features(tmp_path / "oscar_split_RN50x4_train.pkl")
    assert features.meta["encoder"] == "RN50x4"
    assert len(features.clip_embedding) == 10
    grouped = group_by_image(features)
    assert torch.equal(grouped.clip_embedding, embedding[[0, 5]])
    assert grouped.caption_rows.tolist() == [0] * 5 + [1] * 5


def test_rows_that_differ_are_not_joined(tmp_path):
    tiny.save_published_features(tmp_path / "a.pkl", [["one"], ["two"]], width=8)
    features = load_features(tmp_path / "a.pkl")
    for caption in features.captions:
        caption["image_id"] = 1
    assert len(group_by_image(features).clip_embedding) == 2


def test_a_clotho_file_with_pandas_rows_is_read(tmp_path):
    frame = pd.DataFrame({"file_name": ["a.wav", "b.wav"], "caption_1": ["birds sing", "rain falls"], "caption_2": ["x", "y"]})
    captions = []
    for number in range(2):
        row = frame.iloc[number].copy()
        row["clip_embedding"] = number
        captions.append(row)
    old = pd.Series(dict(captions[1]), dtype=object)
    old.index = pd.Index(list(old.index), dtype=object)
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"clip_embedding": torch.randn(2, 512).half(), "captions": [captions[0], old]}, file)
    features = load_features(tmp_path / "a.pkl")
    assert [c["caption"] for c in features.captions] == ["birds sing", "rain falls"]
    assert [c["image_id"] for c in features.captions] == ["a.wav", "b.wav"]


def test_files_of_two_splits_are_joined_and_of_two_encoders_refused(tmp_path):
    save_features(tmp_path / "a.pkl", torch.randn(2, 4), rows_of(["one", "two"], 2), META)
    save_features(tmp_path / "b.pkl", torch.randn(1, 4), rows_of(["three"], 1), META)
    save_features(tmp_path / "c.pkl", torch.randn(1, 4), rows_of(["three"], 1), {"encoder": "RN50x4"})
    a, b, c = (load_features(tmp_path / name) for name in ("a.pkl", "b.pkl", "c.pkl"))
    joined = join_features([a, b], ["a.pkl", "b.pkl"])
    assert joined.caption_rows.tolist() == [0, 1, 2]
    assert torch.equal(joined.clip_embedding[2], b.clip_embedding[0])
    with pytest.raises(UserError, match="RN50x4.*ViT-B/32"):
        join_features([a, c], ["a.pkl", "c.pkl"])


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def nested_tensor(mark):
    """A plainly pickled tensor whose storage bytes, a pickle of their own, carry the payload."""

    class Storage:
        def __reduce__(self):
            return (torch.storage._load_from_bytes, (pickle.dumps(Payload(mark)),))

    class Tensor:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (Storage(), 0, (1, 1), (1, 1), False, None))

    return Tensor()


@pytest.mark.parametrize("place", ["in the pickle", "in a caption", "in the bytes of a tensor"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_in_a_file_is_refused_and_not_run(tmp_path, place):
    mark = tmp_path / "was_run"
    good = {"clip_embedding": torch.randn(1, 4), "captions": rows_of(["one"], 1)}
    if place == "in the pickle":
        good = Payload(mark)
    elif place == "in a caption":
        good["captions"][0]["caption"] = Payload(mark)
    else:
        good["clip_embedding"] = nested_tensor(mark)
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump(good, file)
    with pytest.raises(UserError, match="mkdir" if place != "in the bytes of a tensor" else "in the bytes of a tensor"):
        load_features(tmp_path / "a.pkl")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage")  # torch warns of it once a process
def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path):
    class Huge:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (torch.randn(4).storage(), 0, (10**6, 4), (4, 1), False, None))

    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"clip_embedding": Huge(), "captions": rows_of(["one"], 1)}, file)
    with pytest.raises(UserError, match="over 4 numbers"):
        load_features(tmp_path / "a.pkl")


def write(path, content):
    with open(path, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            pickle.dump(content, file)


good = {"clip_embedding": torch.ones(1, 4), "captions": rows_of(["one"], 1)}
BAD = {
    "empty": (b"", "cannot be read"),
    "text": (b"image_id,caption\n", "cannot be read"),
    "truncated": (pickle.dumps(good)[:-40], "cannot be read"),
    "a list": ([1, 2], "holds a list"),
    "without the keys": ({"a": 1}, "no clip_embedding and no captions"),
    "with NaN": ({**good, "clip_embedding": torch.tensor([[1.0, np.nan]])}, "NaN or infinity in row 0"),
    "with a row that is not there": ({**good, "captions": [{**good["captions"][0], "clip_embedding": 3}]}, "row is 3 of 1"),
    "with zero captions": ({**good, "captions": []}, "no caption"),
    "with whole numbers": ({**good, "clip_embedding": torch.ones(1, 4, dtype=torch.long)}, "not a float tensor"),
    "with a caption that is no text": ({**good, "captions": [{**good["captions"][0], "caption": 5}]}, "without a text"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line(tmp_path, what):
    content, message = BAD[what]
    write(tmp_path / "a.pkl", content)
    with pytest.raises(UserError, match=message) as caught:
        load_features(tmp_path / "a.pkl")
    assert "\n" not in str(caught.value)
    assert "a.pkl" in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="parse_coco.py"):
        load_features(tmp_path / "no.pkl")


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_gives_features_or_one_line(tmp_path_factory, data):
    content = bytearray(pickle.dumps({**good, "meta": META}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutated") / "a.pkl"
    path.write_bytes(content)
    try:
        load_features(path)
    except UserError as error:
        assert "\n" not in str(error)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(768,), (1, 768)])
def test_clipxgpt_s_list_of_triples_is_read_and_grouped(tmp_path, dtype, shape):
    import numpy as np

    rows = np.random.default_rng(0).standard_normal((4, *shape)).astype(dtype)
    triples = [(f"{image}.jpg", rows[image], f"caption {k} of {image}") for image in range(4) for k in range(5)]
    (tmp_path / "processed_dataset.pkl").write_bytes(pickle.dumps(triples))
    features = load_features(tmp_path / "processed_dataset.pkl")
    assert features.clip_embedding.shape == (20, 768)
    assert str(features.clip_embedding.dtype) == f"torch.{dtype}"
    assert features.meta["encoder"] == "hf:openai/clip-vit-base-patch32"
    grouped = group_by_image(features)
    assert len(grouped.clip_embedding) == 4
    assert [caption["clip_embedding"] for caption in grouped.captions] == [i // 5 for i in range(20)]
    assert grouped.captions[7] == {"image_id": "1.jpg", "caption": "caption 2 of 1", "id": 7, "clip_embedding": 1}
    assert np.array_equal(grouped.clip_embedding[1].numpy(), rows[1].reshape(-1))


@pytest.mark.parametrize("triples", [[], [("a.jpg", "no array", "text")], [("a.jpg", None)], [1, 2]])
def test_a_list_of_something_else_is_one_line(tmp_path, triples):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(triples))
    with pytest.raises(UserError, match="holds a"):
        load_features(tmp_path / "list.pkl")
