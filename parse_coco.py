"""COCO captions → a feature file: each picture encoded once, all its captions beside it.

The published data set (train_caption.json and the 2014 pictures, laid out as data/README.md says), as published:

    python parse_coco.py --clip_model_type ViT-B/32          # → data/coco/oscar_split_ViT-B_32_train.pkl, 512 wide
    python parse_coco.py --clip_model_type RN50x4            # → data/coco/oscar_split_RN50x4_train.pkl, 640 wide
    python parse_coco.py --clip_model_type tinyvit           # → data/coco/oscar_split_tinyvit_train.pkl, 576 wide

Karpathy's splits, from his dataset_coco.json (train and restval together are what train_caption.json holds):

    python parse_coco.py --annotations data/coco/annotations/dataset_coco.json                       # train + restval → …_train.pkl
    python parse_coco.py --annotations data/coco/annotations/dataset_coco.json --split test          # → …_test.pkl, to evaluate on

COCO's own JSON, 2014 or 2017, nocaps' (its domain is kept with each caption), or any file in their format (the demo's, yours):

    python parse_coco.py --annotations data/coco/annotations/captions_train2017.json
    python parse_coco.py --annotations data/coco/annotations/captions_val2017.json       # → …_val.pkl, for validation
    python parse_coco.py --annotations data/nocaps/nocaps_val_4500_captions.json         # → data/nocaps/oscar_split_ViT-B_32_val.pkl
    python parse_coco.py --annotations my.json --images my_pictures --out data/my.pkl

--images names folders with pictures, or COCO's root with train2014, val2014, train2017 or val2017 in it (nocaps: val, test, images). COCO's
2017 pictures are those of 2014 under shorter names, and either serves for either annotation. A run that was stopped goes on when started
again. Pictures that cannot be read are skipped and listed in {out}.skipped.csv.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.annotations import COCO_FORM, KARPATHY_SPLITS, is_karpathy, is_nocaps, read_coco, read_json, read_karpathy
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from models.encoders import load_encoder

COCO, NOCAPS = Path("data/coco"), Path("data/nocaps")
FOLDERS = ("train2014", "val2014", "train2017", "val2017", "train", "val", "test", "validation", "images")
PAPER_SPLITS = ["train", "restval"]  # what the published training list was made of
COCO_NAME = re.compile(r"(?:.*/)?(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_coco.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--annotations", type=Path, default=COCO / "annotations" / "train_caption.json", metavar="JSON",
                       help=f"the published list, or Karpathy's, nocaps', COCO's JSON (default {COCO}/annotations/train_caption.json)")
    group.add_argument("--images", type=Path, nargs="+", metavar="FOLDER",
                       help=f"folders of pictures, or COCO's root (default {COCO}; for nocaps {NOCAPS})")  # fmt: skip
    group.add_argument("--split", nargs="+", choices=KARPATHY_SPLITS, metavar="SPLIT",
                       help="of Karpathy's JSON: train restval val test, several allowed (default train restval)")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def read_annotations(path, splits=None):
    """Annotation file → {image_id: (file name or None, [caption rows])} in the order of the file, the split's name, default folder.

    splits: of Karpathy's JSON. Raises UserError when the file is missing, has another shape, or has no such splits.
    """
    content = read_json(path, COCO_FORM)
    if not is_karpathy(content):
        if splits:
            raise UserError(f"--split chooses among the splits in Karpathy's dataset_coco.json; {path} is of another form. Leave it out.")
        split = next((split for split in ("val", "test") if split in path.stem.lower()), "train")
        return read_coco(content, path), split, NOCAPS if is_nocaps(content) else COCO
    wanted = splits or PAPER_SPLITS
    images = {}
    for split, name, number, captions in read_karpathy(content, path):
        if number is None:
            raise UserError(f"{path} has {name} without a cocoid: it is not COCO's. Flickr's is read by parse_flickr.py.")
        if split in wanted:
            images[str(number)] = (name, [{"image_id": number, **caption} for caption in captions])
    return images, "train" if "train" in wanted else "_".join(dict.fromkeys(wanted)), COCO


class PictureFinder:
    """Finds pictures in several folders, each listed once."""

    def __init__(self, folders):
        """folders: folders of pictures, or COCO's root."""
        self.root = folders[0]
        every = [folder for given in folders for folder in (given, *(given / name for name in FOLDERS)) if folder.is_dir()]
        self.listings = {folder: set(os.listdir(folder)) for folder in every}

    def find(self, key, file_name):
        """Number or key of an image, and its file name if the annotations say → path; where it should be when it is nowhere."""
        names = [file_name] if file_name else []
        named = COCO_NAME.fullmatch(file_name) if file_name else None
        # Another data set's number 42 is not COCO's picture 42: only COCO's own names are tried in their other forms.
        if key.isdecimal() and (not file_name or named and int(named[1]) == int(key)):
            names += [f"COCO_train2014_{int(key):012d}.jpg", f"COCO_val2014_{int(key):012d}.jpg", f"{int(key):012d}.jpg"]
        for name in names:
            nested = len(Path(name).parts) > 1
            for folder, listing in self.listings.items():
                if name in listing or nested and (folder / name).is_file():
                    return str(folder / name)
        year_folder = next((folder for folder in FOLDERS if f"COCO_{folder}_" in names[0]), "")
        return str(self.root / year_folder / names[0])


@one_line_errors
def main(argv=None):
    """Read annotations, find the pictures, encode them, write the feature file."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    images, split, folder = read_annotations(args.annotations, args.split)
    finder = PictureFinder(args.images or [folder])
    records = [Record(rows[0]["image_id"], finder.find(key, name), rows) for key, (name, rows) in images.items() if rows]
    check_images(records, args.max_skipped)
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
    accelerate_model(encoder.module)
    out = args.out or folder / f"oscar_split_{file_stem(args.clip_model_type)}_{split}.pkl"
    extract(records, encoder, out, source=args.annotations, split=split, **extract_options(args))
    print(f"next: python train.py --data {shlex.quote(str(out))} --out_dir ./coco_train/")


if __name__ == "__main__":
    sys.exit(main())
