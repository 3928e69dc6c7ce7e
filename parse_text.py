"""Captions without pictures to a feature file of text embeddings, for training on texts alone or as a datastore or memory of texts.

    python parse_text.py captions.txt --clip_model_type ViT-B/32            # one caption per line; data/captions_ViT-B_32_texts.pkl
    python parse_text.py captions.csv more.json --out texts.pkl             # tables, and annotations of any data set that is parsed here
    python train.py --data texts.pkl --noise_variance 0.016 --out_dir ./texts_train/

The encoder's text tower embeds each caption: one row per caption, of norm 1. A .pkl gives the captions of a feature file. Of Karpathy's
files the splits train and restval are taken. docs/beyond.md says when this helps.
"""

import json
import re
import sys
from pathlib import Path

from common import Parser, UserError, claim_output, one_line_errors, resolve_output
from features.annotations import read_annotations
from features.encoder_names import file_stem
from features.image_ids import HALF_PAIR, printable_name
from features.options import positive
from features.store import load_features, save_features
from features.tables import find_caption_columns, find_separator, read_csv, read_jsonl, read_text, texts_of
from models.encoders import ENCODER_HELP

TABLES = (".csv", ".tsv")
MISSING = "Check the path."
HEADED = re.compile(r"image,\s*caption\s*\n|image_name\s*[,|]|\S+#\d+\t")  # how Flickr's .txt and .token files begin


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_text.py", description=__doc__)
    group = parser.add_argument_group("captions")
    group.add_argument("captions", nargs="+", metavar="FILE", help="captions: .txt, .csv, .json, or a feature file (.pkl)")
    group.add_argument("--caption_column", nargs="+", metavar="NAME", help="column(s) with captions (default: found by the usual names)")
    group.add_argument("--split", nargs="+", default=["train", "restval"], metavar="NAME",
                       help="splits to take of annotations that name them (default train restval)")  # fmt: skip
    group = parser.add_argument_group("features")
    group.add_argument("--clip_model_type", default="ViT-B/32", metavar="NAME", help=f"{ENCODER_HELP} (default ViT-B/32)")
    group.add_argument("--out", type=Path, metavar="FILE",
                       help="feature file to write (.pkl), or a name without suffix for a folder (default: as above)")  # fmt: skip
    group.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default auto)")
    group.add_argument("--batch_size", type=positive, default=256, metavar="N", help="captions encoded together (default 256)")
    return parser.parse_args(argv)


def read_captions(path, caption_columns=None, splits=("train", "restval")):
    """Read captions from a file of any of the forms.

    Args:
        path: .txt with a caption per line, a table, annotations, a JSON list of texts, or a feature file.
        caption_columns: names of the caption columns of a table, or None for the usual ones.
        splits: which images to take, where the file names splits.

    Returns:
        List of (image_id, caption). Captions without an image get an id of their own.

    Raises:
        UserError: the file is missing or has another form.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix == ".pkl" or path.is_dir():
        features = load_features(path)
        return list(zip(features.image_ids(), features.texts))
    text = read_text(path, MISSING)
    if suffix == ".jsonl" or suffix in TABLES and (caption_columns or not _names_pictures(text)):
        columns, rows = read_jsonl(path) if suffix == ".jsonl" else read_csv(path)
        wanted = find_caption_columns(columns, caption_columns, path)
        try:
            return _number([one for row in rows for column in wanted for one in texts_of(row.get(column))], path)
        except ValueError as error:
            raise UserError(f"{path} has a caption that is {error}; expected a text or a list of texts.") from error
    if suffix == ".json" and _is_list_of_texts(text):
        try:
            return _number(json.loads(text.removeprefix("\ufeff")), path)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}). Copy or make it again.") from error
    if suffix not in (*TABLES, ".json") and not HEADED.match(text):
        return _number(text.splitlines(), path)
    images = read_annotations(path, MISSING).images
    taken = [image for image in images if image.split is None or image.split in splits]
    if images and not taken:
        raise UserError(f"{path} has no captions of {', '.join(splits)}. Name its splits with --split.")
    return [(image.image_id, caption["caption"]) for image in taken for caption in image.captions]


def _names_pictures(text):
    """Whether a table has a column besides those with captions, by its heading."""
    heading = text.partition("\n")[0]
    columns = [column.strip(' "\r').lower() for column in heading.split(find_separator(heading))]
    return any(name.startswith(("image", "file")) for name in columns)


def _is_list_of_texts(text):
    """Whether a JSON document is a list of texts."""
    return re.match(r'\s*\[\s*"', text.removeprefix("\ufeff")) is not None


def _number(texts, path):
    """Name captions by their file and number."""
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} holds something else beside texts; expected captions only. Remove the rest.")
    return [(f"{printable_name(path.stem)}:{number}", text) for number, text in enumerate(texts)]


def encode_captions(tower, texts, batch_size):
    """Encode texts by a models.encoders.text.TextTower. Returns [N, J] float32 of norm 1, on the CPU."""
    import torch
    from tqdm import tqdm

    starts = tqdm(range(0, len(texts), batch_size), desc="encode", unit="batch", disable=None, leave=False)
    return torch.cat([tower.encode_text(texts[start : start + batch_size]).cpu() for start in starts])


def describe(tower, source):
    """Return the meta of a feature file of texts."""
    meta = {"encoder": tower.name, "modality": "text", "normalized": True, "source": source}
    if tower.parts.projection is not None:
        meta["picture_width"] = tower.parts.projection.in_features
    if tower.modality == "audio":  # how the captioner is to hear sounds
        from features.audio import sound_encoder
        from models.encoders import load_encoder

        meta["audio"] = sound_encoder(load_encoder(tower.name), "waveform").audio
    return meta


@one_line_errors
def main(argv=None):
    """Read the captions, encode them, write the feature file."""
    args = parse_options(argv)
    first = Path(args.captions[0])
    out = args.out or Path("data") / f"{printable_name(first.stem)}_{file_stem(args.clip_model_type)}_texts.pkl"
    resolve_output(out)
    captions = [pair for path in args.captions for pair in read_captions(path, args.caption_column, args.split)]
    captions = [(image_id, HALF_PAIR.sub("\ufffd", text)) for image_id, text in captions if text.strip()]
    if not captions:
        raise UserError(f"{first} holds no caption; expected texts. Give another file.")

    from models.encoders.text import require_text_tower

    with claim_output(out):
        tower = require_text_tower(args.clip_model_type, args.device, "parse_text.py")
        embedding = encode_captions(tower, [text for _, text in captions], args.batch_size)
        rows = [{"image_id": image_id, "caption": text, "clip_embedding": row} for row, (image_id, text) in enumerate(captions)]
        save_features(out, embedding, rows, describe(tower, printable_name(str(first))))
    print(f"{len(captions):,} captions -> {out} ({tower.width} wide, text tower of {tower.name})")
    print(f"next: python train.py --data {out} --noise_variance 0.016 --out_dir ./texts_train/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
