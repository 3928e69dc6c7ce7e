"""What every script and package here leans on: one-line errors, and files that are whole or absent.

Standard library only, so that a script's --help stays fast.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import sys
from pathlib import Path


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
