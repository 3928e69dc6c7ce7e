"""COCO's captions to a feature file: each picture is encoded once, with all its captions beside it.

The published data set (train_caption.json and the 2014 pictures, laid out as data/README.md says), as published:

    python parse_coco.py --clip_model_type ViT-B/32          # data/coco/oscar_split_ViT-B_32_train.pkl, 512 wide
    python parse_coco.py --clip_model_type RN50x4            # data/coco/oscar_split_RN50x4_train.pkl, 640 wide
    python parse_coco.py --clip_model_type tinyvit           # data/coco/oscar_split_tinyvit_train.pkl, 576 wide

Karpathy's splits, from dataset_coco.json (train and restval together are what train_caption.json holds):

    python parse_coco.py --annotations data/coco/annotations/dataset_coco.json                       # ..._train.pkl: train and restval
    python parse_coco.py --annotations data/coco/annotations/dataset_coco.json --split test          # ..._test.pkl, to evaluate on

The JSON of COCO 2014 or 2017, nocaps (each caption keeps its domain), VizWiz (without rejected captions), a list as LAVIS and BLIP write it
(image, caption), or any file in these forms:

    python parse_coco.py --annotations data/coco/annotations/captions_train2017.json
    python parse_coco.py --annotations data/coco/annotations/captions_val2017.json       # ..._val.pkl, for validation
    python parse_coco.py --annotations data/nocaps/nocaps_val_4500_captions.json         # data/nocaps/oscar_split_ViT-B_32_val.pkl
    python parse_coco.py --annotations my.json --images my_pictures --out data/my.pkl

--images names folders of pictures, or COCO's root, which holds train2014, val2014, train2017 or val2017 (nocaps: val, test, images). COCO
2017 has the pictures of 2014 under shorter names; either set serves for either annotation. Interrupted jobs resume when you run the same
command again. Pictures that cannot be read are skipped and listed in {out}.skipped.csv.
"""

import re
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.annotations import read_annotations
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from features.finder import FileFinder
from features.image_ids import id_key
from features.own_data import suggest_next
from features.processes import together
from models.encoders import ENCODER_HELP, load_encoder

COCO, NOCAPS = Path("data/coco"), Path("data/nocaps")
FOLDERS = ("train2014", "val2014", "train2017", "val2017", "train", "val", "test", "validation", "images")
SPLITS = ("train", "restval", "val", "test")  # Karpathy's
PAPER_SPLITS = ["train", "restval"]  # what the published training list was made of
COCO_NAME = re.compile(r"(?:.*/)?(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_coco.py", description=__doc__)
    group = parser.add_argument_group("data")
    annotations = COCO / "annotations" / "train_caption.json"
    group.add_argument(
        "--annotations",
        type=Path,
        default=annotations,
        metavar="JSON",
        help=f"captions: the published list, or the JSON of Karpathy, COCO, nocaps, VizWiz or LAVIS (default {annotations})",
    )
    group.add_argument("--images", type=Path, nargs="+", metavar="FOLDER",
                       help=f"folders of pictures, or COCO's root (default {COCO}; for nocaps {NOCAPS})")  # fmt: skip
    group.add_argument("--split", nargs="+", choices=SPLITS, metavar="SPLIT",
                       help="splits of Karpathy's JSON: train restval val test, several allowed (default train restval)")  # fmt: skip
    add_options(parser, ENCODER_HELP)
    return parser.parse_args(argv)


def read_captions(path, splits=None):
    """Read the annotations.

    Args:
        path: JSON file.
        splits: the wanted splits of Karpathy's JSON, or None.

    Returns:
        List of features.annotations.Annotated, the split's name, and the default folder of the pictures.

    Raises:
        UserError: the file is missing, has another form, or has no such splits.
    """
    annotations = read_annotations(path)
    for what, count in annotations.left_out.items():
        print(f"{count} {what} left out")
    unknown = next((image for image in annotations.images if not image.file_name and not id_key(image.image_id).isdecimal()), None)
    if unknown:
        raise UserError(f"{path} has the image_id {str(unknown.image_id)[:80]!r}, neither a COCO number nor listed in images.")
    if annotations.form != "karpathy":
        if splits:
            raise UserError(f"--split chooses among the splits in Karpathy's dataset_coco.json; {path} has another form. Leave it out.")
        split = next((split for split in ("val", "test") if split in path.stem.lower()), "train")
        return annotations.images, split, NOCAPS if annotations.form == "nocaps" else COCO
    foreign = next((image for image in annotations.images if not isinstance(image.image_id, int)), None)
    if foreign:
        raise UserError(f"{path} has {foreign.file_name} without a cocoid: it is not COCO's. Flickr's is read by parse_flickr.py.")
    wanted = splits or PAPER_SPLITS
    images = [image for image in annotations.images if image.split in wanted]
    return images, "train" if "train" in wanted else "_".join(dict.fromkeys(wanted)), COCO


class PictureFinder:
    """Finds pictures by name or by COCO's number, in folders or in COCO's root."""

    def __init__(self, folders):
        """Take folders of pictures, or COCO's root."""
        self.root = folders[0]
        self.finder = FileFinder(folder for given in folders for folder in (given, *(given / name for name in FOLDERS)))

    def find(self, image):
        """Return the path of an Annotated's picture; where it should be when it does not exist."""
        key, name = id_key(image.image_id), image.file_name
        names = [name] if name else []
        named = COCO_NAME.fullmatch(name) if name else None
        # Another data set's number 42 is not COCO's picture 42: only COCO's own names are tried in their other forms.
        if key.isdecimal() and (not name or named and int(named[1]) == int(key)):
            names += [f"COCO_train2014_{int(key):012d}.jpg", f"COCO_val2014_{int(key):012d}.jpg", f"{int(key):012d}.jpg"]
        found = next(filter(None, map(self.finder.find, names)), None)
        year_folder = next((folder for folder in FOLDERS if f"COCO_{folder}_" in names[0]), "")
        return found or str(self.root / year_folder / names[0])


@one_line_errors
@together
def main(argv=None):
    """Read the annotations, find the pictures, encode them, write the feature file."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    images, split, folder = read_captions(args.annotations, args.split)
    finder = PictureFinder(args.images or [folder])
    records = [Record(image.image_id, finder.find(image), image.captions) for image in images if image.captions]
    check_images(records, args.max_skipped)
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
    accelerate_model(encoder.module)
    out = args.out or folder / f"oscar_split_{file_stem(args.clip_model_type)}_{split}.pkl"
    extract(records, encoder, out, source=args.annotations, split=split, **extract_options(args))
    suggest_next({split: out}, "./coco_train/")


if __name__ == "__main__":
    sys.exit(main())
