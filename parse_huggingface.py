"""Any image-caption or audio-caption data set of Hugging Face to a feature file.

    python parse_huggingface.py kkcosmos/instagram-images-with-captions     # data/instagram-images-with-captions_ViT-B_32_train.pkl
    python parse_huggingface.py kkcosmos/instagram-images-with-captions --split test     # ..._test.pkl, for train.py --val_data
    python parse_huggingface.py my_set/ --caption_column title --val_share 0.1
    python parse_huggingface.py captions.parquet --where language=en        # the rows with this value in a column
    python parse_huggingface.py big/set --streaming --max_rows 10000        # the first rows, without downloading the rest

A data set is a name on the Hub, a folder that save_to_disk wrote or load_dataset takes, or one .parquet, .jsonl, .csv, .arrow or .tar
file. The columns are found by their types and usual names, or named. Each row is an image; where several rows are captions of one
image, --id_column names what they share. Where a column called split holds the name that --split gives, only those rows are used. Captions
are kept whole: train.py cuts what is too long.

Pictures stay in the data set's own files until they are encoded. With --streaming the rows are first downloaded, one by one, into
{out}.rows, which takes the disk space of their pictures and is removed at the end. Interrupted jobs resume when you run the same command
again.
"""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError, one_line_errors
from features.encoder_names import file_stem
from features.extract import add_options, extract_options
from features.options import positive
from features.own_data import add_own_data_options, encoder_for, extract_files, plan_files
from features.processes import current, together
from features.rows import fetched_records, lazy_records, remove_rows
from features.tables import find_caption_columns
from models.encoders import ENCODER_HELP, load_encoder
from models.weights import hub_is_reachable

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
SOUND_NAMES = ("audio", "sound", "wav", "flac", "mp3", "ogg", "audio_path")
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow", ".tar": "webdataset"}


def parse_options(argv=None):
    """Read the command line."""
    parser = Parser(prog="parse_huggingface.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("dataset", metavar="NAME|FOLDER|FILE", help="name on the Hub, or a local folder or file")
    group.add_argument("--split", default="train", help="train, test, ..., or a part such as train[:10%%] (default train)")
    group.add_argument("--config", metavar="NAME", help="configuration of a data set that has several")
    group.add_argument("--where", metavar="COLUMN=VALUE", help="use only the rows with this value in a column")
    group.add_argument("--streaming", action="store_true", help="download rows one by one, and only those needed")
    group.add_argument("--max_rows", type=positive, metavar="N", help="use only the first N rows")
    group.add_argument("--image_column", metavar="NAME", help="column with pictures or sounds (default: found by type and usual names)")
    group.add_argument("--id_column", metavar="NAME",
                       help="column that rows of one image share (default: each row is an image)")  # fmt: skip
    add_own_data_options(parser)
    add_options(parser, ENCODER_HELP)
    args = parser.parse_args(argv)
    if args.where is not None and "=" not in args.where:
        parser.error(f"--where is {args.where}; expected COLUMN=VALUE, such as split=test")
    return args


def open_data(name, split, config=None, streaming=False):
    """Open a name on the Hub, a folder or a file.

    Returns:
        datasets.Dataset, or IterableDataset when streaming.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    path = Path(name)
    offline = ""
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"no folder or file {name}. Check the path, or give a name on the Hub, such as owner/name.")
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE") or not hub_is_reachable(address):
            os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported: it then looks into its cache at once
            offline = (
                f"no data set {name}: no such folder, not in the library's cache, and the hub cannot be reached. Download it where it can, "
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
    """Return one split of what load_from_disk gave. Raises UserError naming those that exist."""
    there = data if isinstance(data, dict) else {str(data.split or split): data}
    if split not in there:
        raise UserError(f"{name} has no split {split}; it has {', '.join(there)}. Name one with --split.")
    return there[split]


def find_item_column(columns, wanted, where):
    """Find the column of pictures or sounds.

    Args:
        columns: dict of column name to feature, None where unknown.
        wanted: the name that the user gave, or None.
        where: what the data set is called in an error.

    Returns:
        Its name, and "image" or "audio".

    Raises:
        UserError: it does not exist, or none or several could be meant; the message names the columns.
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
    """Find the caption columns as find_caption_columns does, or else the only column of texts besides `item`."""
    try:
        return find_caption_columns(columns, wanted, where)
    except UserError:
        texts = [name for name, feature in columns.items() if name != item and _is_text(feature)]
        if wanted or len(texts) != 1:
            raise
        return texts


def _is_text(feature):
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


def choose_rows(data, args, where):
    """Keep the rows that --where asks for, or else those whose column `split` holds the name that --split gives.

    Args:
        data: Dataset or IterableDataset.
        args: options with split and where.
        where: what the data set is called in messages.

    Returns:
        The data set with these rows only.

    Raises:
        UserError: there is no such column or no such row; the message names those that exist.
    """
    columns = list(data.features or next(iter(data), ()))
    if args.where:
        column, _, value = args.where.partition("=")
        if column not in columns:
            raise UserError(f"{where} has no column {column}; it has {', '.join(columns)}. Name one with --where.")
    elif "split" in columns:
        column, value = "split", args.split.split("[")[0]
    else:
        return data
    if not hasattr(data, "num_rows"):  # streaming
        return data.filter(lambda row: str(row[column]) == value)
    values = [str(one) for one in data[column]]
    chosen = [number for number, one in enumerate(values) if one == value]
    known = ", ".join(sorted(set(values))[:10])
    if not chosen:
        if not args.where and len(set(values)) < 2:
            return data
        raise UserError(f"{where} has no row with {column} {value}; there are {known}. Name one with --where {column}=VALUE.")
    if len(chosen) < len(values):
        print(f"{where}: {len(chosen)} of {len(values)} rows have {column} {value}")
    return data.select(chosen)


class Columns(NamedTuple):
    """Which columns of a data set are what."""

    item: str
    kind: str  # "image" or "audio"
    captions: list  # of str


def find_columns(data, args, where):
    """Find the columns of a data set. Returns Columns. Raises UserError, which names the columns, when one is missing."""
    columns = dict(data.features or dict.fromkeys(next(iter(data), ())))
    if not columns or getattr(data, "num_rows", None) == 0:
        raise UserError(f"{where} has no rows. Give another data set, or another --split.")
    if args.id_column not in (None, *columns):
        raise UserError(f"{where} has no column {args.id_column}; it has {', '.join(columns)}. Name one with --id_column.")
    item, kind = find_item_column(columns, args.image_column, where)
    return Columns(item, kind, find_text_columns(columns, item, args.caption_column, where))


def read_records(data, columns, args, out):
    """Return the records of a data set; with --streaming its rows are first downloaded into {out}.rows."""
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
        run = {name: getattr(args, name) for name in ("dataset", "config", "split", "where", "max_rows")} | {"columns": list(names)}
        return fetched_records(data, columns.item, columns.captions, args.id_column, base, rows_folder(out), run)
    data = data.select(range(min(args.max_rows or len(data), len(data))))
    return lazy_records(data, columns.item, columns.captions, args.id_column, base)


def rows_folder(out):
    """Return the folder in which --streaming keeps what it downloads for the feature file `out`."""
    return out.with_name(out.name + ".rows")


@one_line_errors
@together
def main(argv=None):
    """Open the data set, find its columns, encode, write the feature file."""
    args = parse_options(argv)
    path = Path(args.dataset)
    name = path.stem if path.is_file() else os.path.basename(os.path.realpath(path))
    split = re.sub(r"[^\w.-]+", "_", args.split).strip("_")
    out = args.out or Path("data") / f"{name}_{file_stem(args.clip_model_type)}_{split}.pkl"

    from models.operators import accelerate_model  # imports torch, which --help does without

    where = f"{args.dataset} ({args.split})"
    data = choose_rows(open_data(args.dataset, args.split, args.config, args.streaming), args, where)
    columns = find_columns(data, args, where)
    noun = "pictures" if columns.kind == "image" else "sounds"
    print(f"{where}: {noun} in {columns.item}, captions in {', '.join(columns.captions)}")
    # Before the rows of a stream are downloaded, which may take long: does the encoder exist?
    encoder = encoder_for(columns.kind, load_encoder, args)
    accelerate_model(encoder.module)
    with current().claim(rows_folder(out)) if args.streaming else contextlib.nullcontext():
        records = read_records(data, columns, args, out)
        files = plan_files(records, out, split, args.val_share, args.seed)
        extract_files(files, encoder, args.seed, source=args.dataset, **extract_options(args))
        current().first_does(remove_rows, rows_folder(out))


if __name__ == "__main__":
    sys.exit(main())
