"""What the tests of evaluate.py share: how it is run, and a small set of references and predictions."""

import copy
import json

import evaluate
import helpers

VALUES = (
    None, True, 0, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", " ", "\xb2", "\u0661", "1e3", "nul\0", "half \ud83d", "\udfff",
    "a\nb\r\nc", "x" * 200_000, [], [1], {}, {"a": 1}, [[1]], "\x1b[2J", "'\"", "../../etc/passwd", "000000000001",
)  # fmt: skip
FAST = ["--metrics", "bleu", "rouge", "cider", "--bootstrap", "50"]


def run(*words, code=0):
    words = [str(word) for word in words]
    helpers.call(evaluate.main, words, code)


def refuse(capsys, *words):
    """Run what must fail → its one line on stderr."""
    capsys.readouterr()
    run(*words, code=2)
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out
    return captured.err


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    with open(path, "w", encoding="utf-8") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))


def write_coco():
    """Write predictions.json and captions_val2017.json of four images into the working directory → the references by image."""
    truth = {
        1: ["A man rides a wave on a board.", "A surfer on a wave."],
        2: ["Two dogs play in a park.", "Dogs with a ball."],
        3: ["A cat sleeps on a laptop.", "A cat on a computer."],
        4: ["A plate of rice.", "Food on a plate with rice."],
    }
    write("predictions.json", [{"image_id": key, "caption": texts[1]} for key, texts in truth.items()])
    annotations = [{"image_id": key, "id": 10 * key + n, "caption": text} for key, texts in truth.items() for n, text in enumerate(texts)]
    write("captions_val2017.json", {"images": [{"id": key} for key in truth], "annotations": annotations})
    return truth


def stand_in_tower(mini_demo, monkeypatch):
    """Make the mini demo's own CLIP, through OpenAI's library, the text tower of every encoder but "tinyvit"."""
    import clip
    import torch

    model, _ = clip.load(str(mini_demo / "weights/demo_clip.pt"), device="cpu")

    class Tower:
        name, modality, width, asked = "ViT-B/32", "image", model.text_projection.shape[1], []

        def encode_text(self, texts):
            self.asked += texts
            with torch.no_grad():
                return torch.nn.functional.normalize(model.encode_text(clip.tokenize(texts, truncate=True)).float(), dim=-1)

        def project(self, clip_embedding):
            return torch.nn.functional.normalize(clip_embedding.float(), dim=-1)

    monkeypatch.setattr("models.encoders.text.load_text_tower", lambda name, device="cpu": None if name == "tinyvit" else Tower())
    return Tower


def places(content):
    """List the paths to every value inside a structure of lists and dicts."""
    found = [()]
    for key, value in content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ():
        found += [(key, *path) for path in places(value)]
    return found


def mutate(content, draw):
    """Replace, remove or double a value somewhere in a structure."""
    content = copy.deepcopy(content)
    *path, last = draw.choice(places(content)[1:])
    inside = content
    for key in path:
        inside = inside[key]
    what = draw.randrange(4)
    if what == 0:
        del inside[last]
    elif what == 1 and isinstance(inside, list):
        inside.append(inside[last])
    else:
        inside[last] = draw.choice(VALUES)
    return content
