"""What `python -m models.hub export` writes beside the weights: a Space that runs as it is, and what its model card says.

app.py starts the page with the exported weights; prefixcap/ holds the code it needs; requirements.txt its packages. The encoder is copied
where it is a file, as encoder.pt or encoder/.
"""

import json
import re
import shutil
from pathlib import Path

from common import UserError, replace_file
from models.checkpoints import config_path
from models.encoders.configs import read_object
from models.weights import find_weights

ROOT = Path(__file__).resolve().parent.parent
CODE = ("common.py", "app.py", "features", "models", "page", "prediction", "reports")  # what the page imports
SAMPLES = 5  # captions shown in the model card
APP = '''"""The page of this captioner: python app.py. On a Space it is open to everyone, elsewhere to this machine only."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "prefixcap"))
from app import main  # noqa: E402

host = "0.0.0.0" if os.environ.get("SYSTEM") == "spaces" else "127.0.0.1"
sys.exit(main(["--checkpoint", str(HERE), "--host", host{encoder}, *sys.argv[1:]]))
'''


def write_space(folder, model):
    """Write app.py, requirements.txt, the code and, where it is a file, the encoder into an exported folder.

    Args:
        folder: of the weights.
        model: the captioner that was exported, with its .origin.

    Raises:
        UserError: the place cannot be written.
    """
    folder = Path(folder)
    try:
        for name in CODE:
            shutil.rmtree(folder / "prefixcap" / name, ignore_errors=True)
            for path in [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")):
                copy = folder / "prefixcap" / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        encoder = _copy_encoder(folder, model.origin.encoder or model.config.encoder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Free some space, or give another place.") from error
    with replace_file(folder / "app.py") as temporary:
        temporary.write_text(APP.replace("{encoder}", f', "--clip_model_type", {encoder}' if encoder else ""), encoding="utf-8")
    with replace_file(folder / "requirements.txt") as temporary:
        temporary.write_text(page_requirements(), encoding="utf-8")


def _copy_encoder(folder, name):
    """Copy an encoder that is a file or a folder. Returns a Python expression for its name, or None where the config's name does."""
    _, _, inside = (name or "").partition("clipxgpt:")
    place = find_weights(inside or name) if name else None
    if place is None:
        return None
    copy = folder / ("encoder" if place.is_dir() else "encoder.pt")
    if place.is_dir():
        shutil.copytree(place, copy, dirs_exist_ok=True)
    else:
        shutil.copyfile(place, copy)
    return f'"clipxgpt:" + str(HERE / "{copy.name}")' if inside else f'str(HERE / "{copy.name}")'


def page_requirements():
    """The pinned packages without those of tests, notebooks and scores."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# tests")[0]
    return re.sub(r"(?m)^(pycocoevalcap|tensorboard|gdown)==.*\n", "", text)


def version_of(package):
    """The version that requirements.txt pins a package to."""
    return re.search(rf"(?m)^{package}==(.*)$", page_requirements())[1]


def describe_for_card(path, scores=None):
    """Collect what a model card says about a captioner.

    Args:
        path: its checkpoint; the config beside it knows the training command.
        scores: file that evaluate.py --out wrote, or None.

    Returns:
        dict with command (str or None), scores (list of (name, value)), samples (list of (caption, reference)), images (number of images
        scored).

    Raises:
        UserError: a file is damaged or something else.
    """
    beside = config_path(path)
    made_by = read_object(beside, "the config that train.py writes").get("made_by") if beside.is_file() else None
    command = made_by.get("command") if isinstance(made_by, dict) else None
    about = {"command": _plain(command) if isinstance(command, str) else None, "scores": [], "samples": [], "images": None}
    if scores is None:
        return about
    content = _read_json(scores)
    found = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{scores} holds no scores; expected the file that evaluate.py --out writes.")
    about["scores"] = [(_plain(name), f"{100 * value:.1f}") for name, value in found.items() if isinstance(value, (int, float))]
    about["images"] = content.get("images") if isinstance(content.get("images"), int) else None
    predictions = Path(scores).parent / Path(str(content.get("predictions_file", ""))).name
    rows = _read_json(predictions) if predictions.is_file() else []
    for row in rows[:SAMPLES] if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("caption"), str) and row.get("references"):
            about["samples"].append((_plain(row["caption"]), _plain(row["references"][0])))
    return about


def _read_json(path):
    """Read a JSON file. Raises UserError where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({str(error)[:100]}). Give the file that evaluate.py --out wrote.") from error


def _plain(value):
    """Write text in one line that a cell of a Markdown table holds as it is."""
    return re.sub(r"([|`<>\[\]\\])", r"\\\1", " ".join(str(value).split()))
