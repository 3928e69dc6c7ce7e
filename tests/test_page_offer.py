"""Without a captioner the page offers to run the demo: once at a time, for its own machine only, with progress, and on to the captions."""

import contextlib
import http.client
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from waiting import PATIENCE, wait_until

import app
import paging
from helpers import error_line
from page.offer import offer_run
from page.watched import Output

pytestmark = pytest.mark.usefixtures("one_thread")
STAND_IN = """
import pathlib, shutil, sys, time
from tqdm import trange
with open("runs", "a") as runs:
    runs.write("run\\n")
print("drawing 8 pictures into data/demo", flush=True)
print("\\n$ python train.py --data data/demo/train.pkl", flush=True)
for step in trange(10, desc="tiny CLIP", mininterval=0, disable=None):
    time.sleep({pause})
if not pathlib.Path("works").exists():
    print("demo.run: error: 0.5 of the captions are true; expected 0.9 or more", file=sys.stderr)
    sys.exit(1)
shutil.copytree({made!r}, "data/demo")
"""


def ask(url, path, method="GET", **headers):
    """Ask the offer something. → status, text"""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def state_of(url):
    return json.loads(ask(url, "/demo/state")[1])


def wait_for(url, state):
    """Wait until the run is in a state. → what the page is told then"""
    wait_until(lambda: state_of(url)["state"] == state, lambda: state_of(url))
    return state_of(url)


@pytest.fixture
def offered():
    """Function of a Python program: the offer to run it → URL, WatchedRun."""
    with contextlib.ExitStack() as stack:

        def offer(program):
            port = paging.free_port()
            run = stack.enter_context(offer_run([sys.executable, "-c", program], {}, "127.0.0.1", port))
            return f"http://127.0.0.1:{port}", run

        yield offer


def test_output_is_read_as_a_terminal_shows_it():
    output = Output()
    output.read("drawing\r\n\r\ntiny CLIP:   0%|")
    output.read("  | 0/9 [00:00<?, ?step/s]\rtiny CLIP:  44%|███▌ | 4/9 [00:01<00:01, 4step/s]\n\rtiny")
    output.read(" GPT-2:  10%|█ | 1/10 [00:01<00:09]\x1b[A\r")
    assert output.lines == ["drawing"]
    assert output.bars == {"tiny CLIP": (44, "4/9 [00:01<00:01, 4step/s]"), "tiny GPT-2": (10, "1/10 [00:01<00:09]")}
    output.read("$ python train.py\r\n 50%|██ | 5/10 [00:01<00:01]\r")
    assert output.bars == {"": (50, "5/10 [00:01<00:01]")}
    assert output.reason() == "$ python train.py"
    output.read("train.py: error: no\r\ndemo.run: error: see above")
    output.end()
    assert output.lines[-2:] == ["train.py: error: no", "demo.run: error: see above"]
    assert output.reason() == "train.py: error: no"
    assert Output().reason() == "it printed nothing"


def test_two_clicks_start_one_run_and_after_a_failure_it_can_be_started_again(offered, workdir):
    url, _ = offered(STAND_IN.format(pause=0.05, made="none"))
    assert state_of(url) == {"state": "idle", "error": None, "seconds": None, "lines": [], "bars": []}
    answers = [json.loads(ask(url, "/demo/start", "POST")[1])["started"] for _ in range(3)]
    assert answers == [True, False, False]
    while not (told := state_of(url))["bars"]:
        assert told["state"] == "running", told
        time.sleep(0.02)
    assert told["bars"][0]["label"] == "tiny CLIP" and told["lines"][0] == "drawing 8 pictures into data/demo"
    told = wait_for(url, "failed")
    assert told["error"] == "demo.run: error: 0.5 of the captions are true; expected 0.9 or more"
    assert json.loads(ask(url, "/demo/start", "POST")[1])["started"]
    wait_for(url, "failed")
    assert (workdir / "runs").read_text() == "run\n" * 2


def test_other_pages_and_other_machines_cannot_start_it(offered, workdir):
    url, run = offered("open('started', 'w')")
    for path, method, headers, status in (
        ("/demo/start", "POST", {"Host": "example.org"}, 403),
        ("/demo/start", "POST", {"Host": "[broken"}, 403),
        ("/demo/start", "POST", {"Origin": "http://example.org"}, 403),
        ("/demo/start", "POST", {"Origin": "null"}, 403),
        ("/demo/start", "GET", {}, 404),
        ("/demo/state", "POST", {}, 404),
        ("/demo/state", "GET", {"Host": "example.org"}, 403),
        ("/../app.py", "GET", {}, 404),
    ):
        assert ask(url, path, method, **headers)[0] == status, (path, method, headers)
    assert run.state == "idle" and not (workdir / "started").exists()
    assert ask(url, "/", Host="localhost:7860")[0] == 200
    assert ask(url, "/demo/start", "POST", Origin=url)[0] == 202
    run.wait_for_success()
    assert (workdir / "started").exists()


def test_a_command_that_cannot_be_run_is_a_failure_on_the_page():
    port = paging.free_port()
    with offer_run(["no-such-program"], {}, "127.0.0.1", port) as run:
        run.start()
        assert "no-such-program cannot be run" in wait_for(f"http://127.0.0.1:{port}", "failed")["error"]


def test_what_a_run_has_started_ends_with_the_page(workdir):
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    port = paging.free_port()
    with offer_run([sys.executable, "-c", program], {}, "127.0.0.1", port) as run:
        run.start()
        wait_until(lambda: run.output.lines)

    def has_ended():
        try:
            stat = Path(f"/proc/{int(run.output.lines[0])}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"  # ended; nobody has asked for its exit code yet

    wait_until(has_ended, lambda: "it still runs")


def test_a_taken_port_is_one_line(workdir, capsys, monkeypatch):
    monkeypatch.delenv("PREFIXCAP_DEMO", raising=False)
    port = paging.free_port()
    with offer_run(["true"], {}, "127.0.0.1", port):
        assert f"cannot listen on 127.0.0.1 port {port}" in error_line(app.main, capsys, ["--port", port])


@pytest.fixture
def started_app(page_world, workdir, monkeypatch):
    """app.py without a checkpoint and without a demo, running; the demo is a stand-in that fails until there is a file `works`. → URL"""
    from page.gate import Page

    for variable in ("PREFIXCAP_DEMO", "PREFIXCAP_DEMO_AUDIO"):
        monkeypatch.delenv(variable, raising=False)
    stop, port, made = threading.Event(), paging.free_port(), paging.save_demo(page_world, workdir / "made")
    monkeypatch.setattr(Page, "block_thread", lambda page: stop.wait())
    command = [sys.executable, "-c", STAND_IN.format(pause=0.15, made=str(made))]
    monkeypatch.setattr(app, "demo_command", lambda: (command, {}))
    thread = threading.Thread(target=app.main, args=[["--port", str(port), "--device", "cpu"]], daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"

    def answers():
        assert thread.is_alive()
        with contextlib.suppress(OSError):
            return ask(url, "/")[0] == 200

    wait_until(answers)
    yield url
    stop.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_page_goes_on_to_captions_without_a_restart(started_app, page_world, workdir):
    url = started_app
    (workdir / "works").touch()
    ask(url, "/demo/start", "POST")
    wait_until(lambda: state_of(url)["state"] != "running")
    assert json.loads(ask(url, "/demo/state?wait")[1])["state"] == "over"  # held back until the captions are there
    found = Client(url, verbose=False).predict(file=handle_file(str(page_world / "pictures/1.jpg")), api_name="/caption")
    assert found[0]["captions"][0]["caption"]


@pytest.mark.slow
def test_in_a_browser_the_demo_is_started_watched_and_followed_by_its_captions(started_app, chromium, page_world, workdir):
    sizes = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
    first, second = (chromium.new_context(viewport=size).new_page() for size in sizes)
    said = []
    for page in (first, second):
        page.set_default_timeout(paging.WAIT)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(started_app)
        assert page.get_by_role("heading", name="There is no captioner yet").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first.get_by_role("button", name="Run the demo").click()
    first.get_by_role("progressbar", name="tiny CLIP").wait_for()
    second.get_by_role("progressbar", name="tiny CLIP").wait_for()  # who did not click sees the same run
    assert not second.get_by_role("button").is_visible()
    for page in (first, second):
        page.get_by_role("alert").filter(has_text="The demo failed: demo.run: error: 0.5 of the captions are true").wait_for()
    (workdir / "works").touch()
    second.get_by_role("button", name="Run the demo again").click()
    for page in (first, second):
        page.wait_for_selector("#picture input[type=file]", state="attached", timeout=1000 * PATIENCE)
        page.context.close()
    assert (workdir / "runs").read_text() == "run\n" * 2 and said == []
    visit = paging.Visit(chromium, started_app)
    assert "demo-002" in visit.give("picture", page_world / "pictures/3.jpg")
    visit.context.close()
