"""Clotho's sounds and captions to a feature file: each clip is encoded once, with all its captions beside it.

The published data set (the CSV and the unpacked clips in data/), as published; to data/clotho/oscar_split_ViT-B_32_train.pkl, 512 wide:

    python parse_clotho.py --clip_model_type ViT-B/32 --captions_path ./data/clotho_captions_development.csv --audio_path ./data/development

Clotho's validation and evaluation parts give ..._val.pkl and ..._test.pkl, by the names of their CSV files; or give --out:

    python parse_clotho.py --captions_path data/clotho_captions_validation.csv --audio_path data/validation
    python parse_clotho.py --captions_path data/clotho_captions_evaluation.csv --audio_path data/evaluation

A picture encoder sees log-mel windows that cover the clip, and a clip's embedding is the mean over them. `--spectrogram published
--captions first` restores the published picture and the one caption per clip that it had. A sound encoder (--clip_model_type clap:...)
hears the waveform. Any wav, flac, mp3 or ogg is read, of any sample rate, mono or stereo. Interrupted jobs resume when you run the same
command again. Clips that cannot be read are skipped and listed in {out}.skipped.csv. docs/audio.md says more.
"""

import os
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from features.annotation_tables import read_clotho
from features.audio import SPECTROGRAMS, is_sound, sound_encoder
from features.encoder_names import file_stem
from features.extract import Record, add_options, check_images, extract, extract_options
from features.finder import FileFinder
from features.own_data import suggest_next
from features.processes import together
from features.tables import plain_name
from models.encoders import ENCODER_HELP, load_encoder

CAPTIONS = Path("data/clotho_captions_development.csv")
AUDIO = Path("data/development")
MISSING = "Give them with --captions_path, or fetch them as data/README.md says."
# Parts of Clotho, by a word in the name of the CSV.
SPLITS = {"development": "train", "validation": "val", "evaluation": "test", "train": "train", "val": "val", "test": "test"}


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_clotho.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--captions_path", type=Path, default=CAPTIONS, metavar="CSV", help=f"captions (default {CAPTIONS})")
    group.add_argument("--audio_path", type=Path, default=AUDIO, metavar="FOLDER", help=f"folder of the sounds (default {AUDIO})")
    group.add_argument("--captions", choices=("all", "first"), default="all",
                       help="which captions of a clip to keep; the published code kept the first (default all)")  # fmt: skip
    group.add_argument("--spectrogram", choices=SPECTROGRAMS,
                       help="mel: windows that cover the clip; published: the published picture; waveform: for encoders of sounds "
                            "(default mel, or waveform for those)")  # fmt: skip
    add_options(parser, ENCODER_HELP)
    return parser.parse_args(argv)


class SoundFinder:
    """Finds the clips of one folder, also under the names of another sound format."""

    def __init__(self, folder):
        """Raises UserError when there is no such folder."""
        if not folder.is_dir():
            raise UserError(f"no audio folder {folder}. Give it with --audio_path, or unpack the sounds there as data/README.md says.")
        self.folder = folder
        self.finder = FileFinder([folder])
        self.stems = {_stem(name): name for name in sorted(os.listdir(folder), reverse=True) if is_sound(name)}

    def find(self, name):
        """Return the path of a clip; where it should be when it does not exist."""
        return self.finder.find(name) or str(self.folder / self.stems.get(_stem(name), name))


def _stem(name):
    return os.path.splitext(plain_name(name))[0].strip()


def default_out(captions, clip_model_type):
    """Return the published name of the feature file, with val or test for captions that are named so, and the split."""
    split = next((split for word, split in SPLITS.items() if word in captions.stem.lower()), "train")
    return Path("data/clotho") / f"oscar_split_{file_stem(clip_model_type)}_{split}.pkl", split


@one_line_errors
@together
def main(argv=None):
    """Read the captions, find the sounds, encode them, write the feature file."""
    args = parse_options(argv)

    from models.operators import accelerate_model  # imports torch, which --help does without

    sounds = read_clotho(args.captions_path, args.captions, MISSING).images
    finder = SoundFinder(args.audio_path)
    records = [
        Record(sound.image_id, finder.find(sound.file_name), [{"file_name": sound.file_name, **row} for row in sound.captions])
        for sound in sounds
    ]
    check_images(records, args.max_skipped, "sounds")
    encoder = load_encoder(args.clip_model_type, args.device, args.mixed_precision)
    accelerate_model(encoder.module)
    encoder = sound_encoder(encoder, args.spectrogram, args.pooling)
    out, split = default_out(args.captions_path, args.clip_model_type)
    out = args.out or out
    extract(records, encoder, out, source=args.captions_path, split=split, **extract_options(args))
    suggest_next({split: out}, "./clotho_train/")


if __name__ == "__main__":
    sys.exit(main())
