"""Caption annotations kept as JSON by several data sets: COCO's own form, nocaps' and Karpathy's.

COCO's form: a list of {image_id, caption}, or a dict with images and annotations; nocaps adds a domain to each image. Karpathy's
form (dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json): a dict whose images hold their file name, split and sentences.
"""

import json

from common import UserError

COCO_FORM = "a list of {image_id, caption}, or a dict with images and annotations (captions_train2014.json and the like)"
KARPATHY_FORM = "images with filename, split and sentences (dataset_coco.json and the like)"
KARPATHY_SPLITS = ("train", "restval", "val", "test")


def read_json(path, expected):
    """The content of a JSON file. expected: what should have been in it, for the error when it is missing or not JSON."""
    if not path.is_file():
        raise UserError(f"no annotations {path}. Give them with --annotations, or fetch them as data/README.md says.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); expected {expected}. Download it again.") from error


def is_karpathy(content):
    """Is this Karpathy's form? Its images carry their sentences."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def is_nocaps(content):
    """Is this nocaps' form? COCO's, of Open Images' pictures."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "open_images_id" in images[0]


def read_karpathy(content, path):
    """Karpathy's form → list of (split, file name, COCO number or None, captions): every image in the order of the file.

    captions: dicts with caption and id (the sentence's). path: where the content is from, for errors. Raises UserError at a bad entry.
    """
    images = []
    for number, entry in enumerate(content["images"]):
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        whole = isinstance(sentences, list) and isinstance(entry.get("filename"), str) and isinstance(entry.get("split"), str)
        if not whole or not all(isinstance(one, dict) and isinstance(one.get("raw"), str) for one in sentences):
            raise UserError(f"{path} has an entry {number} in images without filename, split or sentences with raw texts; "
                            f"expected {KARPATHY_FORM}. Download it again.")  # fmt: skip
        captions = [{"caption": one["raw"], **({"id": one["sentid"]} if "sentid" in one else {})} for one in sentences]
        images.append((entry["split"], entry["filename"], entry.get("cocoid"), captions))
    return images


def read_coco(content, path):
    """COCO's form → {image_id as text: (file name or None, [caption rows])}, in the order of the captions.

    A caption row has image_id, caption and, where the file has them, id and domain (nocaps), all as they stand in the file.
    Raises UserError when the content has another shape, or lists images but no caption.
    """
    names, domains = {}, {}
    if isinstance(content, dict) and isinstance(content.get("images"), list) and not content.get("annotations"):
        if content["images"]:
            raise UserError(f"{path} lists {len(content['images'])} images and no caption, and a feature file is made of both. "
                            "Caption the pictures themselves with predict.py.")  # fmt: skip
    if isinstance(content, dict) and isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        content, pictures = content["annotations"], content["images"]
        for number, picture in enumerate(pictures):
            if not isinstance(picture, dict) or "id" not in picture or not isinstance(picture.get("file_name"), str):
                raise UserError(f"{path} has an entry {number} in images without id or file_name; expected {COCO_FORM}. Give another file.")
            names[str(picture["id"])] = picture["file_name"]
            if "domain" in picture:
                domains[str(picture["id"])] = {"domain": picture["domain"]}
    if not isinstance(content, list):
        keys = f" with {', '.join(list(content)[:5]) or 'nothing in it'}" if isinstance(content, dict) else ""
        raise UserError(f"{path} holds a {type(content).__name__}{keys}; expected {COCO_FORM}. Give another file with --annotations.")
    images = {}
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or not isinstance(entry.get("image_id"), (str, int)):
            raise UserError(f"{path} has an annotation {number} without image_id or caption; expected {COCO_FORM}. Give another file.")
        key = str(entry["image_id"])
        if key not in names and not key.isdecimal():
            raise UserError(f"{path} has the image_id {key!r} in annotation {number}, which is neither a COCO number nor listed in images.")
        row = {name: entry[name] for name in ("image_id", "caption", "id") if name in entry} | domains.get(key, {})
        images.setdefault(key, (names.get(key), []))[1].append(row)
    return images
