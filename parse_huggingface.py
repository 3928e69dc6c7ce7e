"""Any image-caption or audio-caption data set of Hugging Face → a feature file.

    python parse_huggingface.py kkcosmos/instagram-images-with-captions     # → data/instagram-images-with-captions_ViT-B_32_train.pkl
    python parse_huggingface.py kkcosmos/instagram-images-with-captions --split test     # → …_test.pkl, for train.py --val_data
    python parse_huggingface.py my_set/ --caption_column title --val_share 0.1
    python parse_huggingface.py big/set --streaming --max_rows 10000        # the first rows, without fetching the rest

A data set is a name on the Hub, a folder that save_to_disk wrote, a folder as load_dataset takes it, or one .parquet, .jsonl, .csv,
.arrow or .tar file. The columns are found by their types and usual names, or named. Each row is an image; where several rows
are captions of one image, --id_column names what they share. Captions are kept whole: train.py cuts what is too long.

Pictures stay in the data set's own files until they are encoded. With --streaming the rows are fetched first, one by one, into
{out}.rows, which takes the disk space of their pictures and is removed at the end. A run that was stopped goes on when started again.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import add_options, extract_options, whole_number_from_1
from features.own_data import add_own_data_options, encoder_for, extract_files, find_caption_columns, plan_files
from features.rows import fetched_records, lazy_records
from models.encoders import load_encoder
from models.weights import hub_is_reachable

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
SOUND_NAMES = ("audio", "sound", "wav", "flac", "mp3", "ogg", "audio_path")
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow", ".tar": "webdataset"}


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="parse_huggingface.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("dataset", metavar="NAME|FOLDER|FILE", help="name on the Hub, or a local folder or file")
    group.add_argument("--split", default="train", help="train, test, …, or a part such as train[:10%%] (default train)")
    group.add_argument("--config", metavar="NAME", help="configuration, of a data set that has several")
    group.add_argument("--streaming", action="store_true", help="fetch rows one by one, and only those needed")
    group.add_argument("--max_rows", type=whole_number_from_1, metavar="N", help="the first N rows only")
    group.add_argument("--image_column", metavar="NAME", help="column with pictures or sounds (default: found by type and usual names)")
    group.add_argument("--id_column", metavar="NAME", help="rows equal here are captions of one image, the first row's (default: none are)")
    add_own_data_options(parser)
    add_options(parser)
    return parser.parse_args(argv)


def open_data(name, split, config=None, streaming=False):
    """Name on the Hub, folder or file → Dataset, or IterableDataset when streaming. Raises UserError saying what was found, or not."""
    path = Path(name)
    offline = ""
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"no folder or file {name}. Check the path, or give a name on the Hub, such as owner/name.")
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE") or not hub_is_reachable(address):
            os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported: it then looks into its cache at once
            offline = (
                f"no data set {name}: no such folder, not in the library's cache, and the hub cannot be reached. Fetch it where it can, "
                f"with `hf download {name} --repo-type dataset --local-dir FOLDER`, and give FOLDER."
            )
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _saved_split(datasets.load_from_disk(name), name, split)
        if path.is_file():
            if path.suffix.lower() not in READERS:
                raise UserError(f"{name} is not a file of a data set; expected {', '.join(READERS)}. Give one, or the folder it lies in.")
            reader = READERS[path.suffix.lower()]
            return datasets.load_dataset(reader, data_files={split.split("[")[0]: name}, split=split, streaming=streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise UserError(offline) from error
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be read as a data set: {reason[:200]} Check the name, --split and --config.") from error


def _saved_split(data, name, split):
    """One split of what load_from_disk gave. Raises UserError naming those there are."""
    there = data if isinstance(data, dict) else {str(data.split or split): data}
    if split not in there:
        raise UserError(f"{name} has no split {split}; it has {', '.join(there)}. Name one with --split.")
    return there[split]


def find_item_column(columns, wanted, where):
    """Column names → features (None where unknown): the column of pictures or sounds → its name, "image" or "audio".

    Raises UserError naming the columns when it is not there, or none or several could be meant.
    """
    import datasets

    usual = (*IMAGE_NAMES, *SOUND_NAMES)
    kinds = {datasets.Image: "image", datasets.Audio: "audio"}
    typed = {name: kinds[type(feature)] for name, feature in columns.items() if type(feature) in kinds}
    if wanted is None:
        by_lower = {name.lower(): name for name in columns}
        candidates = list(typed) or [by_lower[name] for name in usual if name in by_lower][:1]
        if len(candidates) > 1:
            candidates = [name for name in candidates if name.lower() in ("image", "audio")]
        if len(candidates) != 1:
            found = "several columns" if len(typed) > 1 else "no column"
            raise UserError(f"{where} has {found} of pictures or sounds; it has {', '.join(columns)}. Name one with --image_column.")
        wanted = candidates[0]
    if wanted not in columns:
        raise UserError(f"{where} has no column {wanted}; it has {', '.join(columns)}. Name one with --image_column.")
    return wanted, typed.get(wanted, "audio" if wanted.lower() in SOUND_NAMES else "image")


def find_text_columns(columns, item, wanted, where):
    """As find_caption_columns; where no name is usual, the only column of texts besides `item`."""
    try:
        return find_caption_columns(columns, wanted, where)
    except UserError:
        texts = [name for name, feature in columns.items() if name != item and _is_text(feature)]
        if wanted or len(texts) != 1:
            raise
        return texts


def _is_text(feature):
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


def load_fast_encoder(*settings):
    """Load an encoder as load_encoder does, with faster operators."""
    from models.operators import accelerate_model  # imports torch, which --help does without

    encoder = load_encoder(*settings)
    accelerate_model(encoder.module)
    return encoder


class Columns(NamedTuple):
    """Which columns of a data set are what."""

    item: str
    kind: str  # "image" or "audio"
    captions: list  # of str


def find_columns(data, args, where):
    """Data set and options → Columns. Raises UserError naming the columns there are when one is missing."""
    columns = dict(data.features or dict.fromkeys(next(iter(data), ())))
    if not columns or getattr(data, "num_rows", None) == 0:
        raise UserError(f"{where} has no rows. Give another data set, or another --split.")
    if args.id_column not in (None, *columns):
        raise UserError(f"{where} has no column {args.id_column}; it has {', '.join(columns)}. Name one with --id_column.")
    item, kind = find_item_column(columns, args.image_column, where)
    return Columns(item, kind, find_text_columns(columns, item, args.caption_column, where))


def read_records(data, columns, args, out):
    """Data set → records; with --streaming its rows are fetched into {out}.rows first."""
    import datasets

    names = dict.fromkeys([columns.item, *columns.captions, *([args.id_column] if args.id_column else [])])
    data = data.select_columns(list(names))
    feature = (data.features or {}).get(columns.item)
    if isinstance(feature, (datasets.Image, datasets.Audio)):
        # Undecoded, a picture and a sound are the same: bytes and a path. Streamed, the library wants torchcodec even so for an Audio.
        data = data.cast_column(columns.item, datasets.Image(decode=False))
    path = Path(args.dataset)
    base = path if path.is_dir() else path.parent if path.is_file() else None
    if isinstance(data, datasets.IterableDataset):
        data = data.take(args.max_rows) if args.max_rows else data
        run = {"dataset": args.dataset, "config": args.config, "split": args.split, "columns": list(names), "max_rows": args.max_rows}
        return fetched_records(data, columns.item, columns.captions, args.id_column, base, rows_folder(out), run)
    data = data.select(range(min(args.max_rows or len(data), len(data))))
    return lazy_records(data, columns.item, columns.captions, args.id_column, base)


def rows_folder(out):
    """Where --streaming puts what it fetches for the feature file `out`."""
    return out.with_name(out.name + ".rows")


@one_line_errors
def main(argv=None):
    """Open the data set, find its columns, encode, write the feature file."""
    args = parse_options(argv)
    path = Path(args.dataset)
    name = path.stem if path.is_file() else path.resolve().name
    split = re.sub(r"[^\w.-]+", "_", args.split).strip("_")
    out = args.out or Path("data") / f"{name}_{file_stem(args.clip_model_type)}_{split}.pkl"
    data = open_data(args.dataset, args.split, args.config, args.streaming)
    columns = find_columns(data, args, f"{args.dataset} ({args.split})")
    noun = "pictures" if columns.kind == "image" else "sounds"
    print(f"{args.dataset} ({args.split}): {noun} in {columns.item}, captions in {', '.join(columns.captions)}")
    # Before the rows of a stream are fetched, which may take long: is the encoder there?
    encoder = encoder_for(columns.kind, load_fast_encoder, args)
    records = read_records(data, columns, args, out)
    files = plan_files(records, out, split, args.val_share, args.seed)
    extract_files(files, encoder, args.seed, source=args.dataset, **extract_options(args))
    shutil.rmtree(rows_folder(out), ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
