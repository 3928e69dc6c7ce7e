"""Caption annotations of every data set that the parse scripts read, in one form.

JSON: COCO's (a list of {image_id, caption}, or images and annotations), which nocaps and VizWiz share; lists whose entries name their own
pictures, as LAVIS, BLIP and ALBEF write them; Karpathy's (images with split and sentences). Tables: see annotation_tables.py.
"""

import functools
import gc
import json
import re
from pathlib import Path

from common import UserError
from features.annotated import Annotated, Annotations
from features.annotation_tables import read_annotation_table
from features.image_ids import COCO_ID, HALF_PAIR, id_key, name_images
from features.schema import check_structure

COCO_FORM = "a list of {image_id, caption}, or a dict with images and annotations (captions_train2014.json and the like)"
LIST_FORM = "a list of {image, caption}, the picture's file name and a caption or a list of them"
KARPATHY_FORM = "images with filename, split and sentences (dataset_coco.json and the like)"
NAME_KEYS = ("image", "file_name", "filename", "image_path", "path")  # of an entry that names its own picture
HALF_ESCAPES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # escapes of surrogates, paired or not
MISSING = "Give them with --annotations, or fetch them as data/README.md says."


def read_annotations(path, missing=MISSING):
    """Read caption annotations in any of the forms.

    Args:
        path: .json, or a table.
        missing: what to do when there is no such file, for the error.

    Returns:
        Annotations.

    Raises:
        UserError: the file is missing or has none of the forms; the message names the first field that is wrong.
    """
    path = Path(path)
    if path.suffix.lower() == ".json" or _starts_as_json(path):
        collects = gc.isenabled()
        gc.disable()  # collecting garbage among millions of new objects, of which none is garbage, takes half of the time
        try:
            return read_json_annotations(path, missing)
        finally:
            gc.enable() if collects else None
    return read_annotation_table(path, missing)


def _starts_as_json(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] == b"{" or start[:1] == b"[" and start[1:].lstrip()[:1] == b"{"


def read_json_annotations(path, missing=MISSING):
    """Read JSON annotations; arguments and returns as those of read_annotations."""
    content = _read_json(path, missing)
    images = content.get("images") if isinstance(content, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    if isinstance(first, dict) and "sentences" in first:
        return _from_karpathy(check_structure(_schemas()["karpathy"], content, path, KARPATHY_FORM))
    if isinstance(images, list) and images and not content.get("annotations"):
        raise UserError(f"{path} lists {len(images)} images and no caption. Caption the pictures themselves with predict.py.")
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _from_coco(check_structure(_schemas()["coco"], content, path, COCO_FORM))
    if isinstance(content, list) and content and isinstance(content[0], dict) and any(key in content[0] for key in NAME_KEYS):
        return _from_list(check_structure(_schemas()["list"], content, path, LIST_FORM), path)
    if isinstance(content, list):
        return _from_coco({"annotations": check_structure(_schemas()["captions"], content, path, COCO_FORM)})
    keys = f" with {', '.join(list(content)[:5])[:200] or 'nothing in it'}" if isinstance(content, dict) else ""
    raise UserError(f"{path} holds a {type(content).__name__}{keys}; expected {COCO_FORM}, or {KARPATHY_FORM}. Give another file.")


def _read_json(path, missing):
    if not path.is_file():
        raise UserError(f"no annotations {path}. {missing}")
    data = path.read_bytes()
    try:
        content = json.loads(data)
        return _replace_half_pairs(content, path) if _may_hold_half_pairs(data) else content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:200]}); expected {COCO_FORM}. Download it again.") from error


def _may_hold_half_pairs(data):
    return (b"\\u" in data or b"\xed" in data) and HALF_ESCAPES.search(data) is not None  # finding a text is faster than a pattern


def _replace_half_pairs(content, path):
    """Replace half of a surrogate pair, which no UTF-8 file can hold, by U+FFFD in every text; a printed note counts them."""
    replaced = 0

    def clean(value):
        nonlocal replaced
        if isinstance(value, str):
            cleaned, count = HALF_PAIR.subn("\ufffd", value)
            replaced += bool(count)
            return cleaned
        if isinstance(value, list):
            return [clean(one) for one in value]
        return {clean(key): clean(one) for key, one in value.items()} if isinstance(value, dict) else value

    content = clean(content)
    if replaced:
        print(f"{path}: {replaced} texts hold half of a surrogate pair, which was replaced by U+FFFD")
    return content


@functools.cache
def _schemas():
    """Build the schemas of the forms, once. Fields that they do not name are dropped."""
    from typing import Annotated as With

    from pydantic import Field, StrictBool, StrictInt, StrictStr, TypeAdapter
    from typing_extensions import NotRequired, TypedDict

    number = With[StrictInt, Field(ge=-(2**63), lt=2**63)]
    name = With[StrictStr, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    image_id = number | name
    optional_name = NotRequired[name | None]
    picture = TypedDict("picture", {
        "id": image_id, "file_name": optional_name, "domain": NotRequired[StrictStr | None], "open_images_id": NotRequired[object],
    })  # fmt: skip
    caption = TypedDict("caption", {
        "image_id": image_id, "caption": StrictStr, "id": NotRequired[number | StrictStr | None],
        "is_rejected": NotRequired[StrictBool | number | None], "is_precanned": NotRequired[StrictBool | number | None],
    })  # fmt: skip
    coco = TypedDict("coco", {"images": NotRequired[list[picture]], "annotations": list[caption]})
    entry = TypedDict("entry", {
        **dict.fromkeys(NAME_KEYS, optional_name), "caption": StrictStr | list[StrictStr],
        "image_id": NotRequired[image_id | None], "id": NotRequired[number | StrictStr | None], "split": optional_name,
    })  # fmt: skip
    sentence = TypedDict("sentence", {"raw": StrictStr, "sentid": NotRequired[number]})
    image = TypedDict("image", {"filename": name, "split": name, "sentences": list[sentence], "cocoid": NotRequired[number | None]})
    karpathy = TypedDict("karpathy", {"images": list[image]})
    return {
        "coco": TypeAdapter(coco),
        "captions": TypeAdapter(list[caption]),
        "list": TypeAdapter(list[entry]),
        "karpathy": TypeAdapter(karpathy),
    }


def _from_karpathy(content):
    """Karpathy's form."""
    images = []
    for entry in content["images"]:
        captions = [{"caption": one["raw"], **({"id": one["sentid"]} if "sentid" in one else {})} for one in entry["sentences"]]
        image_id = entry.get("cocoid")
        images.append(Annotated(entry["filename"] if image_id is None else image_id, entry["filename"], captions, entry["split"]))
    return Annotations("karpathy", images)


def _from_coco(content):
    """COCO's form, nocaps' and VizWiz's; captions that VizWiz marks as rejected or precanned are left out."""
    pictures = {str(picture["id"]): picture for picture in content.get("images", ())}
    images, left_out = {}, {}
    for entry in content["annotations"]:
        if entry.get("is_rejected") or entry.get("is_precanned"):
            reason = "rejected captions" if entry.get("is_rejected") else "precanned captions"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        key = str(entry["image_id"])
        image = images.get(key)
        if image is None:
            image = images[key] = _new_image(entry["image_id"], pictures.get(key))
        row = {"caption": entry["caption"]}
        if entry.get("id") is not None:
            row["id"] = entry["id"]
        image.captions.append(row)
    for key, image in images.items():
        domain = pictures.get(key, {}).get("domain")
        if domain:
            image.captions[:] = [{**row, "domain": domain} for row in image.captions]
    is_nocaps = any("open_images_id" in picture for picture in pictures.values())
    return Annotations("nocaps" if is_nocaps else "coco", list(images.values()), left_out)


def _new_image(image_id, picture):
    """Make an Annotated without captions."""
    if picture is None and str(image_id).startswith("coco_"):
        image_id = id_key(image_id)  # LAVIS's coco_391895
        return Annotated(int(image_id) if image_id.isdecimal() else image_id, None, [])
    return Annotated(image_id, picture and picture.get("file_name"), [])


def _from_list(entries, path):
    """A list whose entries name their own pictures; entries of one picture are put together."""
    by_name = {}
    for number, entry in enumerate(entries):
        name = next((entry[key] for key in NAME_KEYS if entry.get(key)), None)
        if name is None:
            raise UserError(f"{path} has an entry {number} without a picture's name; expected {LIST_FORM}. Give another file.")
        by_name.setdefault(name, []).append(entry)
    images = []
    for name, made in zip(by_name, name_images(by_name)):
        several = by_name[name]
        ids = {str(entry["image_id"]): entry["image_id"] for entry in several if entry.get("image_id") is not None}
        given = next(iter(ids.values()), None) if len(ids) == 1 else None
        coco = COCO_ID.fullmatch(str(given))
        image_id = made if given is None else int(coco[1] or coco[2]) if coco else given
        captions = []
        for entry in several:
            texts = [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"]
            own_id = {"id": entry["id"]} if entry.get("id") is not None and len(texts) == 1 else {}
            captions += [{"caption": text, **own_id} for text in texts]
        images.append(Annotated(image_id, name, captions, several[0].get("split")))
    ids = [str(image.image_id) for image in images]
    if len(set(ids)) < len(ids):  # ids of captions, or of several sets: the pictures' names tell them apart
        images = [image._replace(image_id=made) for image, made in zip(images, name_images(by_name))]
    return Annotations("list", images)
