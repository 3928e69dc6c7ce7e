"""What predict.py and evaluate.py caption: pictures or sounds, found and encoded."""

import re
from pathlib import Path

from common import UserError
from features.audio import SOUND_SUFFIXES, is_sound

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm"}


def check_names(names):
    """Raise UserError for a name that is neither a file nor a folder."""
    for name in map(Path, names):
        if not name.exists():
            raise UserError(f"no {'sound' if is_sound(name) else 'picture'} or folder {name}. Check the path.")


def find_pictures(names, sounds=False):
    """Expand files and folders → list of Path, a folder's pictures sorted by name; or its sounds, for a captioner of sounds.

    Raises UserError for a missing name, a folder without any, and a file named as the other kind is.
    """
    check_names(names)
    thing, suffixes = ("sound", set(SOUND_SUFFIXES)) if sounds else ("picture", PICTURE_SUFFIXES)
    found = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(path for path in name.rglob("*") if path.suffix.lower() in suffixes)
            if not inside:
                raise UserError(f"folder {name} holds no {thing}; expected files ending in {', '.join(sorted(suffixes))}.")
            found += inside
        elif (name.suffix.lower() in PICTURE_SUFFIXES) if sounds else is_sound(name):
            other = "picture" if sounds else "sound"
            raise UserError(f"{name} is a {other}; this checkpoint captions {thing}s. Give {thing}s, or a checkpoint trained on {other}s.")
        else:
            found.append(name)
    return found


def audio_of(models, checkpoints):
    """How each model's sounds become its encoder's input, from its config → list, all None for captioners of pictures.

    Raises UserError when some of the models caption sounds and others pictures.
    """
    audio = [model.config.audio for model in models]
    if any(audio) and not all(audio):
        heard, seen = (checkpoints[[bool(settings) for settings in audio].index(kind)] for kind in (True, False))
        raise UserError(f"{heard} captions sounds, {seen} captions pictures. Give checkpoints of one kind together.")
    return audio


def image_id_of(path):
    """The id of a picture: COCO's number where the name carries one (COCO_val2014_000000391895.jpg → 391895), else the stem.

    Of a sound it is the name with its suffix, as Clotho's captions name it.
    """
    if is_sound(path):
        return path.name
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    return int(number[1]) if number else path.stem


def encode_pictures(paths, encoder, batch_size, skipped):
    """Encode pictures or sounds → float32 [N, D] tensor ([N, L, D] without pooling) and the paths that could be read.

    The others go to `skipped` with the reason.
    """
    import torch
    from tqdm import tqdm

    from features.loading import encode_views, pad_vectors

    many_views = getattr(encoder, "many_views", False)
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
            embeddings.append(encode_views(encoder, batch) if many_views else encoder.encode(torch.stack(batch)).cpu())
    if embeddings and embeddings[0].dim() == 3:
        return pad_vectors(embeddings), read
    return torch.cat(embeddings) if embeddings else torch.empty(0, encoder.width), read
