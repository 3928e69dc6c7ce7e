"""Data sets that have a plain address: fetched, checked, and laid out as the parse scripts expect them.

    python data/download.py coco2014       # pictures and COCO's captions, 20 GB       → data/coco
    python data/download.py coco2017       # the same pictures dealt out anew, 20 GB   → data/coco
    python data/download.py annotations    # the published train_caption.json          → data/coco/annotations
    python data/download.py karpathy       # Karpathy's splits of COCO and Flickr      → data/coco/annotations
    python data/download.py clotho         # sounds and their captions                 → data/development, data/clotho_captions_….csv
    python data/download.py flickr8k       # pictures and captions, 1.1 GB             → data/flickr8k

Run from the repository's root; several names may follow one another. A download that was stopped (Ctrl-C, a lost line) goes on where it
was when started again; what is there and whole is left as it is. Checked are the size, the checksum where one is known, and after
unpacking the number of files. Archives are removed unless --keep_archives. Clotho's are .7z: p7zip (7z) or libarchive (bsdtar) is needed.
"""

import dataclasses
import hashlib
import http.client
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PureWindowsPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, one_line_errors  # noqa: E402

COCO = "http://images.cocodataset.org"
KARPATHY = "http://cs.stanford.edu/people/karpathy/deepimagesent"
CLOTHO = "https://zenodo.org/records/3490684/files"  # version 1: 2,893 clips for development, as the published recipe has
CLOTHO_2 = "https://zenodo.org/records/4783391/files"  # version 2.1, which added the clips for validation
FLICKR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
PAUSES = (1, 5, 20, 60)  # seconds before each new attempt
SPARE = 500_000_000  # bytes of disk left free


@dataclasses.dataclass(frozen=True)
class Item:
    """A file to fetch. Its final form is `count` files matching `files` under the data folder, or one JSON list of `count` entries."""

    name: str  # of the file on its server
    base: str  # its address without the name; "drive:ID" for Google Drive
    place: str  # folder under the data folder that the file, or what is in the archive, goes to
    files: str = ""  # glob under `place` of what has to be there at the end; "" where the file itself is the end
    count: int = 0
    size: int | None = None  # bytes
    md5: str | None = None

    @property
    def archive(self):
        """Is it unpacked?"""
        return self.name.endswith((".zip", ".7z"))


DATA_SETS = {
    "coco2014": [
        Item("annotations_trainval2014.zip", f"{COCO}/annotations", "coco", "annotations/captions_*2014.json", 2, 252_872_794),
        Item("val2014.zip", f"{COCO}/zips", "coco", "val2014/*.jpg", 40_504, 6_645_013_297),
        Item("train2014.zip", f"{COCO}/zips", "coco", "train2014/*.jpg", 82_783, 13_510_573_713),
    ],
    "coco2017": [
        Item("annotations_trainval2017.zip", f"{COCO}/annotations", "coco", "annotations/captions_*2017.json", 2, 252_907_541),
        Item("val2017.zip", f"{COCO}/zips", "coco", "val2017/*.jpg", 5_000, 815_585_330),
        Item("train2017.zip", f"{COCO}/zips", "coco", "train2017/*.jpg", 118_287, 19_336_861_798),
    ],
    "annotations": [Item("train_caption.json", "drive:1D3EzUK1d1lNhD2hAvRiKPThidiVbP2K_", "coco/annotations", count=566_747)],
    "karpathy": [Item("caption_datasets.zip", KARPATHY, "coco/annotations", "dataset_*.json", 3)],
    "clotho": [
        Item("clotho_captions_development.csv", CLOTHO, ".", md5="dd568352389f413d832add5cf604529f"),
        Item("clotho_captions_validation.csv", CLOTHO_2, ".", md5="5879e023032b22a2c930aaa0528bead4"),
        Item("clotho_captions_evaluation.csv", CLOTHO, ".", md5="1b16b9e57cf7bdb7f13a13802aeb57e2"),
        Item("clotho_audio_development.7z", CLOTHO, ".", "development/*.wav", 2_893, md5="e3ce88561b317cc3825e8c861cae1ec6"),
        Item("clotho_audio_validation.7z", CLOTHO_2, ".", "validation/*.wav", 1_045, md5="7dba730be08bada48bd15dc4e668df59"),
        Item("clotho_audio_evaluation.7z", CLOTHO, ".", "evaluation/*.wav", 1_045, md5="4569624ccadf96223f19cb59fe4f849f"),
    ],
    "flickr8k": [
        Item("Flickr8k_text.zip", FLICKR, "flickr8k", "Flickr8k.token.txt", 1, md5="bf6c1abcb8e4a833b7f922104de18627"),
        Item("Flickr8k_Dataset.zip", FLICKR, "flickr8k", "Flicker8k_Dataset/*.jpg", 8_091, md5="f18a1e2920de5bd84dae7cf08ec78978"),
    ],
}


def parse_options(argv=None):
    """Command line → options."""
    parser = Parser(prog="download.py", description=__doc__)
    parser.add_argument("names", nargs="+", choices=tuple(DATA_SETS), metavar="NAME", help=" ".join(DATA_SETS))
    parser.add_argument("--folder", type=Path, default=Path("data"), metavar="FOLDER", help="the data folder (default data)")
    parser.add_argument("--keep_archives", action="store_true", help="keep archives that were unpacked")
    parser.add_argument("--mirror", metavar="URL", help="fetch every file from URL/FILE instead of its own host")
    return parser.parse_args(argv)


def get(item, folder, mirror=None, keep_archives=False):
    """Bring one item into `folder`, unless it is there. Raises UserError naming what went wrong; what was fetched stays."""
    place = folder / item.place
    target = place / item.name
    if item.files and len(list(place.glob(item.files))) == item.count or not item.archive and target.is_file():
        print(f"{item.name}: there")
        return
    if item.name.endswith(".7z"):
        find_unpacker(item)
    place.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        if mirror or not item.base.startswith("drive:"):
            fetch(f"{(mirror or item.base).rstrip('/')}/{item.name}", target, item.size, item.md5, item.archive)
        else:
            fetch_from_drive(item.base.removeprefix("drive:"), target)
    if not item.archive:
        check_list(item, target)
    else:
        unpack(item, target, place)
        if not keep_archives:
            target.unlink()
    print(f"{item.name} → {place / item.files}, {item.count:,} files as expected" if item.archive else f"{item.name} → {target}")


def fetch(address, target, size=None, md5=None, unpacked_too=False):
    """Fetch `address` into `target` through {target}.part, going on where that ends.

    size, md5: what is expected, None where unknown; unpacked_too: the disk must hold as much again. Raises UserError.
    """
    part = target.with_name(target.name + ".part")
    failure = None
    for pause in (0, *PAUSES):
        if failure:
            print(f"{failure}; trying again in {pause} s", file=sys.stderr)
        time.sleep(pause)
        try:
            total = _fetch_on(address, part, size, unpacked_too)
        except urllib.error.HTTPError as error:
            raise UserError(f"{address} answered {error.code} {error.reason}. Has it moved? data/README.md has more addresses.") from error
        except (OSError, http.client.HTTPException) as error:  # no network, a lost line, a time-out
            failure = f"{address} stopped: {getattr(error, 'reason', error)}"
            continue
        if total is None or part.stat().st_size == total:
            break
        failure = f"{address} ended at {part.stat().st_size:,} of {total:,} bytes"
    else:
        kept = f"{part.stat().st_size:,} bytes are kept" if part.is_file() else "nothing is lost"
        raise UserError(f"{failure}; {kept}. Run the same command again to go on.")
    with open(part, "rb") as file:
        right = not md5 or hashlib.file_digest(file, "md5").hexdigest() == md5
    if not right:
        part.unlink()
        raise UserError(f"{address} has the checksum of another file than the one expected, and was removed. Fetch it again.")
    os.replace(part, target)


def _fetch_on(address, part, size, unpacked_too):
    """Append what is missing of `address` to `part` → its total size, None where the server does not say."""
    from tqdm import tqdm

    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"User-Agent": "prefixcap", **({"Range": f"bytes={start}-"} if start else {})})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is as long as the file, or longer than it
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(start):
            part.unlink()
            raise ConnectionError("what was kept is not of this file; starting anew") from error
        return start
    with answer:
        if start and answer.status != 206:
            start = 0  # a server that knows no ranges sends the whole
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if size and total and total != size:
            raise UserError(f"{address} has {total:,} bytes, and {size:,} are expected: it changed, or this is another page. Look there.")
        needed = (total or size or 0) * (2 if unpacked_too else 1) - start + SPARE
        free = shutil.disk_usage(part.parent).free
        if free < needed:
            raise UserError(f"{part.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed. Make room, or give --folder.")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=address.rpartition("/")[2], disable=None)
        with bar, open(part, "ab" if start else "wb") as file:
            while block := answer.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    return total


def fetch_from_drive(drive_id, target):
    """Fetch a Google Drive file with gdown, which goes on by itself where a stopped one ended. Raises UserError."""
    import gdown
    from gdown.exceptions import DownloadError

    address = f"https://drive.google.com/uc?id={drive_id}"
    part = target.with_name(target.name + ".part")
    try:
        gdown.download(address, str(part), resume=True, timeout=TIMEOUT, retries=len(PAUSES))
    except (DownloadError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[0]
        raise UserError(f"{address} could not be fetched ({reason}). Open it in a browser, and put the file at {target}.") from error
    os.replace(part, target)


def check_list(item, path):
    """Raise UserError when a JSON item is no list of as many captions as expected; the file is set aside as {path}.wrong."""
    if not item.name.endswith(".json"):
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, list) or len(found) != item.count:
        what = f"a list of {len(found):,}" if isinstance(found, list) else "no JSON list"
        os.replace(path, path.with_name(path.name + ".wrong"))
        raise UserError(f"{path} is {what}; expected {item.count:,} captions. It is kept as {path.name}.wrong: look into it, fetch again.")


def find_unpacker(item):
    """A function of archive and folder → command line of the program here that unpacks .7z. Raises UserError where none is."""
    for name in ("7z", "7zz", "7za", "7zr"):
        if shutil.which(name):
            return lambda archive, folder: [name, "x", "-y", "-bso0", f"-o{folder}", str(archive)]
    if shutil.which("bsdtar"):
        return lambda archive, folder: ["bsdtar", "-xf", str(archive), "-C", str(folder)]
    raise UserError(
        f"{item.name} needs a program that unpacks .7z, and none is here. Install p7zip (apt install p7zip-full, brew install p7zip, "
        "conda install -c conda-forge p7zip) and run the same command again."
    )


def unpack(item, archive, place):
    """Unpack beside the place, count, and only then move it in. Raises UserError; until then nothing in `place` is touched."""
    temporary = place / f".unpacking-{archive.stem}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if archive.suffix == ".zip":
            unpack_zip(archive, temporary)
        else:
            done = subprocess.run(find_unpacker(item)(archive, temporary), capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"{archive} could not be unpacked ({reason}). Remove it and fetch it again.")
        links = [path for path in temporary.rglob("*") if path.is_symlink()]
        if links:
            raise UserError(f"{archive} holds a link, {links[0].name}, which no data set has: refused. Remove it and fetch it again.")
        count = len(list(temporary.glob(item.files)))
        if count != item.count:
            raise UserError(f"{archive} holds {count:,} files {item.files}, and {item.count:,} are expected. Remove it and fetch it again.")
        _move_in(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unpack_zip(archive, folder):
    """Unpack a zip into `folder`, refusing names that lead out of it, and links. Raises UserError."""
    from tqdm import tqdm

    if not zipfile.is_zipfile(archive):
        raise UserError(f"{archive} is not a zip: a page that says why, maybe. Look into it, remove it and fetch it again.")
    with zipfile.ZipFile(archive) as packed:
        members = [member for member in packed.infolist() if not member.filename.startswith("__MACOSX/")]
        for member in members:
            path = PureWindowsPath(member.filename)  # knows / and \\ and drives
            if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{archive} wants to write outside its folder ({member.filename!r}): refused. Do not trust it.")
        needed, free = sum(member.file_size for member in members) + SPARE, shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed to unpack {archive}. Make room.")
        try:
            for member in tqdm(members, unit=" files", desc=f"unpacking {archive.name}", disable=None):
                packed.extract(member, folder)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise UserError(f"{archive} is damaged ({error}). Remove it and fetch it again.") from error


def _move_in(source, target):
    """Move what is in `source` to `target`: a folder that is not there yet by one rename, else what is in it, file by file."""
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir():
            _move_in(path, there)
        else:
            os.replace(path, there)


@one_line_errors
def main(argv=None):
    """Bring the named data sets into the data folder."""
    args = parse_options(argv)
    try:
        for name in dict.fromkeys(args.names):
            for item in DATA_SETS[name]:
                get(item, args.folder, args.mirror, args.keep_archives)
    except KeyboardInterrupt:
        print("stopped: what was fetched is kept; run the same command again to go on.", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
