"""Flickr30k's or Flickr8k's captions to feature files for train, val and test, split by image: each picture is encoded once.

    python parse_flickr.py                                                        # data/flickr30k/oscar_split_ViT-B_32_{train,val,test}.pkl
    python parse_flickr.py --annotations data/flickr8k/Flickr8k.token.txt         # data/flickr8k/oscar_split_ViT-B_32_....pkl
    python parse_flickr.py --annotations data/flickr30k/dataset_flickr30k.json    # Karpathy's splits: 1,014 for val, 1,000 for test

The form of the annotations is recognised: Flickr30k's results.csv ("image_name| comment_number| comment", or with commas), its .token file,
Flickr8k's Flickr8k.token.txt ("name.jpg#0<TAB>caption"), its captions.txt ("image,caption"), flickr_annotations_30k.csv (raw, split,
filename), Karpathy's JSON, or a list of {image, caption}.

Some of these files have their own splits. The images of the others are split by --val_share 0.13 --test_share 0.03 --seed 0; no image is in
two splits. A share of 0 writes no such file. --out x.pkl writes x_train.pkl, x_val.pkl and x_test.pkl. Pictures that cannot be read, and
lines without a caption, are skipped and listed in {out}.skipped.csv. Interrupted jobs resume when you run the same command again.
"""

import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.annotations import read_annotations
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from features.finder import FileFinder
from features.options import share
from features.own_data import split_by_image, suggest_next
from features.processes import together
from models.encoders import ENCODER_HELP, load_encoder

DATA = Path("data")
ANNOTATIONS = DATA / "flickr30k" / "results.csv"
ANNOTATIONS_IN_ARCHIVE = DATA / "flickr30k" / "flickr30k_images" / "results.csv"  # where Kaggle's archive has it
MISSING = "Give them with --annotations; data/README.md says where Flickr30k and Flickr8k are."
FOLDERS = ("flickr30k_images", "flickr30k-images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
SPLITS = ("train", "val", "test")


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_flickr.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--annotations", type=Path, metavar="FILE", help=f"captions (default {ANNOTATIONS})")
    group.add_argument("--images", type=Path, metavar="FOLDER",
                       help="pictures (default: beside the captions: flickr30k_images/, Flicker8k_Dataset/, Images/ ...)")  # fmt: skip
    group.add_argument("--val_share", type=share, metavar="S", help="share of the images for validation (default 0.13)")
    group.add_argument("--test_share", type=share, metavar="S", help="share of the images for testing (default 0.03)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (default 0)")
    add_options(parser, ENCODER_HELP)
    args = parser.parse_args(argv)
    args.annotations = args.annotations or (ANNOTATIONS_IN_ARCHIVE if ANNOTATIONS_IN_ARCHIVE.is_file() else ANNOTATIONS)
    return args


def split_images(annotations, args):
    """Deal the images out to splits.

    Args:
        annotations: features.annotations.Annotations.
        args: options with annotations, val_share, test_share and seed.

    Returns:
        dict of split name to list of Annotated; splits without images are left out.

    Raises:
        UserError: shares leave nothing to train on or are given for a file with its own splits, or a split has an unknown name.
    """
    val, test = args.val_share, args.test_share
    images = annotations.images
    if any(image.split for image in images):
        if val is not None or test is not None:
            raise UserError(f"{args.annotations} has its own splits: leave --val_share and --test_share out.")
        split_of = {image.image_id: "train" if image.split == "restval" else image.split for image in images}
    else:
        val, test = 0.13 if val is None else val, 0.03 if test is None else test
        if val + test >= 1:
            raise UserError(f"--val_share {val} and --test_share {test} leave nothing to train on. Give smaller shares.")
        shares = {"train": 1 - val - test, "val": val, "test": test}
        # Split by name: ids depend on what other names there are.
        sides = split_by_image([image.file_name for image in images], shares, args.seed)
        split_of = {image.image_id: next(side for side in SPLITS if image.file_name in sides[side]) for image in images}
    unknown = next((image for image in images if split_of[image.image_id] not in SPLITS), None)
    if unknown:
        found = f"the split {split_of[unknown.image_id]!r} for {unknown.file_name}"
        raise UserError(f"{args.annotations} has {found}; expected train, val or test. Download it again.")
    by_split = {split: [image for image in images if split_of[image.image_id] == split] for split in SPLITS}
    return {split: several for split, several in by_split.items() if several}


def find_folder(annotations, given):
    """Return the folder of the pictures: as given, or the first of the usual ones beside the annotations, or the annotations' own."""
    if given and not given.is_dir():
        raise UserError(f"no folder {given}. Say where the pictures are with --images.")
    if given:
        return given
    beside = (annotations.parent / name / inner for name in FOLDERS for inner in (name, ""))  # Kaggle nests them twice
    return next((folder for folder in beside if folder.is_dir()), annotations.parent)


@one_line_errors
@together
def main(argv=None):
    """Read the captions, split the images, encode each split with one encoder, write the feature files."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    annotations = read_annotations(args.annotations, MISSING)
    if not annotations.images:
        raise UserError(f"{args.annotations} holds no caption; expected those of Flickr30k or Flickr8k. Give another file.")
    unnamed = next((image for image in annotations.images if not image.file_name), None)
    if unnamed:
        raise UserError(f"{args.annotations} gives no file name for image {unnamed.image_id}. COCO's files are read by parse_coco.py.")
    by_split = split_images(annotations, args)
    folder = find_folder(args.annotations, args.images)
    finder = FileFinder([folder])
    eight = "8k" in f"{args.annotations.parent.name} {args.annotations.name}".lower()
    base = args.out or DATA / ("flickr8k" if eight else "flickr30k") / f"oscar_split_{file_stem(args.clip_model_type)}.pkl"
    records = {
        split: [Record(one.image_id, finder.find(one.file_name) or str(folder / one.file_name), one.captions) for one in images]
        for split, images in by_split.items()
    }
    check_images([record for every in records.values() for record in every], args.max_skipped)
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision, args.pooling)
    accelerate_model(encoder.module)
    outs = {split: base.with_name(f"{base.stem}_{split}{base.suffix}") for split in records}
    for split, every in records.items():
        options = extract_options(args) | {"missing": annotations.bad if split == next(iter(records)) else ()}
        extract(every, encoder, outs[split], source=args.annotations, split=split, **options)
    suggest_next(outs, "./flickr_train/")


if __name__ == "__main__":
    sys.exit(main())
