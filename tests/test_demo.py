"""The demo world: its captions are true, its parser is strict, its held-out pairs are new, its tiny models load as the real ones do."""

import itertools
import json

import pytest

from demo import run, scenes
from demo.scenes import COLOURS, RADII, SHAPES, Scene, Thing, caption_is_true, describe, parse_caption


@pytest.fixture(scope="module")
def drawn():
    """300 training scenes and the pairs they were made from."""
    pairs = scenes.split_pairs(0)[0]
    return scenes.make_scenes(pairs, 300, seed=1)


def changed_scenes(scene):
    """Every scene that differs from `scene` in one attribute of one object, or in how the objects lie."""
    kinds = {"size": RADII, "colour": COLOURS, "shape": SHAPES}
    for place, kind in itertools.product(("first", "second"), kinds):
        thing = getattr(scene, place)
        for value in kinds[kind]:
            if value != getattr(thing, kind):
                yield scene._replace(**{place: thing._replace(**{kind: value})})
    yield scene._replace(layout="stacked" if scene.layout == "beside" else "beside")
    if scene.first != scene.second:
        yield scene._replace(first=scene.second, second=scene.first)


def test_every_caption_of_a_scene_is_true_of_it_and_no_two_are_worded_alike(drawn):
    for scene in drawn:
        captions = describe(scene)
        assert len(set(captions)) == 5
        assert all(caption_is_true(caption, scene) for caption in captions)


def test_a_caption_with_any_one_attribute_changed_is_false(drawn):
    for scene in drawn[:40]:
        for other in changed_scenes(scene):
            assert not any(caption_is_true(caption, scene) for caption in describe(other)), (scene, other)


def test_every_caption_names_the_left_or_upper_object_first(drawn):
    for scene in drawn:
        for caption in describe(scene):
            stated = parse_caption(caption)
            assert (stated.first, stated.second) == (scene.first, scene.second)
        (x1, y1), (x2, y2) = scene.centres
        assert x1 < x2 if scene.layout == "beside" else y1 < y2


SCENE = Scene("beside", Thing("small", "red", "circle"), Thing("large", "blue", "star"))


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "A small red circle.",
        "A red circle is to the left of a large blue star.",
        "A small red circle is to the left of a large star.",
        "A small circle is to the left of a large blue star.",
        "A small red circle is to the left of a large blue.",
        "A small red circle is to the left of a large blue star and a small red circle.",
        "A small red circle is to the left of a large blue star. A small red circle is above a large blue star.",
        "A small red red circle is to the left of a large blue star.",
        "A small red circle is to the right of a large blue star.",
        "A small red circle is left of a large blue star.",
        "A small pink circle is to the left of a large blue star.",
        "a small red circle and a large blue star",
        "It is not so that a small red circle is to the left of a large blue star.",
    ],
)
def test_a_caption_that_leaves_out_an_attribute_or_does_not_parse_is_false(caption):
    assert parse_caption(caption) is None
    assert not caption_is_true(caption, SCENE)


def test_letter_case_spaces_and_the_final_full_stop_do_not_matter():
    assert caption_is_true(" a  small red circle is to the left of a LARGE blue star\n", SCENE)


def test_share_true_counts_and_chance_is_small(drawn):
    right, wrong = describe(SCENE)[0], "A star."
    assert scenes.share_true([right, wrong, right, wrong], [SCENE] * 4) == 0.5
    assert scenes.share_true_by_chance([SCENE] * 5) == 1.0
    assert scenes.share_true_by_chance(drawn) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_heldout_pairs_never_meet_in_training_and_every_object_occurs_there(seed):
    training, heldout = scenes.split_pairs(seed)
    assert heldout
    assert len(set(training) | set(heldout)) == len(training) + len(heldout) == 24 * 23
    together = {frozenset(pair) for pair in training}
    assert not any(frozenset(pair) in together for pair in heldout)
    drawn = scenes.make_scenes(training, len(training), seed)
    assert {thing[1:] for scene in drawn for thing in (scene.first, scene.second)} == set(itertools.product(COLOURS, SHAPES))


def test_a_world_too_small_to_hold_anything_out_is_refused():
    with pytest.raises(ValueError, match="take more colours or shapes"):
        scenes.split_pairs(0, ("red",), ("circle", "square"))


def test_objects_lie_within_the_picture_and_apart():
    pairs = scenes.split_pairs(0)[0]
    for scene in scenes.make_scenes(pairs, 3000, seed=2):
        reach = [RADII[thing.size] for thing in (scene.first, scene.second)]
        for radius, centre in zip(reach, scene.centres, strict=True):
            assert all(radius <= coordinate <= scenes.IMAGE_SIZE - radius for coordinate in centre)
        along = 0 if scene.layout == "beside" else 1
        assert scene.centres[1][along] - scene.centres[0][along] > sum(reach)


def test_a_picture_shows_its_objects_in_their_colours_and_places(drawn):
    for scene in drawn[:60]:
        picture = scenes.draw_scene(scene)
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
        assert picture.getpixel((0, 0)) == scenes.PAPER
        for thing, centre in zip((scene.first, scene.second), scene.centres, strict=True):
            assert picture.getpixel(centre) == COLOURS[thing.colour]


def test_a_split_is_drawn_alike_each_time_and_its_json_is_in_cocos_layout(tmp_path, drawn):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        scenes.write_split(folder, "train", drawn[:20], first_id=7)
    one, two = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders)
    assert one == two
    assert len(one) == 21
    assert scenes.make_scenes(scenes.split_pairs(0)[0], 300, seed=1) == drawn

    document = json.loads(scenes.annotations_path(tmp_path / "one", "train").read_text())
    images, annotations = document["images"], document["annotations"]
    assert [image["id"] for image in images] == list(range(7, 27))
    assert all((tmp_path / "one" / "train" / image["file_name"]).is_file() for image in images)
    assert len({annotation["id"] for annotation in annotations}) == len(annotations) == 100
    truth = scenes.read_scenes(tmp_path / "one", "train")
    assert list(truth.values()) == drawn[:20]
    assert all(caption_is_true(annotation["caption"], truth[annotation["image_id"]]) for annotation in annotations)


FEW = {"heldout": 4, "clip_steps": 2, "gpt2_steps": 2, "colours": ("red", "blue"), "shapes": ("circle", "square"), "in_process": True}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory, one_thread):
    """A folder with a world of 40 pictures and models trained for two steps."""
    folder = tmp_path_factory.mktemp("demo")
    run.build(folder, scenes=40, **FEW)
    return folder


def test_the_tiny_clip_loads_with_openais_own_library_and_reads_its_own_tokens(tiny_world):
    import clip
    import torch
    from PIL import Image

    model, preprocess = clip.load(str(tiny_world / "weights" / "demo_clip.pt"), device="cpu")
    picture = preprocess(Image.open(scenes.picture_path(tiny_world, "train", 1)))[None]
    with torch.no_grad():
        logits, _ = model(picture, clip.tokenize(["a small red circle", "a photo of a dog"]))
    assert logits.shape == (1, 2)
    assert torch.isfinite(logits).all()


def test_the_tiny_gpt2_loads_with_transformers_and_gives_captions_back_unchanged(tiny_world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_world / "weights" / "demo_gpt2"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1 == model.config.vocab_size - 1
    for scene in scenes.read_scenes(tiny_world, "heldout").values():
        for caption in describe(scene):
            assert tokenizer.decode(tokenizer(caption)["input_ids"]) == caption


def test_what_is_there_is_used_again_and_other_settings_make_it_anew(tiny_world, capsys):
    model = tiny_world / "weights" / "demo_clip.pt"
    before = model.stat().st_mtime_ns
    capsys.readouterr()
    run.build(tiny_world, scenes=40, **FEW)
    assert model.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""
    run.build(tiny_world, scenes=41, **FEW)
    assert model.stat().st_mtime_ns > before
    assert len(list((tiny_world / "train").iterdir())) == 41


def test_the_score_is_of_the_heldout_pictures(tiny_world):
    truth = scenes.read_scenes(tiny_world, "heldout")
    captions = [{"image_id": image_id, "caption": describe(scene)[0]} for image_id, scene in truth.items()]
    captions[0]["caption"] = "A dog."
    (tiny_world / "captions.json").write_text(json.dumps(captions))
    figures = run.score(tiny_world)
    assert figures["share_true"] == figures["share_parsed"] == 0.75
    assert figures["heldout_pictures"] == 4


SCRIPTS = ["parse_coco.py", "parse_coco.py", "train.py", "predict.py", "evaluate.py", "predict.py"]


def test_the_commands_it_prints_are_ones_the_scripts_take(tiny_world):
    commands = run.command_lines(tiny_world)
    assert [words[0] for words in commands.values()] == SCRIPTS
    from training.options import parse_options

    options = parse_options(commands["train"][1:], "")
    import evaluate

    scored = evaluate.build_parser().parse_args(commands["evaluate"][1:])
    evaluate.check_options(evaluate.build_parser(), scored)
    assert scored.predictions == [commands["predict"][commands["predict"].index("--out") + 1]]
    assert options.out_dir.endswith("checkpoints")
    assert commands["predict"][2] == f"{options.out_dir}/demo-{options.epochs - 1:03d}.pt"
