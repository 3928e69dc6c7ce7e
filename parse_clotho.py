"""Clotho's sounds and captions → a feature file: each clip encoded once, all its captions beside it.

The published data set (the CSV and the unpacked clips in data/), as published:

    python parse_clotho.py --clip_model_type ViT-B/32 --captions_path ./data/clotho_captions_development.csv --audio_path ./data/development
                                                    # → data/clotho/oscar_split_ViT-B_32_train.pkl, 512 wide

Clotho's validation and evaluation parts give …_val.pkl and …_test.pkl, by their names; or --out:

    python parse_clotho.py --captions_path data/clotho_captions_validation.csv --audio_path data/validation
    python parse_clotho.py --captions_path data/clotho_captions_evaluation.csv --audio_path data/evaluation

A picture encoder sees log-mel windows that cover the clip, and a clip's embedding is the mean over them; --spectrogram published
--captions first restores the published picture and the one caption a clip that it had. A sound encoder (--clip_model_type clap:…) hears
the waveform. Any wav, flac, mp3 or ogg, of any sample rate, mono or stereo, does. A run that was stopped goes on when started again.
Clips that cannot be read are skipped and listed in {out}.skipped.csv. docs/audio.md says more.
"""

import csv
import html
import io
import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.audio import SPECTROGRAMS, is_sound, sound_encoder
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from models.encoders import load_encoder

CAPTIONS = Path("data/clotho_captions_development.csv")
AUDIO = Path("data/development")
ENCODINGS = ("utf-8-sig", "cp1252", "latin-1")  # cp1252 is latin-1 with quotation marks where that has control characters
SHAPE = "the columns file_name and caption_1 … caption_5, as Clotho has them"
# Parts of Clotho, by a word in the name of the CSV.
SPLITS = {"development": "train", "validation": "val", "evaluation": "test", "train": "train", "val": "val", "test": "test"}


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_clotho.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--captions_path", type=Path, default=CAPTIONS, metavar="CSV", help=f"captions (default {CAPTIONS})")
    group.add_argument("--audio_path", type=Path, default=AUDIO, metavar="FOLDER", help=f"folder of the sounds (default {AUDIO})")
    group.add_argument("--captions", choices=("all", "first"), default="all", help="of a clip; first, as published (default all)")
    group.add_argument("--spectrogram", choices=SPECTROGRAMS,
                       help="mel: windows that cover the clip; published: the published picture; waveform: for encoders of sounds "
                            "(default mel, or waveform for those)")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def read_captions(path, which="all"):
    """Captions CSV in utf-8 or latin-1 → {image_id: [caption rows]}, in the file's order; which: "all" captions of a clip or the "first".

    A caption row has image_id (the clip's name without HTML escapes and spaces around it), file_name as the CSV has it, and caption.
    Raises UserError when the file is missing, is no CSV, or lacks the columns, naming those it has.
    """
    if not path.is_file():
        raise UserError(f"no captions {path}. Give them with --captions_path, or fetch them as data/README.md says.")
    data = path.read_bytes()
    for encoding in ENCODINGS:
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        columns = {(name or "").strip(): name for name in reader.fieldnames or ()}
        numbered = sorted((name for name in columns if re.fullmatch(r"caption_\d+", name)), key=lambda name: int(name[8:]))
        if "file_name" not in columns or not numbered:
            found = ", ".join(repr(name[:40]) for name in list(columns)[:12]) or "none: it is empty"
            raise UserError(f"{path} has the columns {found}; expected {SHAPE}. Give another file with --captions_path.")
        numbered = numbered[:1] if which == "first" else numbered
        sounds = {}
        for row in reader:
            name = (row[columns["file_name"]] or "").strip()
            texts = [row[columns[column]] or "" for column in numbered]
            if not name:
                raise UserError(f"{path} has no file_name in line {reader.line_num}; expected {SHAPE}. Mend or remove that line.")
            image_id = _plain(name)
            sounds.setdefault(image_id, []).extend({"image_id": image_id, "file_name": name, "caption": text} for text in texts)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV ({error}, line {reader.line_num}); expected {SHAPE}. Download it again.") from error
    return sounds


class SoundFinder:
    """Finds the clips of one folder, listed once, by names that differ from the files' in HTML escapes, spaces or format."""

    def __init__(self, folder):
        """Raises UserError when there is no such folder."""
        if not folder.is_dir():
            raise UserError(f"no audio folder {folder}. Give it with --audio_path, or unpack the sounds there as data/README.md says.")
        self.folder = folder
        names = sorted(os.listdir(folder))
        self.names = set(names)
        self.plain = {_plain(name): name for name in reversed(names)}
        self.stems = {_plain(Path(name).stem): name for name in reversed(names) if is_sound(name)}

    def find(self, name):
        """A file name as the captions have it → path; where it should be when it is nowhere."""
        if name not in self.names:
            name = self.plain.get(_plain(name)) or self.stems.get(_plain(Path(name).stem)) or name
        return str(self.folder / name)


def _plain(name):
    """A name without HTML escapes and spaces around it, accents composed: what "rain&amp;storm.wav " and "rain&storm.wav" share."""
    stem, suffix = os.path.splitext(html.unescape(unicodedata.normalize("NFC", name)).strip())
    return stem.strip() + suffix


def default_out(captions, clip_model_type):
    """The published name of the feature file, with val or test for captions named so. → path, split"""
    split = next((split for word, split in SPLITS.items() if word in captions.stem.lower()), "train")
    return Path("data/clotho") / f"oscar_split_{file_stem(clip_model_type)}_{split}.pkl", split


@one_line_errors
def main(argv=None):
    """Read captions, find the sounds, encode them, write the feature file."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    sounds = read_captions(args.captions_path, args.captions)
    finder = SoundFinder(args.audio_path)
    records = [Record(image_id, finder.find(rows[0]["file_name"]), rows) for image_id, rows in sounds.items()]
    check_images(records, args.max_skipped, "sounds")
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision)
    accelerate_model(encoder.module)
    encoder = sound_encoder(encoder, args.spectrogram, args.pooling)
    out, split = default_out(args.captions_path, args.clip_model_type)
    out = args.out or out
    extract(records, encoder, out, source=args.captions_path, split=split, **extract_options(args))
    print(f"next: python train.py --data {shlex.quote(str(out))} --out_dir ./clotho_train/")


if __name__ == "__main__":
    sys.exit(main())
