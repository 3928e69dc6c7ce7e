"""Fixtures every test file shares. Offline is set before anything imports a Hugging Face library."""

import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINI_DEMO = {"scenes": 400, "heldout": 40, "clip_steps": 150, "gpt2_steps": 60, "clip_batch": 32}
MINI_DEMO |= {"colours": ("red", "blue"), "shapes": ("circle", "square")}
MINI_TRAIN = "--prefix_length 4 --bs 20 --epochs 4 --lr 2e-3 --warmup_steps 10 --sampling captions"
SLOWEST_FIXTURE = re.compile(r"\b(mini_demo|stand_in_tower)\b")  # and the one in tests/evaluating.py that needs it
for folder in (str(ROOT / "tests"), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a test that was skipped for want of a program that .ci/run has installed (PREFIXCAP_PROGRAMS names them)."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        missing = [name for name in os.environ.get("PREFIXCAP_PROGRAMS", "").split() if name in report.longrepr[2].lower()]
        if missing:
            report.outcome, report.longrepr = "failed", f"{report.longrepr[2]}, though {' and '.join(missing)} must be here"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep together, where pytest-xdist runs tests in several processes, those of a file, and those that share the slowest fixture."""
    from xdist.scheduler import LoadFileScheduling

    class KeepTogether(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "mini_demo" if SLOWEST_FIXTURE.search((ROOT / file).read_text(encoding="utf-8")) else file

    return KeepTogether(config, log)


@pytest.fixture(scope="session")
def root():
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder that is the working directory while the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data (env PREFIXCAP_DATA, default ../shared/data); the test is skipped where there is none."""
    folder = Path(os.environ.get("PREFIXCAP_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set PREFIXCAP_DATA to the folder with the real data")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread for a module of tiny models: two threads only wait for each other there."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A folder with a random GPT-2 (64 wide, 2 layers) and its own byte-level BPE tokenizer."""
    import tiny

    return tiny.save_gpt2(tmp_path_factory.mktemp("language_models") / "gpt2")


@pytest.fixture(scope="session")
def mini_demo(tmp_path_factory):
    """A small demo world, made once a session by the real scripts: a folder that the tests must not change.

    train/ and heldout/ (pictures), annotations/ (COCO JSON), weights/demo_clip.pt (a CLIP that tells true captions from false ones),
    weights/demo_gpt2/, train.pkl and heldout.pkl (features), checkpoints/demo-{epoch:03d}.pt: a model that looks at its prefix, and
    captions about half the training pictures truly, but too small a world to generalise from: of held-out pairs hardly any.
    """
    import torch

    import parse_coco
    import train
    from demo import run

    folder = tmp_path_factory.mktemp("mini_demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run.build(folder, **MINI_DEMO, in_process=True)
    lines = run.command_lines(folder, MINI_TRAIN)
    for stage, script in (("parse train", parse_coco), ("parse heldout", parse_coco), ("train", train)):
        assert script.main([*lines[stage][1:], "--device", "cpu"]) == 0, stage
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def page_world(tmp_path_factory):
    """A folder with the small world of tests/paging.py, which tests may add files to."""
    import paging

    return paging.save_world(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def chromium():
    """Chromium, ready to open pages; the test is skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if path is None:
        pytest.skip("no chromium here to open the page with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """stem, beginnings of lines to change, folder → the notebook, run there by this interpreter, with its outputs."""
    from nbclient import NotebookClient

    from notebooks_read import read_notebook

    folder = tmp_path / "kernels" / "this_python"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "this Python", "language": "python"}))
    for variable in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from waiting import PATIENCE

    def run_it(stem, changes=None, folder=ROOT / "notebooks"):
        notebook = read_notebook(stem)
        for old, new in (changes or {}).items():
            (cell,) = [cell for cell in notebook.cells if f"\n{old}" in f"\n{cell.source}"]
            cell.source = f"\n{cell.source}".replace(f"\n{old}", f"\n{new}", 1)[1:]
        resources = {"metadata": {"path": str(folder)}}
        return NotebookClient(notebook, timeout=PATIENCE, kernel_name="this_python", resources=resources).execute()

    return run_it


@pytest.fixture(scope="module", autouse=True)
def lasting_objects():
    """Take what has come to stay (imported libraries, networks of the session) out of the garbage collector's sight: it would go through
    all of it again and again.
    """
    gc.collect()
    gc.freeze()
