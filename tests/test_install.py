"""make setup says what is being installed and how much is left; the pip here is a stand-in that prints what pip prints."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from page.watched import WatchedRun

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "install.py"
PIP = """#!{python}
import pathlib, sys, time
place = pathlib.Path({place!r})
if sys.argv[1] == "-c":
    print(place, place, sep="\\n")
    sys.exit()
assert sys.argv[1:4] == ["-m", "pip", "install"]
if "--no-deps" in sys.argv:
    sys.exit("ERROR: No matching distribution found for torch")
print("Collecting torch==2.0 (from -r requirements.txt (line 1))")
print("  Downloading torch-2.0-cp311-linux.whl (9.0 MB)")
print("Collecting Big_Package==1.0 (from -r requirements.txt (line 2))", flush=True)
time.sleep({pause})
if {fails}:
    print("ERROR: No matching distribution found for Big_Package==1.0")
    sys.exit(1)
print("  Downloading Big_Package-1.0-py3-none-any.whl (900 kB)")
print("Collecting needed>=1 (from torch==2.0->-r requirements.txt (line 1))")
print("Installing collected packages: needed, torch, Big_Package", flush=True)
for name in ("needed-1.0", "torch-2.0", "big_package-1.0"):
    (place / (name + ".dist-info")).mkdir(parents=True)
    time.sleep({pause})
print("Successfully installed Big_Package-1.0 needed-1.0 torch-2.0")
"""


@pytest.fixture
def install_command(workdir):
    """Function of whether pip fails and how long it pauses → words that run install.py with the stand-in."""

    def command(fails=False, pause=0.0):
        place = workdir / "site-packages"
        (place / "torch-1.0.dist-info").mkdir(parents=True)
        python = workdir / "python"
        python.write_text(PIP.format(python=sys.executable, place=str(place), fails=fails, pause=pause))
        python.chmod(0o755)
        (workdir / "requirements.txt").write_text("# models\ntorch==2.0\nBig_Package==1.0\n")
        return [sys.executable, str(SCRIPT), str(python), "requirements.txt"]

    return command


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_terminal_it_prints_a_few_lines(install_command):
    done = subprocess.run(install_command(), capture_output=True, text=True, check=True)
    *without_gpu, found = done.stdout.splitlines()
    assert found == "setting up .venv: 0:00, found all; installing 3 packages"
    assert len(without_gpu) <= 1
    assert done.stderr == ""


def test_on_a_terminal_a_line_says_what_is_done_and_what_is_left(install_command):
    run = WatchedRun(install_command(pause=1.0), {"PATH": "/nowhere"})
    run.start()
    run.wait_for_success()
    shown = "\n".join(run.output.lines)
    assert "No GPU was found" in shown
    for text in ("found 2 of 2 packages; looking for big-package", "installed [12] of 3 packages; (torch|big-package)", "installed 3 of 3"):
        assert re.search(text, shown), shown


def test_the_last_lines_of_a_pip_that_fails_are_shown(install_command):
    done = subprocess.run(install_command(fails=True), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ERROR: No matching distribution found for Big_Package==1.0"
    assert "installing" not in done.stdout


def test_the_time_left_follows_from_the_sizes_of_what_is_left(install, tmp_path):
    progress = install.Progress(2, [tmp_path], 0)
    progress.read("  Using cached large-1.0-py3-none-any.whl (30.0 MB)\n", 10)
    progress.read("  Downloading small_one-1.0-py3-none-any.whl (9.5 MB)\n", 10)
    progress.read("  Downloading small_one-1.0-py3-none-any.whl.metadata (2 kB)\n", 10)
    progress.read("Installing collected packages: small-one, large\n", 100)
    assert progress.show(104) == "1:44, installed 0 of 2 packages; small-one"
    (tmp_path / "small_one-1.0.dist-info").mkdir()
    assert progress.show(103) == "1:43, installed 1 of 2 packages; large"
    assert progress.show(110) == "1:50, installed 1 of 2 packages; about 0:30 left; large"  # 10 of 40.5 MB took 10 s


def test_what_was_there_before_is_not_counted_as_installed(install, tmp_path):
    (tmp_path / "old-1.0.dist-info").mkdir()
    progress = install.Progress(1, [tmp_path], (tmp_path / "old-1.0.dist-info").stat().st_mtime + 10)
    progress.read("Installing collected packages: old", 0)
    assert progress.installed() == set()


def test_packages_are_counted_once_and_told_from_what_they_need(install, tmp_path):
    progress = install.Progress(39, [], 0)
    (tmp_path / "local_one-1.0-py3-none-any.whl").write_bytes(b"x" * 10**6)
    for line in (
        "Collecting torch==2.0+cpu",
        f"Processing {tmp_path}/local_one-1.0-py3-none-any.whl (from -r requirements.txt (line 3))",
        "Requirement already satisfied: numpy in ./lib (from torch==2.0->-r requirements.txt (line 1)) (2.0)",
        "Collecting numpy>=1 (from local-one->-r requirements.txt (line 3))",
    ):
        progress.read(line, 1)
    assert progress.show(65) == "1:05, found 2 of 39 packages and 1 that they need; looking for numpy"
    assert progress.megabytes == {"local-one": 1.0}
