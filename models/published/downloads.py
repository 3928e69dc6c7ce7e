"""Published weights by name: downloaded once. Their SHA-256 is kept beside them and checked at every later load."""

import dataclasses
import hashlib
from pathlib import Path

from common import UserError, replace_file
from models.weights import hub_is_reachable, weights_folder

DRIVE = "https://drive.google.com"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published weight file.

    Attributes:
        drive_id: Google Drive's id of the file, or of its folder where `member` is given.
        what: one line on the file.
        member: a word in the file's name, by which it is found in its folder.
    """

    drive_id: str
    what: str
    member: str | None = None

    @property
    def address(self):
        """Address to open in a browser."""
        return f"{DRIVE}/drive/folders/{self.drive_id}" if self.member else f"{DRIVE}/uc?id={self.drive_id}"


INSTAGRAM = "1z68jSlSbBZ6mHuqmcpcO3-aEKLUKb72X"  # one folder for the four
WEIGHTS = {
    "coco": Published("1IdaBtMSvtyzF0ByVaBHtvM0JYSXRExRX", "COCO, MLP and tuned GPT-2, ViT-B/32"),
    "conceptual": Published("14pXWwB4Zm82rsDdvbGguLfx9F8aM7ovT", "Conceptual Captions, MLP and tuned GPT-2, ViT-B/32"),
    "coco_transformer": Published("1GYPToCqFREwi285wPLhuVExlz7DDUDfJ", "COCO, transformer and frozen GPT-2, RN50x4, normalized"),
    "flickr_small": Published("1pSQruQyg8KJq6VmzhMLFbT_VaHJMdlWF", "Flickr30k, CLIPxGPT S"),
    "flickr_large": Published("1Gh32arzhW06C1ZJyzcJSSfdJDi3RgWoG", "Flickr30k, CLIPxGPT L"),
    "instagram_base": Published(INSTAGRAM, "Instagram, the fully tuned model", "base"),
    "instagram_frozen": Published(INSTAGRAM, "Instagram, all but the head frozen", "frozen"),
    "instagram_prompted": Published(INSTAGRAM, "Instagram, prompted with a COCO caption", "prompt"),
    "instagram_lora": Published(INSTAGRAM, "Instagram, LoRA", "lora"),
}


def find_published(name):
    """Find the weight file of a published name at data/weights/{name}_weights.pt; download it if it is not there.

    Returns:
        Path; None when `name` is not one of WEIGHTS.

    Raises:
        UserError: it cannot be downloaded (says what to download and where to put it), or the file has changed since.
    """
    published = WEIGHTS.get(name)
    if published is None:
        return None
    path = weights_folder() / f"{name}_weights.pt"
    if path.is_file():
        _check_digest(path)
    else:
        _keep_digest(path, _download(name, published, path))
    return path


def _digest_path(path):
    return path.with_name(path.name + ".sha256")


def _keep_digest(path, digest):
    """Write the digest beside its file, as sha256sum does. Does nothing where that cannot be written."""
    try:
        with replace_file(_digest_path(path)) as temporary:
            temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    except UserError:
        pass


def _check_digest(path):
    """Compare a file with the digest kept at its download. For a file put there by hand, keep one now."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = _digest_path(path)
    if not kept.is_file():
        _keep_digest(path, digest)
        return
    was = (kept.read_text(encoding="utf-8", errors="replace").split() or ["nothing"])[0]
    if was != digest:
        raise UserError(
            f"{path} is not the file it was (SHA-256 {digest[:12]}..., was {was[:12]}...). Remove it to download it again; "
            f"if you replaced it on purpose, remove {kept.name}."
        )


def _download(name, published, path):
    """Download a published file to `path`, whole or not at all. Returns its SHA-256 in hexadecimal."""
    advice = f"Download {published.address}{_in_folder(published)} and put it at {path}."
    if not hub_is_reachable(DRIVE):
        raise UserError(f"no weights {name} ({published.what}): looked at {path}, and Google Drive cannot be reached. {advice}")
    import gdown

    digest = hashlib.sha256()
    print(f"downloading {name} ({published.what}) to {path}", flush=True)
    try:
        drive_id = published.drive_id if published.member is None else _find_member(published)
        with replace_file(path) as temporary:
            gdown.download(id=drive_id, output=str(temporary), hasher=digest)
            with open(temporary, "rb") as file:
                if file.read(1) not in (b"P", b"\x80"):  # a zip archive, or a pickle
                    raise UserError(f"what Google Drive sent for {name} is not a weight file: its quota may be used up for today. {advice}")
    except (gdown.exceptions.DownloadError, OSError) as error:
        raise UserError(f"no weights {name}: the download failed ({error}). {advice}") from error
    return digest.hexdigest()


def _in_folder(published):
    return f" (the file with '{published.member}' in its name)" if published.member else ""


def _find_member(published):
    """Find a file in a folder by a word in its name; returns its Drive id. Raises UserError unless exactly one has the word."""
    import gdown

    files = gdown.download_folder(id=published.drive_id, skip_download=True, quiet=True)
    named = {Path(file.path).name: file.id for file in files}
    found = [name for name in named if published.member in name.lower()]
    if len(found) != 1:
        raise UserError(f"{published.address} holds {', '.join(sorted(named)) or 'nothing'}; expected one name with '{published.member}'.")
    return named[found[0]]
