"""What app.py serves while there is no captioner: a page with a button that runs the demo, and its progress."""

import contextlib
import http.server
import json
import threading
from urllib.parse import urlsplit

from common import UserError
from page.watched import WatchedRun

OWN_NAMES = ("127.0.0.1", "localhost", "::1")  # of this machine; another one in a request comes through somebody else's page
STATE, START = "/demo/state", "/demo/start"  # what the page asks for
SECONDS = 30  # a request takes at most to arrive
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>PrefixCap</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d4d4d8, #3f3f46); --quiet: light-dark(#52525b, #d4d4d8); --strong: #c2410c; }
body { max-width: 760px; margin: 0 auto; padding: 1rem; line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  background: light-dark(#fff, #0b0f19); color: light-dark(#1f2937, #f3f4f6); }
main { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
code, pre { font-family: ui-monospace, Consolas, monospace; font-size: .85rem; }
button { font: inherit; font-weight: 600; color: #fff; background: var(--strong); border: 0; border-radius: 8px; padding: .6rem 1.2rem;
  cursor: pointer; }
button:focus-visible { outline: 3px solid light-dark(#1f2937, #f3f4f6); outline-offset: 2px; }
#status { font-weight: 600; font-variant-numeric: tabular-nums; }
#bars { list-style: none; padding: 0; margin: .5rem 0; }
#bars progress { width: 100%; height: .8rem; accent-color: var(--strong); }
#bars span { color: var(--quiet); font-size: .85rem; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; max-height: 18rem; overflow-y: auto; border-top: 1px solid var(--line); padding-top: .6rem; margin-bottom: 0;
  color: var(--quiet); }
[role=alert] { border-left: 4px solid #d33; padding: .5rem .8rem; }
[hidden] { display: none; }
</style>
<h1>PrefixCap</h1>
<main>
<h2>There is no captioner yet</h2>
<div id="offer">
<p>The demo makes one from nothing but this project: it draws a small world of pictures, trains tiny models on it, and scores them.
That takes about four minutes on two CPU cores. Its captions are of drawn shapes only.</p>
<p id="problem" role="alert" hidden></p>
<button id="start" type="button">Run the demo</button>
<p>For sounds, run <code>make demo-audio</code>. If you have a checkpoint, stop this page and start
<code>python app.py --checkpoint FILE</code>.</p>
</div>
<p id="status" role="status"></p>
<ul id="bars"></ul>
<pre id="lines" tabindex="0" aria-label="What the demo prints" hidden></pre>
</main>
<script>
const find = (id) => document.getElementById(id), rest = (ms) => new Promise((done) => setTimeout(done, ms));
const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, '0')}`;
let unanswered = 0, spoken = '', loads = false;
const say = (text, timed = '') => {
  const status = find('status');
  if (spoken !== text) status.setAttribute('aria-label', spoken = text);  // screen readers need not hear every second
  status.textContent = text + timed;
};
function show(run) {
  const runs = run.state === 'running', failed = run.state === 'failed';
  loads = run.state === 'succeeded';
  find('offer').hidden = runs || loads;
  find('problem').hidden = !failed;
  find('problem').textContent = failed ? `The demo failed: ${run.error}` : '';
  find('start').textContent = failed ? 'Run the demo again' : 'Run the demo';
  say(runs ? 'The demo is running' : loads ? 'The demo is done. Loading its captioner; this page then opens it.' : '',
    runs ? `: ${clock(run.seconds)} so far; about four minutes in all, on two free cores` : '');
  find('bars').replaceChildren(...(runs ? run.bars : []).map((bar) => {
    const row = document.createElement('li'), line = document.createElement('span'), track = document.createElement('progress');
    Object.assign(track, { max: 100, value: bar.percent });
    track.setAttribute('aria-label', bar.label || 'this step');
    line.textContent = [bar.label, `${bar.percent} %`, bar.rest].filter(Boolean).join('  ');
    row.append(line, track);
    return row;
  }));
  const lines = find('lines'), text = run.lines.join('\\n'), follow = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
  lines.hidden = !text;
  if (lines.textContent !== text) {
    lines.textContent = text;
    if (follow) lines.scrollTop = lines.scrollHeight;
  }
}
async function watch() {
  for (;;) {
    try {
      const answer = await fetch('/demo/state' + (loads ? '?wait' : ''));  // with ?wait the answer comes when the captions are there
      if (answer.status === 404) break;  // the page with the captions answers already
      const run = await answer.json();
      if (run.state === 'over') break;
      unanswered = 0;
      show(run);
    } catch (error) {
      if (++unanswered > 5) say('app.py does not answer. Was it stopped? See its terminal.');
    }
    await rest(700);
  }
  location.reload();
}
find('start').addEventListener('click', async () => {
  find('offer').hidden = true;
  say('Starting the demo');
  await fetch('/demo/start', { method: 'POST' }).catch(() => {});
});
watch();
</script>
</html>
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a visitor of the offer."""

    timeout = SECONDS
    server_version, sys_version = "PrefixCap", ""

    def do_GET(self):
        """Serve the page, or the state of the run."""
        if not self._is_own():
            self._refuse()
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", PAGE)
        elif self.path in (STATE, f"{STATE}?wait"):
            self._answer(200, "application/json", json.dumps(self.server.run.describe(wait=self.path != STATE)))
        else:
            self._answer(404, "text/plain", "not found")

    def do_POST(self):
        """Start the run."""
        origin = self.headers.get("Origin")
        if not self._is_own() or origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            self._refuse()
        elif self.path == START:
            self._answer(202, "application/json", json.dumps({"started": self.server.run.start()}))
        else:
            self._answer(404, "text/plain", "not found")

    def _is_own(self):
        """Whether the browser asked for this machine by its own name, and not for a name of somebody else's that leads here."""
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in OWN_NAMES
        except ValueError:
            return False

    def _refuse(self):
        self._answer(403, "text/plain", "this page answers to its own machine only: open it there as http://127.0.0.1")

    def _answer(self, status, kind, text):
        content = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Serves the offer. Its threads outlive it: visitors who wait are answered by them when the page with the captions is there."""

    daemon_threads, block_on_close = True, False

    def __init__(self, address, run):
        self.run = run
        super().__init__(address, Handler)

    def handle_error(self, *_):
        """Print nothing: a visitor has gone, or sent what is no request."""


@contextlib.contextmanager
def offer_run(command, environment, host, port):
    """Serve a page with a button that runs a command, while the block runs.

    Args:
        command: list of words.
        environment: dict of environment variables to add.
        host, port: to listen on; the host is a loopback address.

    Yields:
        WatchedRun. Its `finish` sends visitors on to whatever serves the same address then.

    Raises:
        UserError: the port is taken.
    """
    run = WatchedRun(command, environment)
    try:
        server = Server((host, port), run)
    except OSError as error:
        raise UserError(cannot_listen(host, port, error)) from error
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="offer", daemon=True).start()
    try:
        yield run
    finally:
        run.close()
        server.shutdown()
        server.server_close()


def cannot_listen(host, port, error):
    """Say that a page cannot listen where it should."""
    return f"cannot listen on {host} port {port}: {error}. Give another --port, or another --host."
