"""What predict.py and evaluate.py caption: pictures or sounds, found and encoded."""

import re
from pathlib import Path

from common import UserError
from features.audio import SOUND_SUFFIXES, is_sound

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm"}

WORTH_WORKERS = 128  # files: fewer are read before workers have started


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


def encode_pictures(paths, encoder, batch_size, skipped, num_workers=None):
    """Encode pictures or sounds → float32 [N, D] tensor ([N, L, D] without pooling) and the paths that could be read.

    The others go to `skipped` with the reason. num_workers: processes that read; None: by cores for a GPU that is given WORTH_WORKERS files
    or more, else none.
    """
    import torch
    from tqdm import tqdm

    from features.loading import Pictures, encode_batch, make_loader, pad_vectors

    if num_workers is None and (encoder.device.type != "cuda" or len(paths) < WORTH_WORKERS):
        num_workers = 0
    batches = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    loader = make_loader(Pictures(paths, encoder.preprocess), batches, encoder, batch_size, num_workers)
    embeddings, read = [], []
    for numbers, batch, unread in tqdm(loader, desc="encode", unit="batch", disable=None, leave=False):
        if numbers:
            embeddings.append(encode_batch(encoder, batch))
        read += [paths[number] for number in numbers]
        skipped.update((paths[number], reason) for number, reason in unread)
    if embeddings and embeddings[0].dim() == 3:
        return pad_vectors(embeddings), read
    return torch.cat(embeddings) if embeddings else torch.empty(0, encoder.width), read


def captioned_rows(features):
    """The images of a feature file that have captions → their embeddings (left in their files, if they lie in a directory), list of ids."""
    import numpy as np

    from features.embeddings import MappedEmbeddings

    rows, first = np.unique(features.caption_rows, return_index=True)
    embedding = features.clip_embedding
    if len(rows) < len(embedding):
        embedding = embedding.select(rows) if isinstance(embedding, MappedEmbeddings) else embedding[rows]
    return embedding, [features.captions[int(number)]["image_id"] for number in first]
