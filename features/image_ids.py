"""The identity of an image (or sound): one definition for parsing, predicting and evaluating.

An image of COCO is known by its number. Any other is known by its path inside the folder that was given, suffix included, or by its file
name where a file was given. So `cat.jpg` and `cat.png`, or `a/1.jpg` and `b/1.jpg`, stay apart.
"""

import collections.abc
import os
import re
import unicodedata
from pathlib import Path

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm")
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a")
MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, ".avif", *SOUND_SUFFIXES)
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which no UTF-8 file can hold
# COCO_val2014_000000391895.jpg, 000000391895.jpg, 000000391895, also in COCO's own folders, and LAVIS's coco_391895
COCO_ID = re.compile(r"(?:[a-z]+20\d\d/)?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.(?:jpe?g|png))?|coco_(\d+)")
COCO_FILE = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.(?:jpe?g|png)", re.IGNORECASE)


def printable_name(path):
    """Return a path as text that UTF-8 can hold: bytes of its name that are not UTF-8 are written as escapes (caf\\xe9.jpg)."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file's name can hold
        return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def plain_id(image_id):
    """Bring an image_id of a file to int, or to a str that UTF-8 can hold; numbers of numpy and torch are what they say.

    Returns:
        int or str; None where it is neither.
    """
    if hasattr(image_id, "item") and getattr(image_id, "shape", None) in ((), (1,)):
        image_id = image_id.item()
    if isinstance(image_id, float) and image_id.is_integer():
        image_id = int(image_id)
    if isinstance(image_id, str):
        return image_id if image_id.isascii() else HALF_PAIR.sub("\ufffd", image_id)
    return image_id if isinstance(image_id, int) and not isinstance(image_id, bool) else None


def name_images(paths, folders=None):
    """Give each file the id of its image.

    Args:
        paths: files, in any order.
        folders: for each file the folder it was found under, or None for a file that was given itself; None for none at all.

    Returns:
        List of ids, all different as long as the paths are: int for a COCO picture, else str with "/" between folders.
    """
    folders = [None] * len(paths) if folders is None else folders
    choices = [_names_of(path, folder) for path, folder in zip(paths, folders)]
    ids = [names[0] for names in choices]
    for level in (1, 2):
        counts = {}
        for one in ids:
            counts[one] = counts.get(one, 0) + 1
        # The next, longer name where two files share one.
        ids = [one if counts[one] == 1 else names[level] for one, names in zip(ids, choices)]
    return ids


def _names_of(path, folder):
    """List an image's possible ids, the shortest first: COCO's number, its path in the folder, its whole path."""
    path = Path(path)
    inside = printable_name(path.name if folder is None else os.path.relpath(path, folder)).replace(os.sep, "/")
    coco = COCO_FILE.fullmatch(path.name)
    return [int(coco[1]) if coco else inside, inside, printable_name(path.as_posix())]


def id_key(image_id):
    """Bring an image_id to the form by which files are matched.

    COCO's forms become its number as text; folders are separated by "/"; accents are composed (NFC); half of a
    surrogate pair, which no file of results can hold, is U+FFFD.
    """
    text = str(image_id)
    text = (text if text.isascii() else unicodedata.normalize("NFC", HALF_PAIR.sub("\ufffd", text))).replace("\\", "/")
    coco = COCO_ID.fullmatch(text)
    return str(int(coco[1] or coco[2])) if coco else text


def without_suffix(key):
    """Return a key without the suffix of a picture or sound."""
    stem, suffix = os.path.splitext(key)
    return stem if suffix.lower() in MEDIA_SUFFIXES else key


def match_ids(keys, known):
    """Match keys of one file with those of another.

    Equal keys match. Of what is left, keys match that are equal without their suffix, or without folders too, as long as only one key on
    each side can be meant: files written by other tools name pictures by their stems.

    Args:
        keys: keys as id_key gives them.
        known: the other file's keys.

    Returns:
        dict from each key that has a match to the other file's key.
    """
    known = known if isinstance(known, (collections.abc.Set, collections.abc.Mapping)) else set(known)
    matched = {key: key for key in keys if key in known}
    if len(matched) in (len(keys), len(known)):  # of one side nothing is left
        return matched
    for shorten in (without_suffix, lambda key: without_suffix(key).rpartition("/")[2]):
        ours = _by_short_name((key for key in keys if key not in matched), shorten)
        taken = set(matched.values())
        theirs = _by_short_name((key for key in known if key not in taken), shorten)
        for short, several in ours.items():
            others = theirs.get(short, [])
            if len(several) == len(others) == 1:
                matched[several[0]] = others[0]
    return matched


def _by_short_name(keys, shorten):
    """Group keys by their short names."""
    groups = {}
    for key in keys:
        groups.setdefault(shorten(key), []).append(key)
    return groups
