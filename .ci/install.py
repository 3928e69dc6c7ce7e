"""Install the pinned requirements into an environment, showing what is being installed: install.py PYTHON requirements.txt

Runs before anything is installed, so it imports nothing of ours. On a terminal one line is kept up to date; elsewhere little is printed.
"""

import re
import shutil
import subprocess
import sys
import time

CPU_ONLY = re.compile(r"^(torch|torchvision)==(\S+)$", re.MULTILINE)


def install(python, words, label):
    """Run pip install. Returns its exit code and its last lines."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off", *words]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    began, seen, last = time.monotonic(), 0, []
    for line in pip.stdout:
        last = [*last[-20:], line.rstrip()]
        word, _, rest = line.strip().partition(" ")
        seen += word == "Collecting"
        if sys.stdout.isatty() and word in ("Collecting", "Downloading", "Building", "Installing"):
            passed = time.monotonic() - began
            text = f"{label}: {passed // 60:.0f}:{passed % 60:02.0f}, {seen} packages found; {word.lower()} {rest}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", flush=True)
    if sys.stdout.isatty():
        print()
    return pip.wait(), last


def main(python, requirements):
    with open(requirements, encoding="utf-8") as file:
        cpu_only = [f"{name}=={version}+cpu" for name, version in CPU_ONLY.findall(file.read())]
    has_gpu = sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    if not has_gpu and install(python, ["--no-deps", *cpu_only], "torch for CPUs")[0]:
        print(
            "No GPU was found, and pip knows no torch without CUDA, so 3 GB of CUDA's libraries are installed too. To do without "
            "them, stop, set PIP_EXTRA_INDEX_URL to PyTorch's index for CPUs (see pytorch.org, Get Started), and run make setup again.",
            flush=True,
        )
    code, last = install(python, ["-r", requirements], "setting up .venv")
    if code:
        print("\n".join(last), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
