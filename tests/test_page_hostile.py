"""Hostile callers of the page: no file but uploads is served or read, no URL is fetched, no traceback leaves, and the page stays up."""

import json
import random
import urllib.parse

import httpx
import pytest
from gradio_client import Client, handle_file
from waiting import PATIENCE

import paging

pytestmark = [pytest.mark.usefixtures("one_thread")]
SECRET = "a secret 5c1d0e"
DRAWN = 200
ENDPOINTS = ("queue/join", "call/caption", "run/predict", "run/caption", "api/caption", "call/v2/caption", "call/nothing")
PLACES = ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy=")
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")
NAMES = ("../../../../tmp/evil.jpg", "/etc/evil", "a\0b.jpg", "x" * 300 + ".jpg", "<img onerror=alert(1)>.jpg", "..", "con.jpg")
BODIES = (b"", b"{", b"[]", b"null", b"[" * 5000, b'{"data": 1}', b'{"data": [' + b"1," * 2000 + b"1]}")
CLOSED = (
    "/docs", "/openapi.json", "/login", "/monitoring", "/monitoring/summary", "/gradio_api/dev/reload", "/gradio_api/vibe-code",
    "/gradio_api/deep_link?session_hash=a", "/gradio_api/process_recording", "/gradio_api/runs", "/gradio_api/token",
    "/gradio_api/custom_component/1/client/component/x.js", "/svelte/x", "/gradio_api/openapi.json", "/gradio_api/proxy=http://127.0.0.1/",
)  # fmt: skip


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    path = tmp_path_factory.mktemp("secret") / "secret.jpg"
    path.write_text(SECRET)
    return path


@pytest.fixture(scope="module")
def url(page_world):
    with paging.serving(page_world / "first.pt", most_upload=1) as url:
        yield url.rstrip("/")


@pytest.fixture(scope="module")
def canary():
    """A server that must not be asked for anything."""
    import serving

    server = serving.Server()
    server.content["x.jpg"] = SECRET.encode()
    yield server
    server.shutdown()


def spell(draw, path):
    """Write the path of a file in one of the ways that get past careless checks."""
    up = "../" * draw.randint(1, 12)
    return draw.choice([
        path, "/" + path, path.replace("/", "//"), path.replace("/", "/./"), up + path.lstrip("/"), "file://" + path, path + "\0.jpg",
        path.replace("/", "%2f"), urllib.parse.quote(urllib.parse.quote(path, safe=""), safe=""), "..\\" * 8 + path.replace("/", "\\"),
        "/proc/self/root" + path, path + "/", "~" + path, f"/tmp/gradio/..{path}", path.upper(), "/proc/self/environ", ".", "",
    ])  # fmt: skip


def draw_file(draw, secret, canary):
    """Draw what a caller may send in place of an uploaded file."""
    path = draw.choice([spell(draw, str(secret)), spell(draw, "/etc/passwd"), f"{canary.url}/x.jpg", "ftp://127.0.0.1/x", "a" * 5000])
    meta = {"_type": "gradio.FileData"}
    return draw.choice([
        {"path": path, "meta": meta}, {"path": path}, {"path": path, "url": path, "meta": meta}, {"url": path, "meta": meta}, path, [path],
        {"path": {"path": path, "meta": meta}, "meta": meta}, [{"path": path, "meta": meta}], {"video": {"path": path, "meta": meta}},
        {"path": None, "url": f"data:image/png;base64,{'A' * 50}", "meta": meta}, {"path": path, "is_stream": True, "meta": meta}, 7, True,
    ])  # fmt: skip


def draw_value(draw):
    return draw.choice([None, "beam", -1, 1e308, "\ud800", [], {}, "x" * 9999, True, {"__type__": "update"}, {"path": "/etc/passwd"}])


def send(http, draw, secret, canary):
    """Send one hostile request. Returns its response."""
    kind = draw.randrange(6)
    if kind == 0:
        path = spell(draw, draw.choice([str(secret), "/etc/passwd"])).replace("\0", "%00")
        return http.get(draw.choice(PLACES) + path)
    if kind == 1:
        return http.get(f"/gradio_api/file={canary.url}/x.jpg")
    if kind == 2:
        return http.request(draw.choice(METHODS), draw.choice(CLOSED))
    if kind == 3:
        content = draw.randbytes(draw.choice([0, 10, 5000]))
        return http.post("/gradio_api/upload", files={"files": (draw.choice(NAMES), content, "image/jpeg")})
    if kind == 4:
        body = draw.choice([*BODIES, draw.randbytes(200)])
        return http.post(f"/gradio_api/{draw.choice(ENDPOINTS)}", content=body, headers={"content-type": "application/json"})
    data = [draw_file(draw, secret, canary), *(draw_value(draw) for _ in range(draw.choice([0, 7, 7, 7, 9])))]
    body = {"data": data, "session_hash": draw.choice(["abc", "../x", ""]), "fn_index": draw.choice([0, 1, 3, 4, 5, 6, 99, -1])}
    body |= draw.choice([{}, {"event_data": {"path": str(secret)}}, {"trigger_id": "x"}, {"batched": True}])
    return http.post(f"/gradio_api/{draw.choice(ENDPOINTS)}", content=json.dumps(body), headers={"content-type": "application/json"})


def result_of(http, response):
    """Read the result of an event that was accepted; an empty text for others."""
    try:
        event = response.json()["event_id"]
    except (ValueError, KeyError, TypeError):
        return ""
    with http.stream("GET", f"/gradio_api/call/caption/{event}", timeout=PATIENCE) as stream:
        return "".join(stream.iter_text())


def test_hostile_requests_get_nothing_and_leave_the_page_up(url, secret, canary, page_world, capfd):
    draw = random.Random(0)
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        for number in range(DRAWN):
            response = send(http, draw, secret, canary)
            told = response.text + result_of(http, response)
            for leak in (SECRET, "root:", "Traceback", 'File "', str(page_world), "site-packages"):
                assert leak not in told, (number, response.request.url, response.request.content[:300], told[:500])
            answered = response.status_code < 500 or response.url.path.endswith("run/predict") and response.json()["error"]
            assert answered, (number, response.request.url, response.request.content[:300])
    assert canary.asked == []
    log = capfd.readouterr().err
    assert "Traceback" not in log and SECRET not in log
    (found,) = Client(url, verbose=False).predict(file=handle_file(str(page_world / "pictures/1.jpg")), api_name="/caption")
    assert found["captions"]


def test_the_ways_that_the_page_does_not_need_are_closed(url):
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        assert [place for place in CLOSED if http.get(place).status_code != 404] == []
        assert http.get("/").status_code == 200


def test_uploads_and_questions_have_a_largest_size(url):
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        assert http.post("/gradio_api/upload", files={"files": ("a.jpg", b"0" * 1_500_000)}).status_code == 413
        assert http.post("/gradio_api/queue/join", content=b"0" * 2_000_000).status_code == 413
        assert http.post("/gradio_api/upload", content=iter([b"0"] * 10)).status_code == 411


def test_only_own_uploads_are_served(url, page_world):
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        (path,) = http.post("/gradio_api/upload", files={"files": ("a.jpg", (page_world / "pictures/1.jpg").read_bytes())}).json()
        assert http.get(f"/gradio_api/file={path}").content == (page_world / "pictures/1.jpg").read_bytes()
        assert "prefixcap-page-" in path
        for other in (page_world / "pictures/1.jpg", page_world / "first.json", f"{path}/../../../../../../etc/passwd"):
            assert http.get(f"/gradio_api/file={other}").status_code in (403, 404)
