"""benchmarks/beyond.py: the sets for retrieval without a colour keep apart what they say they keep apart."""

import pytest
import torch

from benchmarks import beyond
from demo import scenes as world
from features.store import load_features, save_features

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(workdir):
    """A small world with a feature file: row r of the embeddings is r, so that pictures can be recognized."""
    scenes = world.make_scenes(world.split_pairs()[0], 300)
    (workdir / "annotations").mkdir()
    world.write_split(workdir, "train", scenes)
    captions = [
        {"image_id": image_id, "caption": text, "clip_embedding": image_id - 1}
        for image_id, scene in enumerate(scenes, 1)
        for text in world.describe(scene)
    ]
    embeddings = torch.arange(len(scenes), dtype=torch.float32)[:, None].expand(-1, 8) + 1
    save_features(workdir / "train.pkl", embeddings, captions, {"encoder": "ViT-B/32", "normalized": False})
    return workdir


def test_sets_for_a_new_word_share_no_pair_and_only_two_datastores_name_it(folder):
    files, truth = beyond.write_sets(folder, folder / "sets", seed=1), world.read_scenes(folder, "train")
    sets = {name: load_features(path) for name, path in files.items()}
    scenes = {name: [truth[int(image_id)] for image_id in one.image_ids()] for name, one in sets.items()}
    pairs = {name: {frozenset((scene.first[1:], scene.second[1:])) for scene in ones} for name, ones in scenes.items()}
    assert not pairs["learn"] & pairs["with"] and pairs["without"] < pairs["with"] == pairs["renamed"]
    for name, words in {"learn": set(), "without": set(), "with": {beyond.COLOUR}, "renamed": {beyond.NEW_NAME}}.items():
        said = {word for word in (beyond.COLOUR, beyond.NEW_NAME) for text in sets[name].texts if word in text}
        assert said == words
        assert any(map(beyond.shows_colour, scenes[name])) is bool(words)
        # Every picture has kept its own embedding and captions.
        rows = sets[name].clip_embedding[sets[name].caption_rows, 0].int().tolist()
        assert rows == [int(image_id) for image_id in sets[name].image_ids()]
        texts = [text.replace(beyond.NEW_NAME, beyond.COLOUR) for text in sets[name].texts]
        assert all(map(world.caption_is_true, texts, scenes[name]))
    assert len(sets["learn"].clip_embedding) == beyond.LEARNED
    other = load_features(beyond.write_sets(folder, folder / "more", seed=2)["learn"])
    assert set(other.image_ids()) != set(sets["learn"].image_ids())


def test_every_choice_is_a_command_that_evaluate_takes():
    from evaluate import build_parser, check_options

    for more in beyond.CHOICES.values():
        parser = build_parser()
        check_options(parser, parser.parse_args(["--data", "x.pkl", "--checkpoint", "x.pt", *more.split()]))
