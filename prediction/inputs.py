"""What predict.py and evaluate.py caption: pictures found and encoded."""

import re
from pathlib import Path

from common import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm"}


def find_pictures(names):
    """Expand files and folders → list of Path, a folder's pictures sorted by name. Raises UserError for a missing or empty one."""
    found = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(path for path in name.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise UserError(f"folder {name} holds no picture; expected files ending in {', '.join(sorted(PICTURE_SUFFIXES))}.")
            found += inside
        elif name.is_file():
            found.append(name)
        else:
            raise UserError(f"no picture or folder {name}. Check the path.")
    return found


def image_id_of(path):
    """The id of a picture: COCO's number where the name carries one (COCO_val2014_000000391895.jpg → 391895), else the stem."""
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    return int(number[1]) if number else path.stem


def encode_pictures(paths, encoder, batch_size, skipped):
    """Encode pictures → float32 [N, D] tensor and the paths that could be read; the others are added to `skipped` with the reason."""
    import torch
    from tqdm import tqdm

    embeddings, read = [], []
    for start in tqdm(range(0, len(paths), batch_size), desc="encode", unit="batch", disable=None, leave=False):
        batch = []
        for path in paths[start : start + batch_size]:
            try:
                batch.append(encoder.preprocess(path))
                read.append(path)
            except (ValueError, OSError) as error:
                skipped[path] = str(error)
        if batch:
            embeddings.append(encoder.encode(torch.stack(batch)).cpu())
    return torch.cat(embeddings) if embeddings else torch.empty(0, encoder.width), read
