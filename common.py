"""What every script leans on: errors in one line, and output files that are whole or absent.

Standard library only, so that `--help` of every script stays fast.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import socket
import stat
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST = 2**63 - 1  # the largest integer that torch and numpy hold
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# What zipfile, and numpy for .npz, raise for an archive that is damaged or packed in a way they do not know; besides OSError.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError, OverflowError, MemoryError,
)  # fmt: skip
_claimed = set()  # outputs that this process is writing; POSIX locks do not exclude a process from itself


class UserError(ValueError):
    """A user's mistake. The message is one line: what was found, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class Parser(argparse.ArgumentParser):
    """An argument parser with a short usage line, errors in one line, and no abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def format_help(self):
        """Return the help text; its usage line names positionals only, since the options follow in groups."""
        if self.usage is None:
            names = (self._positional_usage(action) for action in self._actions if not action.option_strings)
            self.usage = " ".join(["%(prog)s [options]", *names])
        return super().format_help()

    def _positional_usage(self, action):
        name = str(action.metavar or action.dest)
        return {"*": f"[{name} ...]", "+": f"{name} [{name} ...]", "?": f"[{name}]"}.get(action.nargs, name)

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does; an unknown option is answered with the nearest known one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return options

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, and refuse values that no file name, text or number of ours can be."""
        options, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(options).items():
            for one in value if isinstance(value, list) else [value]:
                fault = _value_fault(one)
                if fault:
                    self.error(f"--{name} {fault}")
        return options, unknown

    def error(self, message):
        """Print `message` as one line on stderr and leave with exit code 2."""
        print_error(self.prog, f"{' '.join(message.split())} (see --help)")
        raise SystemExit(2)


def _value_fault(value):
    """What is wrong with a value from the command line, whatever its option; None where nothing is."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        if "\0" in text:
            return "holds a NUL byte; expected plain text"
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            return "holds half a surrogate pair; expected valid Unicode"
    if isinstance(value, int) and abs(value) > MOST:
        return f"is {str(value)[:20]}...; expected at most {MOST}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; expected a finite number"
    return None


def utf8_text(text):
    """Check that an option's value is valid UTF-8; use it as `type=` for texts that reach a tokenizer."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("expected UTF-8 text") from error
    return text


def print_error(program, message):
    """Print one line on stderr in a single write, so that several processes of one launcher never mix their lines."""
    print(f"{program}: error: {message}\n", end="", file=sys.stderr)


def one_line_errors(main):
    """Decorate a script's main: a UserError or OSError becomes one line on stderr and exit code 2.

    Characters that the terminal's encoding lacks are escaped, so that printing never fails.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):  # streams that a notebook or a test put there
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv) or 0
        except BrokenPipeError:
            # The reader of our output has gone (`| head`): nothing is wrong, and nobody is left to inform.
            sys.stdout = open(os.devnull, "w")
            return 0
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (UserError, OSError) as error:
            message = error if isinstance(error, UserError) else UserError(error)
            print_error(Path(sys.modules[main.__module__].__file__).name, message)
            raise SystemExit(2) from None

    return wrapped


def resolve_output(path):
    """Find the file that an output name stands for: the target of a symbolic link, else the name itself.

    Args:
        path: name of a file that exists or not.

    Returns:
        Path of a regular file, or of nothing.

    Raises:
        UserError: it is a folder, FIFO, socket, device or circle of links, which are never replaced.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if target.is_symlink():
        raise UserError(f"cannot write {path}: it is a symbolic link that leads to itself. Give another place.")
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return target
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"cannot write {path}: it is {kind}; expected a regular file or a new name. Give another place.")
    return target


@contextlib.contextmanager
def replace_file(path):
    """Write a file whole or not at all: under a temporary name beside it, which is then renamed.

    Parent folders are made. What a killed run left under a temporary name is removed by the next run.

    Args:
        path: the file to write; a symbolic link is followed, and stays.

    Yields:
        Path to write to. When the block succeeds the file is flushed and renamed; when it fails, removed.

    Raises:
        UserError: the place cannot be written, or is no regular file.
    """
    path = resolve_output(path)
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    stem = f".{path.name[:40]}.{digest}."
    temporary = path.with_name(f"{stem}{_process_name()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, stem)
        temporary.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Give a place that can be written.") from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Free some space, or give another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_own_files(folder, paths):
    """Remove files that this program wrote into a folder of its own, and then the folder, unless it holds anything else."""
    for path in paths:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it does not exist
        _remove_leftovers(folder, ".")
        folder.rmdir()


def _process_name():
    """Name this process in a file name: its host's name, shortened to a digest, and its number."""
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=3).hexdigest()
    return f"{host}-{os.getpid()}"


def _remove_leftovers(folder, stem):
    """Remove temporary files of this name whose process on this host has ended."""
    host = _process_name().partition("-")[0]
    for entry in os.scandir(folder):
        name, _, number = entry.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
        ours = entry.name.startswith(stem) and entry.name.endswith(".tmp") and name == host and number.isdecimal()
        if ours and not _is_running(int(number)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def claim_output(path):
    """Be the only process that writes an output while the block runs.

    A lock file `.NAME.lock` beside the output names this process and its host. The system releases the lock of a process that dies, so
    that the next one takes over. On file systems without locks a warning on stderr takes the place of the lock. Folders are made, and
    removed again where nothing was written into them.

    Args:
        path: name of a file or folder to be written, or any name that stands for several outputs (out_dir/prefix).

    Raises:
        UserError: another process is writing this output; the message names it.
    """
    name, path = path, Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name}.lock")
    if path in _claimed:
        raise UserError(f"{name} is being written by this process already. Give another place.")
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (file := _open_lock(lock)) is None:
            owner = _read_owner(lock)
            if owner:
                raise UserError(f"{name} is being written by {owner}. Wait until it ends, or give another place.")
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}. Give a place that can be written.") from error
    _claimed.add(path)
    try:
        _remove_leftovers(path.parent, f".{path.name[:40]}")  # of a killed run, whose last file no run may write again
        yield
    finally:
        _claimed.discard(path)
        lock.unlink(missing_ok=True)
        os.close(file)
        with contextlib.suppress(OSError):  # they hold the output by now
            for folder in made:
                folder.rmdir()


def _open_lock(lock):
    """Open and lock a lock file. Returns its descriptor; None where another process holds the lock."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(file)
            return None
        except OSError:
            print(f"{lock.parent} is on a file system without locks: make sure that no other run writes there", file=sys.stderr)
        # Between opening and locking, its last owner may have removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(lock).st_ino:
                owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(owner).encode(), 0)
                return file
        os.close(file)


def _read_owner(lock):
    """Read who holds a lock, in words; None where the lock has gone. An owner that has just locked it writes its name within moments."""
    for _ in range(20):
        try:
            owner = json.loads(lock.read_bytes()[:1000])
            return f"process {owner['process']} on {owner['host']} since {owner['since']}"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"
