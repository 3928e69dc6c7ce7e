"""How a result was made: the command, the seed, the versions, and the digests of what went in."""

import hashlib
import platform
import shlex
import subprocess
from pathlib import Path

from evaluation.tokens import java_is_here

PACKAGES = ("torch", "transformers", "numpy", "pycocoevalcap")


def describe_origin(script, arguments, seed, files):
    """→ dict of plain values with command, seed, versions and sha256 (file → digest; a folder's is over its files' names and bytes).

    script: "evaluate.py"; arguments: list of str; files: paths that were read.
    """
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "java": _java_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(["python", script, *arguments]),
        "seed": seed,
        "versions": versions,
        "sha256": {str(path): file_digest(path) for path in dict.fromkeys(files)},
    }


def file_digest(path):
    """SHA-256 of a file's bytes, or of a folder's files by name and bytes; hexadecimal."""
    path = Path(path)
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(part.relative_to(path)).encode("utf-8", "surrogateescape"))
        if part.is_file():
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)
    return digest.hexdigest()


def _java_version():
    """The first line that `java -version` says, or None where there is none."""
    if not java_is_here():
        return None
    done = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)
    return next((line for line in done.stderr.splitlines() if "version" in line), None)
