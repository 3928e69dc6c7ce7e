"""What a notebook holds and what it shows, for tests."""

import base64
import io
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("clip_prefix_captioning_inference", "transformer_inference")
SOUNDS = "clotho_inference"
NOTEBOOKS = (*PICTURES, SOUNDS)
WALKTHROUGH = "training_walkthrough"
BEAM = re.compile(r"beam: (.*)  \(-\d+\.\d{3}\)")


def read_notebook(stem):
    return nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    """By code cell: what it printed, and the pictures (PNG) it shows."""
    shown = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        assert not errors, errors
        text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        shown.append((text, [base64.b64decode(picture) for picture in pictures]))
    return shown


def same_picture(one, other, tolerance=0):
    """Whether two pictures (PNG) are equal, but for a mean difference of `tolerance` in 0 to 255."""
    from PIL import Image, ImageChops, ImageStat

    one, other = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
    assert len(one.getcolors(1 << 24)) > 20, "an empty picture"
    return one.size == other.size and max(ImageStat.Stat(ImageChops.difference(one, other)).mean) <= tolerance


def captions_of(notebook):
    """Captions that one of NOTEBOOKS prints: the greedy one, five of beam search, and those of the grid."""
    texts = [text for text, _ in outputs_of(notebook)]
    greedy, *beams = texts[4].splitlines()
    return greedy.removeprefix("greedy: "), [BEAM.fullmatch(line)[1] for line in beams], texts[6].splitlines()


def lasting_text(notebook):
    """What one of NOTEBOOKS prints on any machine and of any demo: without captions, scores, folders and lengths of prefixes."""
    texts = [text for text, _ in outputs_of(notebook)]
    texts[2] = re.sub(r"^.*/(?=demo_clip)|\d+ vectors|, on \w+$", "", texts[2], flags=re.MULTILINE)
    texts[3] = re.sub(r"^windows: \d+", "windows", texts[3])
    texts[4] = BEAM.sub("beam: a caption", re.sub(r"^greedy: .*", "greedy: a caption", texts[4]))
    texts[6] = "a caption\n" * len(texts[6].splitlines())
    return "\n".join(texts)
