"""Pictures of a report: found by name or id in a folder, and made small enough to stand in a page. Sounds: a picture of the same stem."""

import base64
import io
from pathlib import Path

from common import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".JPG", ".JPEG", ".PNG")
LONGEST_SIDE = 320  # pixels of a picture in a page
PLOTTED = 12  # pictures of a grid
WIDEST = 40_000_000  # pixels of a file that is opened at all


class PictureFolders:
    """Folders in which pictures are looked for, subfolders included."""

    def __init__(self, folders):
        """Raises UserError when one of `folders` is not there."""
        self.by_name, self.by_stem = {}, {}
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise UserError(f"--images {folder} is no folder; expected one with the pictures.")
            for path in sorted(folder.rglob("*")):
                if path.suffix in SUFFIXES:
                    self.by_name.setdefault(path.name, path)
                    self.by_stem.setdefault(path.stem, path)

    def find(self, image_id, file_name=None):
        """The picture of an image → its path, or None: by file name, else by id as it stands, in twelve digits, or as COCO names it."""
        if file_name:
            name = Path(str(file_name))
            return self.by_name.get(name.name) or self.by_stem.get(name.stem)
        text = str(image_id)
        if text in self.by_name:
            return self.by_name[text]
        stems = [text, Path(text).stem]
        if text.isdigit():
            stems += [f"{int(text):012d}", *(f"COCO_{split}_{int(text):012d}" for split in ("train2014", "val2014", "test2014"))]
        return next((self.by_stem[stem] for stem in stems if stem in self.by_stem), None)


def open_picture(path):
    """A picture → PIL, RGB, upright, at most LONGEST_SIDE pixels a side; None where it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.width * image.height > WIDEST:
                return None
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def picture_uri(path):
    """A picture as a data URI, small; None where it cannot be read."""
    image = open_picture(path)
    if image is None:
        return None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_uri(content.getvalue(), "image/jpeg")


def data_uri(content, media_type):
    """bytes → "data:…", which a page holds in place of a link."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def plot_scored(keys, predictions, references, folders, path):
    """Draw a grid of the first images whose pictures are found, each with its caption and a reference.

    keys: the images in their order; predictions: dict of key → Prediction; references: References. Raises UserError where no picture
    is found.
    """
    from reports.plots import plot_captions

    found = PictureFolders(folders)
    images, texts = [], []
    for key in keys:
        where = found.find(predictions[key].image_id, references.file_names.get(key))
        image = open_picture(where) if where else None
        if image is not None:
            images.append(image)
            texts.append([predictions[key].captions[0], f"true: {references.captions[key][0]}"])
        if len(images) == PLOTTED:
            break
    if not images:
        raise UserError(f"none of the {len(keys):,} images has a picture in {' '.join(map(str, folders))}. Give the folder they are in.")
    plot_captions(images, texts, path)
