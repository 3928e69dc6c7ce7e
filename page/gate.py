"""What stands between the network and gradio: only what the page needs is reachable, and errors leave as one line, never as a traceback."""

import re
import sys

import gradio as gr
from gradio.exceptions import InvalidPathError

from common import UserError
from models.weights import first_line
from page.uploads import check_uploads

# What the page itself and gradio_client ask for. Gradio has more: proxies, recordings, an editor, monitoring.
OPEN = re.compile(
    r"/(?:config/?|favicon\.ico|manifest\.json|robots\.txt|theme\.css|(?:assets|static)/.+)?|"
    r"/gradio_api/(?:info/?|upload|upload_progress|startup-events|app_id|queue/(?:join|data|status)|heartbeat/[\w-]+|reset/?|cancel|"
    r"run/predict|call/(?:v2/)?caption(?:/[\w-]+)?/?|file=/.+)"  # run/predict: an example that is chosen
)
MOST_QUESTION = 2**20  # bytes of a request that is no upload
MOST_FILES = 200  # of one upload
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"SAMEORIGIN"),
)


class Gate:
    """ASGI middleware that refuses what the page does not need, and catches what gradio raises.

    Args:
        app: the application behind it.
        most_upload: largest body of an upload, in bytes.
    """

    def __init__(self, app, most_upload):
        self.app, self.most_upload = app, most_upload

    async def __call__(self, scope, receive, send):
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] != "websocket":  # which nothing here uses
                await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused:
            await _answer(send, *refused)
            return
        started = False

        async def send_on(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:  # a request that gradio did not expect
            log(f"request failed: {scope['method']} {scope['path'][:80]!r}: {type(error).__name__}")
            if not started:
                await _answer(send, 400, "the request could not be understood")

    def _refuse(self, scope):
        """Return the status and reason with which a request is refused, or None."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not OPEN.fullmatch(path) or "\0" in path:
            return 404, "not found"
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "the request must state its length"
        most = self.most_upload if path.endswith("/upload") else MOST_QUESTION
        return (413, f"too large: at most {most} bytes") if int(length) > most else None


async def _answer(send, status, reason):
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


class Page(gr.Blocks):
    """Gradio's Blocks, whose failures are messages: a UserError says what is wrong, anything else is logged in one line."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """Read the inputs of an event as gradio does, but files only where they are the caller's own. Raises UserError for others."""
        check_uploads(inputs)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    async def process_api(self, *args, **kwargs):
        """Run an event as gradio does. Raises gr.Error only, without a traceback in the log."""
        try:
            return await super().process_api(*args, **kwargs)
        except (UserError, InvalidPathError) as error:
            message = str(error)
        except gr.Error as error:
            message = error.message
        except Exception as error:
            log(f"event failed: {type(error).__name__}: {first_line(error)}")
            message = "the request could not be understood"
        raise gr.Error(gr_text(message), print_exception=False)


class OneLine:
    """Stands for the module traceback in gradio, whose queue prints what goes wrong in it in full: here it is one line."""

    @staticmethod
    def print_exc():
        """Log the exception that is being handled."""
        error = sys.exc_info()[1]
        log(f"queue failed: {type(error).__name__}: {first_line(error)}")


def gr_text(message):
    """Write a message as plain text for gradio, which shows it as HTML."""
    return " ".join(str(message).split()).replace("<", "‹").replace(">", "›").replace("&", "+")


def log(line):
    """Print one line on stderr, whatever characters it has."""
    print(f"app.py: {line}".encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)
