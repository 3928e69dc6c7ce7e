"""What every script and package here leans on: one-line errors, and files that are whole or absent.

Standard library only, so that a script's --help stays fast.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(ValueError):
    """A user's mistake. The message is one line: what was found, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults shown in --help, and no abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        """Print `message` as one line on stderr and leave with exit code 2."""
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def one_line_errors(main):
    """Decorate a script's main: a UserError or OSError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv) or 0
        except BrokenPipeError:
            # The reader of our output went away (`| head`): nothing is wrong, and nobody is left to tell.
            sys.stdout = open(os.devnull, "w")
            return 0
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (UserError, OSError) as error:
            message = error if isinstance(error, UserError) else UserError(error)
            print(f"{Path(sys.modules[main.__module__].__file__).name}: error: {message}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


def keep_freed_memory(device="cpu"):
    """Have the C library keep the memory that large tensors free, on a CPU, for those that come next.

    By default glibc gives pieces of more than some megabytes back to the system, which hands them out anew, zeroed page by page: a fifth
    of a training step. At most 512 MiB that nobody uses are kept. Does nothing for another device or under another C library.
    """
    if str(device) != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**28)
    mallopt(M_TRIM_THRESHOLD, 2**29)


@contextlib.contextmanager
def replace_file(path):
    """Give a temporary path beside `path`; on success flush it and rename it over `path`, on failure remove it.

    Parent folders are made. Raises UserError when the place cannot be written.
    """
    path = Path(path)
    # One temporary name a file: what a killed run left there is overwritten by the next, not left behind.
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    temporary = path.with_name(f".{path.name[:40]}.{digest}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Give a place that can be written.") from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Free some room, or give another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_stem(name):
    """Turn an encoder's name into a part of a file name.

    As published: "ViT-B/32" → "ViT-B_32"; "hf:openai/clip" → "hf_openai_clip"; a path, also behind a family's name, → its stem.
    """

    def stem(path):
        path = Path(os.path.abspath(path))
        return path.name if path.is_dir() else path.stem

    if Path(name).exists():
        return stem(name)
    family, _, rest = name.partition(":")
    before, _, path = rest.partition("/")
    if family.isidentifier() and rest and Path(rest).exists():
        return f"{family}_{stem(rest)}"
    if family.isidentifier() and path and Path(path).is_file():  # open_clip:ARCH/PATH
        return f"{family}_{before.replace(':', '_')}_{stem(path)}"
    return name.replace("/", "_").replace(":", "_")
