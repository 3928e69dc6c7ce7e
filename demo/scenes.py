"""The demo world's scenes: two coloured shapes, drawn at 64 pixels, with five differently worded true captions each.

A scene is two objects, side by side or one above the other. Its captions are made from the WORDINGS below, and the same
wordings, read backwards, decide whether any caption is true of a scene.
"""

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

from common import replace_file

IMAGE_SIZE = 64  # pixels; OpenAI's ResNet form takes multiples of 32
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 39, 40),
    "green": (34, 150, 66),
    "blue": (31, 90, 200),
    "yellow": (245, 205, 30),
    "purple": (140, 60, 170),
    "orange": (250, 130, 20),
}
RADII = {"small": 7.0, "large": 13.0}  # pixels, from the centre to the outermost point
PAPER = (246, 244, 239)
JITTER_ALONG, JITTER_ACROSS = 2, 8  # pixels an object may lie off its place: towards the other object, and at right angles
HELDOUT_PAIRS = 0.1  # share of the pairs of objects never seen together in training

# Each wording names the objects in reading order, the left or upper one first, and states shape, colour and size of both.
WORDINGS = {
    "beside": (
        "A {size1} {colour1} {shape1} is to the left of a {size2} {colour2} {shape2}.",
        "A {size1} {colour1} {shape1} on the left and a {size2} {colour2} {shape2} on the right.",
        "On the left there is a {size1} {colour1} {shape1}, on the right a {size2} {colour2} {shape2}.",
        "Two shapes side by side: a {size1} {colour1} {shape1}, then a {size2} {colour2} {shape2}.",
        "The left {shape1} is {size1} and {colour1}, the right {shape2} is {size2} and {colour2}.",
    ),
    "stacked": (
        "A {size1} {colour1} {shape1} is above a {size2} {colour2} {shape2}.",
        "A {size1} {colour1} {shape1} at the top and a {size2} {colour2} {shape2} at the bottom.",
        "At the top there is a {size1} {colour1} {shape1}, at the bottom a {size2} {colour2} {shape2}.",
        "Two shapes one above the other: a {size1} {colour1} {shape1}, then a {size2} {colour2} {shape2}.",
        "The upper {shape1} is {size1} and {colour1}, the lower {shape2} is {size2} and {colour2}.",
    ),
}


class Thing(NamedTuple):
    """One object of a scene: a key of RADII, a key of COLOURS, one of SHAPES."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """Two objects in reading order (left or upper first), how they lie, and their centres (x, y) in pixels."""

    layout: str
    first: Thing
    second: Thing
    centres: tuple = ()


def describe(scene):
    """Give the scene's five true captions, one for each wording."""
    words = {f"{name}{number}": value for number, thing in enumerate(scene[1:3], 1) for name, value in thing._asdict().items()}
    return [wording.format(**words) for wording in WORDINGS[scene.layout]]


def wording_pattern(wording, choices):
    """Turn a wording into the regular expression that reads it: any letter case, with or without the final full stop.

    choices: the words that may stand for each name; the wording has {name1} and {name2}.
    """
    pattern = re.escape(wording.removesuffix("."))
    for name, number in itertools.product(choices, "12"):
        pattern = pattern.replace(rf"\{{{name}{number}\}}", rf"(?P<{name}{number}>{'|'.join(choices[name])})")
    return re.compile(pattern + r"\.?", re.IGNORECASE)


_CHOICES = {"size": RADII, "colour": COLOURS, "shape": SHAPES}
_PATTERNS = [(layout, wording_pattern(wording, _CHOICES)) for layout, wordings in WORDINGS.items() for wording in wordings]


def parse_caption(caption):
    """Read a caption back into the Scene it states (without centres); None when it is not in the demo's language."""
    for layout, pattern in _PATTERNS:
        match = pattern.fullmatch(" ".join(caption.split()))
        if match:
            words = {name: word.lower() for name, word in match.groupdict().items()}
            first, second = (Thing(words[f"size{number}"], words[f"colour{number}"], words[f"shape{number}"]) for number in "12")
            return Scene(layout, first, second)
    return None


def caption_is_true(caption, scene):
    """Whether the caption parses and everything it states (how the objects lie, size, colour, shape of both) holds."""
    return parse_caption(caption) == scene._replace(centres=())


def share_true(captions, scenes, is_true=caption_is_true):
    """Return the share of captions that are true of their scene, 0.0 to 1.0; both sequences have the same length, at least 1."""
    pairs = list(zip(captions, scenes, strict=True))
    return sum(is_true(caption, scene) for caption, scene in pairs) / len(pairs)


def share_true_by_chance(scenes, seed=0, describe=describe, is_true=caption_is_true):
    """Return the share of scenes for which a random true caption of another scene is true as well. Needs at least two scenes."""
    rng = random.Random(seed)
    borrowed = []
    for number in range(len(scenes)):
        other = (number + rng.randrange(1, len(scenes))) % len(scenes)
        borrowed.append(rng.choice(describe(scenes[other])))
    return share_true(borrowed, scenes, is_true)


def split_pairs(seed=0, colours=tuple(COLOURS), shapes=SHAPES):
    """Divide the ordered pairs of different (colour, shape) objects into (training pairs, held-out pairs).

    A held-out pair is held out in both orders, so that its objects are never seen together; every object occurs in training.
    """
    rng = random.Random(f"pairs {seed}")
    together = list(itertools.combinations(itertools.product(colours, shapes), 2))
    rng.shuffle(together)
    count = max(1, round(HELDOUT_PAIRS * len(together)))
    both_orders = [[order for pair in part for order in (pair, pair[::-1])] for part in (together[count:], together[:count])]
    for pairs in both_orders:
        rng.shuffle(pairs)
    objects = {thing for pair in both_orders[0] for thing in pair}
    if len(objects) < len(colours) * len(shapes):
        raise ValueError(f"only {len(objects)} of {len(colours) * len(shapes)} objects left for training: take more colours or shapes")
    return both_orders


def make_scenes(pairs, count, seed=0):
    """Make `count` scenes that cycle through `pairs`; size, layout and position are random. Returns a list of Scene."""
    rng = random.Random(f"scenes {seed}")
    scenes = []
    for pair, _ in zip(itertools.cycle(pairs), range(count)):
        layout = rng.choice(tuple(WORDINGS))
        first, second = (Thing(rng.choice(tuple(RADII)), *thing) for thing in pair)
        centres = []
        for place in (IMAGE_SIZE // 4, 3 * IMAGE_SIZE // 4):
            along = place + rng.randint(-JITTER_ALONG, JITTER_ALONG)
            across = IMAGE_SIZE // 2 + rng.randint(-JITTER_ACROSS, JITTER_ACROSS)
            centres.append((along, across) if layout == "beside" else (across, along))
        scenes.append(Scene(layout, first, second, tuple(centres)))
    return scenes


def _outline(shape, radius):
    """Corners of a shape around (0, 0) as (x, y) pairs, y downwards; the outermost lie `radius` away."""
    corners, start = {"square": (4, 45), "triangle": (3, -90), "star": (10, -90)}[shape]
    points = []
    for corner in range(corners):
        angle = math.radians(start + 360 * corner / corners)
        length = radius * 0.42 if shape == "star" and corner % 2 else radius
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


def draw_scene(scene, scale=4):
    """Draw a scene as an RGB picture, IMAGE_SIZE square; it is drawn `scale` times larger and reduced, for smooth edges."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, PAPER)
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip((scene.first, scene.second), scene.centres, strict=True):
        radius = RADII[thing.size]
        if thing.shape == "circle":
            # A little smaller, so that a circle covers about as much paper as the square of its size.
            box = [(centre + sign * 0.9 * radius) * scale for sign in (-1, 1) for centre in (x, y)]
            pen.ellipse(box, fill=COLOURS[thing.colour])
        else:
            corners = [((x + dx) * scale, (y + dy) * scale) for dx, dy in _outline(thing.shape, radius)]
            pen.polygon(corners, fill=COLOURS[thing.colour])
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def annotations_path(folder, split):
    """The COCO-format JSON of a split."""
    return Path(folder) / "annotations" / f"captions_{split}.json"


def picture_path(folder, split, image_id):
    """The picture of an image id, named as COCO names its own since 2017."""
    return Path(folder) / split / f"{image_id:012d}.jpg"


def write_split(folder, split, scenes, first_id=1):
    """Draw a split: its pictures, then its JSON in COCO's layout. A split that has its JSON is complete.

    The JSON has one addition, which readers of COCO ignore: each image's "scene", the ground truth.
    """
    images, annotations = [], []
    (Path(folder) / split).mkdir(parents=True, exist_ok=True)
    for image_id, scene in enumerate(scenes, first_id):
        path = picture_path(folder, split, image_id)
        draw_scene(scene).save(path, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": path.name, "width": IMAGE_SIZE, "height": IMAGE_SIZE, "scene": scene})
        for number, caption in enumerate(describe(scene)):
            annotations.append({"id": 10 * image_id + number, "image_id": image_id, "caption": caption})
    document = {"info": {"description": f"PrefixCap's demo world, {split}"}, "images": images, "annotations": annotations}
    with replace_file(annotations_path(folder, split)) as temporary:
        temporary.write_text(json.dumps(document))


def read_scenes(folder, split):
    """Read a split's scenes from its JSON: dict from image id to Scene."""
    scenes = {}
    for image in json.loads(annotations_path(folder, split).read_text())["images"]:
        layout, first, second, centres = image["scene"]
        scenes[image["id"]] = Scene(layout, Thing(*first), Thing(*second), tuple(map(tuple, centres)))
    return scenes
