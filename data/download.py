"""Download data sets that have a plain address, check them, and lay them out as the parse scripts expect them.

    python data/download.py coco2014       # pictures and COCO's captions, 20 GB: data/coco
    python data/download.py coco2017       # the same pictures in other splits, 20 GB: data/coco
    python data/download.py annotations    # the published train_caption.json: data/coco/annotations
    python data/download.py karpathy       # Karpathy's splits of COCO and Flickr: data/coco/annotations
    python data/download.py clotho         # sounds and their captions: data/development, data/clotho_captions_....csv
    python data/download.py flickr8k       # pictures and captions, 1.1 GB: data/flickr8k

Run this from the root of the repository; several names may follow one another. Interrupted downloads resume when you run the same command
again, if the file on the server is still the same; otherwise they start over. Complete files are left as they are. The script checks
sizes, checksums where they are known, and the number of files after unpacking. Archives are removed unless you give --keep_archives.
Clotho's are .7z, which needs p7zip (7z) or libarchive (bsdtar).
"""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, claim_output, one_line_errors, resolve_output  # noqa: E402
from data.part import CONTENT_RANGE, Part  # noqa: E402
from data.unpack import SPARE, find_unpacker, unpack  # noqa: E402

COCO = "http://images.cocodataset.org"
KARPATHY = "http://cs.stanford.edu/people/karpathy/deepimagesent"
CLOTHO = "https://zenodo.org/records/3490684/files"  # version 1: 2,893 clips for development, as the published recipe has
CLOTHO_2 = "https://zenodo.org/records/4783391/files"  # version 2.1, which added the clips for validation
FLICKR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
PAUSES = (1, 5, 20, 60)  # seconds before each new attempt


@dataclasses.dataclass(frozen=True)
class Item:
    """A file to download.

    Attributes:
        name: of the file on its server.
        base: its address without the name; "drive:ID" for Google Drive.
        place: folder under the data folder that the file, or the content of the archive, goes to.
        files: glob under `place` of what an archive holds.
        count: number of these files; of a JSON list the number of its entries.
        size: bytes, None where unknown.
        md5: checksum, None where unknown.
    """

    name: str
    base: str
    place: str
    files: str = ""
    count: int = 0
    size: int | None = None
    md5: str | None = None

    @property
    def archive(self):
        """Whether it is to be unpacked."""
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
    """Read the command line."""
    parser = Parser(prog="download.py", description=__doc__)
    parser.add_argument("names", nargs="+", choices=tuple(DATA_SETS), metavar="NAME", help=f"data sets: {', '.join(DATA_SETS)}")
    parser.add_argument("--folder", type=Path, default=Path("data"), metavar="FOLDER", help="the data folder (default data)")
    parser.add_argument("--keep_archives", action="store_true", help="keep archives after unpacking them (default off)")
    parser.add_argument("--mirror", metavar="URL", help="download every file from URL/FILE (default: from its own host)")
    args = parser.parse_args(argv)
    if args.mirror and not re.fullmatch(r"https?://[!-.0-~][!-~]*", args.mirror):
        parser.error(f"--mirror is {args.mirror!a}; expected http://... or https://...")
    return args


def get(item, folder, mirror=None, keep_archives=False):
    """Bring one item into the data folder, unless it is there.

    Raises:
        UserError: it cannot be downloaded or is not what is expected; downloaded parts are kept.
    """
    place = folder / item.place
    target = place / item.name
    if item.archive and len(list(place.glob(item.files))) == item.count or not item.archive and target.is_file():
        print(f"{item.name}: there")
        return
    if item.name.endswith(".7z"):
        find_unpacker(item.name)
    with claim_output(target):
        if not target.is_file():
            resolve_output(target)  # a folder or a FIFO of that name is an error
            if mirror or not item.base.startswith("drive:"):
                fetch(f"{(mirror or item.base).rstrip('/')}/{item.name}", target, item.size, item.md5, item.archive)
            else:
                fetch_from_drive(item.base.removeprefix("drive:"), target)
        if item.archive:
            unpack(target, place, item.files, item.count)
            if not keep_archives:
                target.unlink()
        else:
            check_list(item, target)
    print(f"{item.name} -> {place / item.files}, {item.count:,} files as expected" if item.archive else f"{item.name} -> {target}")


def fetch(address, target, size=None, md5=None, unpacked_too=False):
    """Download a file into {target}.part, resuming where that ends, and rename it when it is complete.

    Args:
        address: http or https.
        target: path of the file.
        size: expected bytes, None where unknown.
        md5: expected checksum, None where unknown.
        unpacked_too: whether the disk must hold as much again.

    Raises:
        UserError: the server does not give the file, or gives another one.
    """
    part = Part(address, target)
    failure = None
    for pause in (0, *PAUSES):
        if failure:
            print(f"{failure}; trying again in {pause} s", file=sys.stderr)
        time.sleep(pause)
        try:
            total = _fetch_rest(address, part, size, md5, unpacked_too)
        except urllib.error.HTTPError as error:
            raise UserError(f"{address} answered {error.code} {error.reason}. Has it moved? data/README.md has more addresses.") from error
        except UserError:
            raise
        except (OSError, http.client.HTTPException) as error:  # no network, a lost connection, a time-out
            reason = getattr(error, "reason", error)
            if isinstance(reason, socket.gaierror) and failure:  # it was asked for twice
                raise UserError(f"{address}: no such host, or no network ({reason.strerror}). Run the same command again.") from error
            failure = f"{address} stopped: {reason}"
            continue
        except ValueError as error:  # of a name that no host can have
            raise UserError(f"{address} is no address ({error}). Check --mirror.") from error
        if total is None or part.length() == total:
            break
        failure = f"{address} ended at {part.length():,} of {total:,} bytes"
    else:
        kept = f"{part.length():,} bytes are kept" if part.length() else "nothing was kept"
        raise UserError(f"{failure}; {kept}. Run the same command again to resume.")
    if size and part.length() != size:
        found = f"{part.length():,} bytes; expected {size:,}"
        part.remove()
        raise UserError(f"{address} gave {found}. The file was removed; download it again.")
    with open(part.path, "rb") as file:
        right = not md5 or hashlib.file_digest(file, "md5").hexdigest() == md5
    if not right:
        part.remove()
        raise UserError(f"{address} has the checksum of another file than the one expected, and was removed. Download it again.")
    os.replace(part.path, target)
    part.remove()


def _fetch_rest(address, part, size, md5, unpacked_too):
    """Download what is missing of a file. A part that could be of another file is not resumed.

    Returns:
        Bytes of the whole file, None where the server does not say.
    """
    from tqdm import tqdm

    if part.length() and (part.length() > (part.total or part.length()) or not (part.validator or md5)):
        part.remove()  # too long, or nothing could show that the rest belongs to it
    start = part.length()
    if start and start == part.total:
        return part.total
    headers = {"User-Agent": "prefixcap"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"If-Range": part.validator} if start and part.validator else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        part.remove()
        raise ConnectionError("the file on the server is another one by now; starting over") from error
    with answer:
        if start and answer.status == 206:
            if not part.is_continued(answer.headers):
                part.remove()
                raise ConnectionError("the server sent something else than the rest of this file; starting over")
            total = int(CONTENT_RANGE.fullmatch(answer.headers["Content-Range"])[3])
        elif answer.status == 200:  # also where the file has changed, and of a server without ranges
            start, total = 0, answer.length
        else:
            raise ConnectionError(f"the server answered {answer.status}; expected 200")
        if size and total is not None and total != size:
            raise UserError(f"{address} has {total:,} bytes; expected {size:,}. It has changed, or is another page. Look at it.")
        needed = (total or size or 0) * (2 if unpacked_too else 1) - start + SPARE
        free = shutil.disk_usage(part.path.parent).free
        if free < needed:
            raise UserError(f"{part.path.parent} has {free / 1e9:.1f} GB free; needed are {needed / 1e9:.1f}. Make room, or give --folder.")
        if not start:
            part.begin(answer.headers, total)
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=address.rpartition("/")[2], disable=None)
        with bar, open(part.path, "ab") as file:
            while block := answer.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    return total


def fetch_from_drive(drive_id, target):
    """Download a file of Google Drive with gdown. An interrupted download starts over. Raises UserError."""
    import gdown
    from gdown.exceptions import DownloadError

    address = f"https://drive.google.com/uc?id={drive_id}"
    part = target.with_name(target.name + ".part")
    try:
        # Not resumed: after a restart nothing would show that the file is still the same.
        gdown.download(address, str(part), resume=False, timeout=TIMEOUT, retries=len(PAUSES))
    except (DownloadError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[0]
        raise UserError(f"{address} could not be downloaded ({reason}). Open it in a browser, and put the file at {target}.") from error
    finally:
        for leftover in part.parent.glob(f"{part.name}????????.part"):  # gdown's own
            with contextlib.suppress(OSError):
                leftover.unlink()
    os.replace(part, target)


def check_list(item, path):
    """Raise UserError where a JSON item is not a list of as many captions as expected; the file is then renamed to {path}.wrong."""
    if not item.name.endswith(".json"):
        return
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        captions = sum(isinstance(one, dict) and isinstance(one.get("caption"), str) for one in found)
        what = f"a list of {len(found):,} with {captions:,} captions"
    else:
        captions, what = 0, "not a JSON list"
    if not captions == item.count == len(found or ()):
        os.replace(path, path.with_name(path.name + ".wrong"))
        raise UserError(f"{path} is {what}; expected {item.count:,} captions. It is kept as {path.name}.wrong: look at it, download again.")


@one_line_errors
def main(argv=None):
    """Bring the named data sets into the data folder."""
    args = parse_options(argv)
    try:
        for name in dict.fromkeys(args.names):
            for item in DATA_SETS[name]:
                get(item, args.folder, args.mirror, args.keep_archives)
    except KeyboardInterrupt:
        print("interrupted: downloaded parts are kept; run the same command again to resume.", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
