"""Install the pinned requirements into an environment, showing what is being installed: install.py PYTHON requirements.txt

Runs before anything is installed, so it imports nothing of ours. On a terminal one line is kept up to date; elsewhere little is printed.
"""

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

CPU_ONLY = re.compile(r"^(torch|torchvision)==(\S+)$", re.MULTILINE)
PIN = re.compile(r"^[\w.-]+==", re.MULTILINE)
FOUND = re.compile(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)(.*)")
FOUND_HERE = re.compile(r"Processing (\S+)(.*)")  # a file of this machine
FILE = re.compile(r"(?:Downloading|Using cached) (\S+\.whl) \(([\d.]+) (bytes|[kMG]B)\)")
COLLECTED = "Installing collected packages: "
MEGABYTES = {"bytes": 1e-6, "kB": 1e-3, "MB": 1, "GB": 1e3}
PLACES = "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sep='\\n')"
SHOWN_AFTER = 5  # seconds of installing, before which the time left is not estimated


def package_name(text):
    """Write a package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def file_package(path):
    """The package that a wheel belongs to."""
    return package_name(Path(path).name.partition("-")[0])


class Progress:
    """How far pip install is, from what it prints and from what stands in the environment.

    While pip looks for packages nobody knows how many there are: those that are required, and what these need in turn. Once all are
    found pip prints their names and installs them in that order, without another word until the end.

    Args:
        required: number of packages named in the requirements.
        folders: where the environment keeps its packages.
        began: time.time() of the start.
    """

    def __init__(self, required, folders, began):
        self.required, self.folders, self.began = required, folders, began
        self.found, self.needed, self.doing = set(), set(), "starting pip"
        self.megabytes, self.names, self.since = {}, [], None  # size of each wheel, packages to install, when that began

    def read(self, line, now):
        """Take in a line of pip's."""
        line = line.strip()
        if found := FOUND.match(line):
            self._add(package_name(found[1]), found[2])
        elif found := FOUND_HERE.match(line):
            name = file_package(found[1])
            self._add(name, found[2])
            with contextlib.suppress(OSError):
                self.megabytes[name] = os.path.getsize(found[1]) / 1e6
        elif file := FILE.match(line):
            name = file_package(file[1])
            self.megabytes[name] = float(file[2]) * MEGABYTES[file[3]]
            self.doing = f"{'downloading' if line.startswith('Downloading') else 'taking'} {name} ({file[2]} {file[3]})"
        elif line.startswith(COLLECTED):
            self.names, self.since = [package_name(name) for name in line.removeprefix(COLLECTED).split(", ")], now

    def _add(self, name, why):
        (self.needed if "->" in why else self.found).add(name)
        self.doing = f"looking for {name}"

    def installed(self):
        """Find which of the packages to install have been written since the start. Returns a set of names."""
        there = set()
        for folder in self.folders:
            for entry in Path(folder).glob("*.dist-info"):
                with contextlib.suppress(OSError):  # removed meanwhile
                    if entry.stat().st_mtime >= self.began - 1:
                        there.add(file_package(entry))
        return there & set(self.names)

    def show(self, now):
        """Say in one line how far it is, and how long it still takes where that can be estimated."""
        if not self.names:
            more = f" and {len(self.needed - self.found)} that they need" if self.needed - self.found else ""
            return f"{minutes(now - self.began)}, found {len(self.found)} of {self.required} packages{more}; {self.doing}"
        done = self.installed()
        next_one = next((name for name in self.names if name not in done), "finishing")
        passed = now - self.since
        share = sum(map(self._weight, done)) / sum(map(self._weight, self.names))
        left = f"about {minutes(passed / share - passed)} left; " if passed >= SHOWN_AFTER and share > 0 else ""
        return f"{minutes(now - self.began)}, installed {len(done)} of {len(self.names)} packages; {left}{next_one}"

    def _weight(self, name):
        """What a package counts: half a megabyte for its being one more, and its size."""
        return 0.5 + self.megabytes.get(name, 1)


def minutes(seconds):
    """Write a duration as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def install(python, words, label, required):
    """Run pip install. Returns its exit code and its last lines."""
    places = subprocess.run([python, "-c", PLACES], stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off", *words]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines, last = queue.Queue(), []
    threading.Thread(target=lambda: [*map(lines.put, pip.stdout), lines.put(None)], daemon=True).start()
    progress = Progress(required, [place for place in dict.fromkeys(places) if place], time.time())
    on_terminal, line = sys.stdout.isatty(), ""
    while line is not None:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if line:
            last = [*last[-20:], line.rstrip()]
            progress.read(line, time.time())
        if on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{f'{label}: {progress.show(time.time())}'[:width]:<{width}}", end="", flush=True)
        elif line and line.strip().startswith(COLLECTED):
            print(f"{label}: {minutes(time.time() - progress.began)}, found all; installing {len(progress.names)} packages", flush=True)
    if on_terminal:
        print()
    return pip.wait(), last


def main(python, requirements):
    text = Path(requirements).read_text(encoding="utf-8")
    cpu_only = [f"{name}=={version}+cpu" for name, version in CPU_ONLY.findall(text)]
    has_gpu = sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    if not has_gpu and install(python, ["--no-deps", *cpu_only], "torch for CPUs", len(cpu_only))[0]:
        print(
            "No GPU was found, and pip knows no torch without CUDA, so 3 GB of CUDA's libraries are installed too. To do without "
            "them, stop, set PIP_EXTRA_INDEX_URL to PyTorch's index for CPUs (see pytorch.org, Get Started), and run make setup again.",
            flush=True,
        )
    code, last = install(python, ["-r", requirements], "setting up .venv", len(PIN.findall(text)))
    if code:
        print("\n".join(last), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
