"""Start the page: gradio's settings, its own folder for uploads, the gate before it."""

import contextlib
import os
import tempfile

from common import UserError
from page.gate import MOST_FILES, Gate, OneLine
from page.layout import build_page
from page.offer import cannot_listen
from page.results import STYLE

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # fonts that are there: none is downloaded
CODE_FONT = ["ui-monospace", "Consolas", "monospace"]
CONTRAST = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}  # gradio's own is hard to read
MEGABYTE = 10**6


@contextlib.contextmanager
def serve_page(worker, host, port, most_upload, examples=()):
    """Serve the page while the block runs.

    Args:
        worker: page.worker.Worker.
        host: address to listen on.
        port: of TCP.
        most_upload: largest file, in MB.
        examples: paths of pictures that visitors can try.

    Yields:
        The page, with its `local_url`.

    Raises:
        UserError: the port is taken, or the host is no address of this machine.
    """
    import gradio as gr
    from gradio import queueing, route_utils, routes
    from starlette.middleware import Middleware

    with tempfile.TemporaryDirectory(prefix="prefixcap-page-") as folder:
        # Gradio serves what is in these folders. Its usual ones are shared with every other gradio program of this machine.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_EXAMPLES_CACHE=folder, GRADIO_ANALYTICS_ENABLED="False")
        queueing.traceback = routes.traceback = route_utils.traceback = OneLine
        page = build_page(worker, examples)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=True,
                inbrowser=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                run_history=False,
                enable_monitoring=False,
                allowed_paths=[],
                max_file_size=most_upload * MEGABYTE,
                footer_links=["api", "settings"],
                theme=gr.themes.Default(font=FONT, font_mono=CODE_FONT).set(**CONTRAST),
                css=STYLE,
                app_kwargs={"middleware": [Middleware(Gate, most_upload=MOST_FILES * most_upload * MEGABYTE)]},
            )
        except OSError as error:
            raise UserError(cannot_listen(host, port, error)) from error
        try:
            yield page
        finally:
            page.close(verbose=False)
