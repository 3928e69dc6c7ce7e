"""Finding the files that annotations name, in folders that are listed once."""

import os
from pathlib import Path

from features.tables import plain_name


def walk(folder):
    """Yield (folder, sorted file names) of a folder and each folder below, links followed once, hidden ones left out."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX"))) if real not in seen else []
        if real not in seen:
            yield Path(place), sorted(name for name in names if not name.startswith("."))
        seen.add(real)


class FileFinder:
    """Finds files by name in several folders.

    A name may differ from the file's in HTML escapes, spaces around it, "\\" for "/", or the Unicode form of its accents.
    """

    def __init__(self, folders):
        """Take the folders, the first to be searched first; those that do not exist are left out."""
        self.listings = {}
        for folder in map(Path, folders):
            if folder.is_dir():
                names = sorted(os.listdir(folder))
                self.listings[folder] = (set(names), {plain_name(name): name for name in reversed(names)})

    def find(self, name):
        """Find a file. Returns its path as str, or None."""
        plain = plain_name(name)
        for folder, (names, plain_names) in self.listings.items():
            found = name if name in names else plain_names.get(plain)
            if found is None and "/" in plain:
                found = next((one for one in (name, plain) if os.path.isfile(folder / one)), None)
            if found is not None:
                return str(folder / found)
        return None
