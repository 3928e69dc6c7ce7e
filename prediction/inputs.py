"""What predict.py captions: pictures or sounds, found and encoded, or a feature file. N images, D width, L vectors per image."""

import dataclasses
import glob
import os
import re
import unicodedata
from pathlib import Path

from common import UserError
from features.audio import is_sound
from features.finder import walk
from features.image_ids import PICTURE_SUFFIXES, SOUND_SUFFIXES, name_images, plain_id, printable_name

ADDRESS = re.compile(r"(https?|ftp|s3|gs):/{1,2}", re.IGNORECASE)  # a Path has turned // into /
WORTH_WORKERS = 128  # files; fewer are read before worker processes have started


@dataclasses.dataclass
class Inputs:
    """Images to be captioned, in one order."""

    ids: list  # N image_ids
    names: list  # N str, what to print
    embeddings: list  # for each checkpoint its [N, D] or [N, L, D]
    paths: list  # N files; empty for a feature file
    encoder: str | None = None  # the encoder that a feature file names
    are_sounds: bool = False


def refuse_addresses(*names):
    """Raise UserError for a name that is a URL instead of a file. None is no name."""
    for name in filter(None, names):
        address = ADDRESS.match(str(name))
        if address:
            url = f"{address[1]}://{str(name)[address.end() :]}"
            raise UserError(f"{url} is a URL; expected a file. Download it first, for example with curl -LO, and give the file.")


def expand_names(names):
    """Find the files and folders that a command line names.

    A pattern such as *.jpg, which some shells pass on as it is, is expanded. "\\" may stand for "/", and accents may be composed or not.

    Args:
        names: list of str or Path.

    Returns:
        List of Path.

    Raises:
        UserError: a name is neither a file, a folder nor a pattern of some; it is a URL, or a FIFO, socket or device.
    """
    refuse_addresses(*names)
    found = []
    for name in map(os.fspath, names):
        spellings = [name, name.replace("\\", "/"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
        paths = [spelling for spelling in spellings if os.path.exists(spelling)][:1] or sorted(glob.glob(name, recursive=True))
        if not paths:
            thing = "file matches" if glob.has_magic(name) else f"{'sound' if is_sound(name) else 'picture'} or folder"
            raise UserError(f"no {thing} {name}. Check the path.")
        odd = next((path for path in paths if not os.path.isfile(path) and not os.path.isdir(path)), None)
        if odd:
            raise UserError(f"{odd} is a FIFO, socket or device; expected a picture, a sound or a folder. Save it as a file first.")
        found += map(Path, paths)
    return found


def find_pictures(names, sounds=False):
    """List files and the files in folders.

    Args:
        names: paths of files and folders, or patterns of them.
        sounds: look for sounds instead of pictures.

    Returns:
        List of Path, those of a folder sorted.

    Raises:
        UserError: a name is missing, a folder holds none, or a file is of the other kind.
    """
    return find_files(names, sounds)[0]


def find_files(names, sounds):
    """List files as find_pictures does. Returns their paths, each once, and for each the folder it was found under or None."""
    thing, suffixes = ("sound", SOUND_SUFFIXES) if sounds else ("picture", PICTURE_SUFFIXES)
    found = {}  # path -> folder
    for name in expand_names(names):
        if name.is_dir():
            inside = [place / file for place, files in walk(name) for file in files if file.lower().endswith(suffixes)]
            inside = sorted(path for path in inside if path.is_file())
            if not inside:
                raise UserError(f"folder {name} holds no {thing}; expected files ending in {', '.join(sorted(suffixes))}.")
            found |= {path: found.get(path, name) for path in inside}
        elif name.suffix.lower() in (PICTURE_SUFFIXES if sounds else SOUND_SUFFIXES):
            other = "picture" if sounds else "sound"
            raise UserError(f"{name} is a {other}; this checkpoint captions {thing}s. Give {thing}s, or a checkpoint trained on {other}s.")
        else:
            found.setdefault(name, None)
    return list(found), list(found.values())


def audio_of(models, checkpoints):
    """Return each model's sound settings, all None for captioners of pictures.

    Raises:
        UserError: some of the models caption sounds and others pictures.
    """
    audio = [model.config.audio for model in models]
    if any(audio) and not all(audio):
        heard, seen = (checkpoints[[bool(settings) for settings in audio].index(kind)] for kind in (True, False))
        raise UserError(f"{heard} captions sounds, {seen} captions pictures. Give checkpoints of one kind together.")
    return audio


def read_features(path, models, checkpoints):
    """Read the images of a feature file that have captions.

    Args:
        path: feature file or directory.
        models: the captioners that will caption them.
        checkpoints: what each is called in an error.

    Returns:
        Inputs; embeddings of a directory stay in their files.

    Raises:
        UserError: the file cannot be read, or its embeddings are not what a checkpoint needs.
    """
    import numpy as np

    from features.content import check_compatible, checkpoint_kind
    from features.embeddings import select_rows
    from features.store import load_features

    features = load_features(path)
    for model, checkpoint in zip(models, checkpoints):
        check_compatible(features.kind, checkpoint_kind(model.config, model.origin.encoder), path, checkpoint)
    rows, first = np.unique(features.caption_rows, return_index=True)
    embedding = features.clip_embedding
    if len(rows) < len(embedding):
        embedding = select_rows(embedding, rows)
    ids = [plain_id(features.captions[int(number)]["image_id"]) for number in first]
    return Inputs(ids, [str(image_id) for image_id in ids], [embedding] * len(models), [], features.meta.get("encoder"))


def encode_files(paths, folders, encoders, are_sounds, say, **options):
    """Encode pictures or sounds, once with each encoder; files that one of them cannot read are left out.

    Args:
        paths: files.
        folders: for each the folder it was found under, or None.
        encoders: for each checkpoint its encoder, which may be the same object.
        are_sounds: whether the files are sounds.
        say: function that takes one line about each file left out.
        options: batch_size and num_workers, as encode_pictures takes them.

    Returns:
        Inputs.

    Raises:
        UserError: no file can be read.
    """
    ids, encoded, skipped = name_images(paths, folders), {}, {}
    for encoder in encoders:
        if id(encoder) not in encoded:
            embedding, read = encode_pictures(paths, encoder, skipped, **options)
            encoded[id(encoder)] = (embedding, {path: row for row, path in enumerate(read)})
    for path, reason in skipped.items():
        say(f"skipped {path}: {reason}")
    kept = [place for place, path in enumerate(paths) if path not in skipped]
    if not kept:
        raise UserError(f"none of the {len(paths)} {'sounds' if are_sounds else 'pictures'} could be read.")
    ids, paths = [ids[place] for place in kept], [paths[place] for place in kept]
    embeddings = []
    for embedding, rows in (encoded[id(encoder)] for encoder in encoders):
        embeddings.append(embedding[[rows[path] for path in paths]])  # joined by file: encoders may skip different ones
    return Inputs(ids, [printable_name(path) for path in paths], embeddings, paths, are_sounds=are_sounds)


def encode_pictures(paths, encoder, skipped, batch_size, num_workers=None):
    """Encode pictures or sounds. The processes of a launcher share the batches; each gets all embeddings.

    Args:
        paths: files.
        encoder: models.encoders Encoder or features.audio SoundEncoder.
        skipped: dict that takes path -> reason of files that cannot be read.
        batch_size: files encoded together.
        num_workers: processes that read files. None: by cores, for at least WORTH_WORKERS files on a GPU, else none.

    Returns:
        float32 [N, D] tensor on the CPU, or [N, L, D] without pooling; the N paths that could be read.
    """
    import torch
    from tqdm import tqdm

    from features.loading import Pictures, encode_batch, make_loader
    from features.processes import current

    if num_workers is None and (encoder.device.type != "cuda" or len(paths) < WORTH_WORKERS):
        num_workers = 0
    processes = current()
    batches = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    batches = processes.share(batches)
    pictures = Pictures(paths, encoder.preprocess)
    loader = make_loader(pictures, batches, encoder, batch_size, num_workers, processes.local_count)
    embeddings, read, left_out = [], [], []
    for numbers, batch, unread in tqdm(loader, desc="encode", unit="batch", disable=None, leave=False):
        if numbers:
            embeddings.append(encode_batch(encoder, batch))
        read += numbers
        left_out += unread
    embeddings = [rows for rows in processes.gather_rows(_join(embeddings, encoder.width).numpy()) if len(rows)]
    read, left_out = ([one for of_process in processes.gather(several) for one in of_process] for several in (read, left_out))
    skipped.update((paths[number], reason) for number, reason in left_out)
    return _join([torch.from_numpy(rows) for rows in embeddings], encoder.width), [paths[number] for number in read]


def _join(embeddings, width):
    """Join tensors [n, D] or [n, L, D], which differ in L. Returns [N, D] or [N, L, D]; of none [0, `width`]."""
    import torch

    from features.loading import pad_vectors

    if embeddings and embeddings[0].dim() == 3:
        most = max(rows.shape[1] for rows in embeddings)
        embeddings = [torch.from_numpy(pad_vectors(rows.numpy(), most)) for rows in embeddings]
    if len(embeddings) == 1:
        return embeddings[0]
    return torch.cat(embeddings) if embeddings else torch.empty(0, width)
