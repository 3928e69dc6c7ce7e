"""Pictures of a report: found in folders by name or id, and made small enough for a page. For a sound, a picture of the same stem."""

import base64
import io
import unicodedata
from pathlib import Path

from common import UserError
from features.image_ids import PICTURE_SUFFIXES, id_key, without_suffix

LONGEST_SIDE = 320  # pixels, of a picture in a page
PLOTTED = 12  # pictures in a grid
MOST_PIXELS = 40_000_000  # larger files are not opened


class PictureFolders:
    """Folders to look for pictures in, subfolders included."""

    def __init__(self, folders):
        """List the pictures in `folders`. Raises UserError when one of them does not exist."""
        self.by_stem = {}  # stem -> list of (name inside its folder, path)
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise UserError(f"--images {folder} is no folder; expected one with the pictures.")
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
                    inside = _plain(path.relative_to(folder))
                    self.by_stem.setdefault(without_suffix(inside).rpartition("/")[2], []).append((inside, path))

    def find(self, image_id, file_name=None):
        """Find the picture of an image: by its file name, else by its id as it is, in twelve digits, or as COCO names it.

        Returns:
            Path, or None where there is none, or several pictures may be meant.
        """
        names, key = [_plain(file_name or image_id)], id_key(image_id)
        if not file_name and key.isdecimal():
            names += [f"{key:0>12}", *(f"COCO_{split}_{key:0>12}" for split in ("train2014", "val2014", "test2014"))]
        return next(filter(None, map(self._find, names)), None)

    def _find(self, name):
        """Find the one picture that a name fits best: all of it, its end, or its stem alone."""
        several = self.by_stem.get(without_suffix(name).rpartition("/")[2], [])
        whole = [path for inside, path in several if inside == name]
        ends = [path for inside, path in several if f"/{inside}".endswith(f"/{name}") or f"/{name}".endswith(f"/{inside}")]
        chosen = whole[:1] or ends or [path for _, path in several]
        return chosen[0] if len(chosen) == 1 else None


def _plain(name):
    """Write a name with composed accents, and "/" between folders."""
    return unicodedata.normalize("NFC", str(name)).replace("\\", "/")


def open_picture(path):
    """Open a picture as upright RGB, at most LONGEST_SIDE pixels per side. Returns a PIL image, or None where it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def picture_uri(path):
    """Make a small data URI of a picture. Returns None where it cannot be read."""
    image = open_picture(path)
    if image is None:
        return None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_uri(content.getvalue(), "image/jpeg")


def data_uri(content, media_type):
    """Make the data URI of some bytes, which a page holds instead of a link."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def plot_examples(examples, folders, path):
    """Draw a grid of the first images whose pictures are found, each with its caption and a reference.

    Args:
        examples: list of (image_id, file name or None, caption, reference).
        folders: where the pictures are.
        path: where the grid goes.

    Raises:
        UserError: no picture is found.
    """
    from reports.plots import plot_captions

    found = PictureFolders(folders)
    images, texts = [], []
    for image_id, file_name, caption, reference in examples:
        where = found.find(image_id, file_name)
        image = open_picture(where) if where else None
        if image is not None:
            images.append(image)
            texts.append([caption, f"reference: {reference}"])
        if len(images) == PLOTTED:
            break
    if not images:
        searched = " ".join(map(str, folders))
        raise UserError(f"none of the {len(examples):,} images has a picture in {searched}. Give the folder they are in.")
    plot_captions(images, texts, path)
