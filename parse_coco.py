"""COCO captions → a feature file: each picture encoded once, all its captions beside it.

The published data set (train_caption.json and the 2014 pictures, laid out as data/README.md says), as published:

    python parse_coco.py --clip_model_type ViT-B/32          # → data/coco/oscar_split_ViT-B_32_train.pkl, 512 wide
    python parse_coco.py --clip_model_type RN50x4            # → data/coco/oscar_split_RN50x4_train.pkl, 640 wide
    python parse_coco.py --clip_model_type tinyvit           # → data/coco/oscar_split_tinyvit_train.pkl, 576 wide

COCO's own JSON, 2014 or 2017, or any file in its format (the demo's, yours):

    python parse_coco.py --annotations data/coco/annotations/captions_train2017.json
    python parse_coco.py --annotations data/coco/annotations/captions_val2017.json       # → …_val.pkl, for validation
    python parse_coco.py --annotations my.json --images my_pictures --out data/my.pkl

--images names folders with pictures, or COCO's root with train2014, val2014, train2017 or val2017 in it. COCO's 2017 pictures are those
of 2014 under shorter names, and either serves for either annotation. A run that was stopped goes on when started again. Pictures that
cannot be read are skipped and listed in {out}.skipped.csv.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from common import Parser, UserError, file_stem, one_line_errors
from features.extract import Record, add_options, check_images, extract, extract_options
from models.encoders import load_encoder

COCO = Path("data/coco")
COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017")
SHAPES = "a list of {image_id, caption}, or a dict with images and annotations (captions_train2014.json and the like)"


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_coco.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--annotations", type=Path, default=COCO / "annotations" / "train_caption.json", metavar="JSON",
                       help=f"the published list, or COCO's own JSON (default {COCO}/annotations/train_caption.json)")  # fmt: skip
    group.add_argument("--images", type=Path, nargs="+", default=[COCO], metavar="FOLDER",
                       help=f"folders of pictures, or COCO's root (default {COCO})")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def read_annotations(path):
    """Annotation file → {image_id: (file name or None, [caption rows])}, in the order of the captions.

    A caption row has image_id, caption and, where the file has it, id, all as they stand in the file.
    Raises UserError when the file is missing, is not JSON, or has another shape.
    """
    if not path.is_file():
        raise UserError(f"no annotations {path}. Give them with --annotations, or fetch them as data/README.md says.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); expected {SHAPES}. Download it again.") from error
    names = {}
    if isinstance(content, dict) and isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        content, pictures = content["annotations"], content["images"]
        for number, picture in enumerate(pictures):
            if not isinstance(picture, dict) or "id" not in picture or not isinstance(picture.get("file_name"), str):
                raise UserError(f"{path} has an entry {number} in images without id or file_name; expected {SHAPES}. Give another file.")
            names[str(picture["id"])] = picture["file_name"]
    if not isinstance(content, list):
        keys = f" with {', '.join(list(content)[:5]) or 'nothing in it'}" if isinstance(content, dict) else ""
        raise UserError(f"{path} holds a {type(content).__name__}{keys}; expected {SHAPES}. Give another file with --annotations.")
    images = {}
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or not isinstance(entry.get("image_id"), (str, int)):
            raise UserError(f"{path} has an annotation {number} without image_id or caption; expected {SHAPES}. Give another file.")
        key = str(entry["image_id"])
        if key not in names and not key.isdecimal():
            raise UserError(f"{path} has the image_id {key!r} in annotation {number}, which is neither a COCO number nor listed in images.")
        row = {name: entry[name] for name in ("image_id", "caption", "id") if name in entry}
        images.setdefault(key, (names.get(key), []))[1].append(row)
    return images


class PictureFinder:
    """Finds pictures in several folders, each listed once."""

    def __init__(self, folders):
        """folders: folders of pictures, or COCO's root."""
        self.root = folders[0]
        every = [folder for given in folders for folder in (given, *(given / name for name in COCO_FOLDERS)) if folder.is_dir()]
        self.listings = {folder: set(os.listdir(folder)) for folder in every}

    def find(self, key, file_name):
        """Number or key of an image, and its file name if the annotations say → path; where it should be when it is nowhere."""
        names = [file_name] if file_name else []
        if key.isdecimal():
            names += [f"COCO_train2014_{int(key):012d}.jpg", f"COCO_val2014_{int(key):012d}.jpg", f"{int(key):012d}.jpg"]
        for name in names:
            nested = len(Path(name).parts) > 1
            for folder, listing in self.listings.items():
                if name in listing or nested and (folder / name).is_file():
                    return str(folder / name)
        year_folder = next((folder for folder in COCO_FOLDERS if f"COCO_{folder}_" in names[0]), "")
        return str(self.root / year_folder / names[0])


def default_out(annotations, clip_model_type):
    """The published name of the feature file, with val or test for annotations named so. → path, split"""
    split = next((split for split in ("val", "test") if split in annotations.stem.lower()), "train")
    return COCO / f"oscar_split_{file_stem(clip_model_type)}_{split}.pkl", split


@one_line_errors
def main(argv=None):
    """Read annotations, find the pictures, encode them, write the feature file."""
    args = parse_options(argv)
    images = read_annotations(args.annotations)
    finder = PictureFinder(args.images)
    records = [Record(rows[0]["image_id"], finder.find(key, name), rows) for key, (name, rows) in images.items()]
    check_images(records, args.max_skipped)
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision)
    out, split = default_out(args.annotations, args.clip_model_type)
    out = args.out or out
    extract(records, encoder, out, source=args.annotations, split=split, **extract_options(args))
    print(f"next: python train.py --data {shlex.quote(str(out))} --out_dir ./coco_train/")


if __name__ == "__main__":
    sys.exit(main())
