"""Inputs that take uploads only: no URL is fetched for a caller, and no other file of the server is read."""

from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from common import UserError


def own_path(payload):
    """Return the path of an upload.

    Args:
        payload: gradio's FileData or ImageData, or None.

    Returns:
        str, or None for no file.

    Raises:
        UserError: it is not a file that was uploaded here.
    """
    if payload is None:
        return None
    folder = Path(get_upload_folder()).resolve()
    path = Path(payload.path or "").resolve()
    if not payload.path or not path.is_relative_to(folder) or not path.is_file():
        raise UserError("this is not a file that was uploaded here. Upload it first.")
    return str(path)


def _uploads(component):
    """Make a gradio component that hands on uploads as they are, and refuses URLs, which gradio would fetch."""

    class Uploads(component):
        def get_block_name(self):
            """Name the component that the browser draws: gradio's own."""
            return component.__name__.lower()

        get_block_class = get_block_name

        async def async_move_resource_to_block_cache(self, url_or_file_path):
            """Return the path of a file in the cache, as gradio does. Raises UserError for a URL."""
            if "://" in str(url_or_file_path):
                raise UserError("this is a URL; expected an uploaded file.")
            return await super().async_move_resource_to_block_cache(url_or_file_path)

        def preprocess(self, payload):
            """Return the path of the upload, a list of paths for several, or None."""
            return own_path(payload)

    return Uploads


Picture = _uploads(gr.Image)  # models.encoders.images reads it
Sound = _uploads(gr.Audio)  # features.audio reads it


class Files(_uploads(gr.File)):
    """One file, or a folder of them."""

    def preprocess(self, payload):
        """Return the path of the upload, a list of paths for a folder, or None."""
        if payload is None or self.file_count == "single":
            return own_path(payload)
        return [own_path(file) for file in getattr(payload, "root", [payload])]
