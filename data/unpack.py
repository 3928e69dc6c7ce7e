"""Unpack archives from other people's servers: checked first, beside their place, and moved in when everything is as expected."""

import lzma
import os
import shutil
import stat
import subprocess
import zipfile
from pathlib import PureWindowsPath

from common import ARCHIVE_ERRORS, UserError

SPARE = 500_000_000  # bytes of disk to leave free
AGAIN = "Remove it and download it again."
ENCRYPTED = 1  # bit of a zip member's flags
DAMAGES = (*ARCHIVE_ERRORS, lzma.LZMAError)  # zipfile's OSErrors without a number are bz2's


def find_unpacker(name):
    """Find a program on this computer that unpacks .7z.

    Args:
        name: of the archive, for the error.

    Returns:
        Function of the archive and a folder that returns a command line.

    Raises:
        UserError: there is none.
    """
    for program in ("7z", "7zz", "7za", "7zr"):
        if shutil.which(program):  # an encrypted archive would make it ask for a password: "-" is one
            return lambda archive, folder: [program, "x", "-y", "-bso0", "-p-", f"-o{folder}", str(archive)]
    if shutil.which("bsdtar"):
        return lambda archive, folder: ["bsdtar", "-xf", str(archive), "-C", str(folder)]
    raise UserError(
        f"{name} needs a program that unpacks .7z, and there is none. Install p7zip (apt install p7zip-full, brew install p7zip, "
        "conda install -c conda-forge p7zip) and run the same command again."
    )


def unpack(archive, place, files, count):
    """Unpack an archive beside its place, count what was in it, and only then move it in.

    Args:
        archive: path of a .zip or .7z.
        place: folder that its content goes to; nothing in it is touched before everything is checked.
        files: glob of the files that must be in the archive.
        count: how many of them.

    Raises:
        UserError: the archive is damaged, encrypted or not what is expected, or holds a link or a name that leads out of its folder.
    """
    temporary = place / f".unpacking-{archive.stem}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        unpack_zip(archive, temporary) if archive.suffix == ".zip" else _unpack_7z(archive, temporary)
        for path in temporary.rglob("*"):
            status = path.lstat()
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                raise UserError(f"{archive} holds {path.name!a}, which is a link or no regular file; no data set has one. {AGAIN}")
        found = len(list(temporary.glob(files)))
        if found != count:
            raise UserError(f"{archive} holds {found:,} files {files}; expected {count:,}. {AGAIN}")
        _move_in(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_7z(archive, folder):
    """Unpack a .7z into `folder` by a program of this computer, in a session without a terminal that it could ask."""
    command = find_unpacker(archive.name)(archive, folder)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    if done.returncode:
        said = done.stderr.decode("ascii", "backslashreplace").strip().splitlines() or ["no reason given"]
        raise UserError(f"{archive} could not be unpacked ({said[-1]}). {AGAIN}")


def unpack_zip(archive, folder):
    """Unpack a zip into `folder`.

    Raises:
        UserError: it is damaged or encrypted, holds a link or a name that leads out of the folder, or the disk is too small.
    """
    from tqdm import tqdm

    try:
        if not zipfile.is_zipfile(archive):
            raise UserError(f"{archive} is not a whole zip; it may be a page with an error. Look into it. {AGAIN}")
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.filename.startswith("__MACOSX/")]
            for member in members:
                _check_member(archive, member)
            needed, free = sum(member.file_size for member in members) + SPARE, shutil.disk_usage(folder).free
            if free < needed:
                raise UserError(f"{folder} has {free / 1e9:.1f} GB free; {archive} needs {needed / 1e9:.1f}. Make room.")
            for member in tqdm(members, unit=" files", desc=f"unpacking {archive.name}", disable=None):
                path = packed.extract(member, folder)
                if not member.is_dir() and os.path.getsize(path) != member.file_size:
                    raise zipfile.BadZipFile("a file is shorter than it should be")
    except UserError:
        raise
    except OSError as error:
        fault = f"could not be unpacked ({error.strerror})" if error.errno else f"is damaged ({error})"
        raise UserError(f"{archive} {fault}. {'Check the disk.' if error.errno else AGAIN}") from error
    except DAMAGES as error:
        raise UserError(f"{archive} is damaged ({ascii(str(error))[:200] or type(error).__name__}). {AGAIN}") from error


def _check_member(archive, member):
    """Raise UserError for a member of a zip that is encrypted, a link, or written outside the folder."""
    path = PureWindowsPath(member.orig_filename)  # knows / and \\ and drives
    if path.anchor or ".." in path.parts or "\0" in member.orig_filename or stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"{archive} tries to write outside its folder ({ascii(member.orig_filename)[:200]}). Do not trust it.")
    if member.flag_bits & ENCRYPTED:
        raise UserError(f"{archive} is encrypted; expected one that opens without a password. {AGAIN}")


def _move_in(source, target):
    """Move the content of `source` to `target`: a new folder by one rename, the content of an existing one file by file."""
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir():
            _move_in(path, there)
        else:
            os.replace(path, there)
