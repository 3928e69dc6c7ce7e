"""Files that callers name: only those that were uploaded here, so that no URL is fetched for a caller and no file of the server is read."""

from pathlib import Path

from gradio.utils import get_upload_folder

from common import UserError


def own_path(file):
    """Return the path of an upload.

    Args:
        file: dict of gradio's FileData, or None.

    Returns:
        str, or None for no file.

    Raises:
        UserError: it is not a file that was uploaded here.
    """
    if file is None:
        return None
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or "\0" in path or "://" in path:
        raise UserError("this is no uploaded file. Upload it first.")
    folder, path = Path(get_upload_folder()).resolve(), Path(path).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise UserError("this is not a file that was uploaded here. Upload it first.")
    return str(path)


def check_uploads(data):
    """Check every file that a request names, before gradio moves or fetches it. Raises UserError as own_path does."""
    inside = list(data)
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            if "path" in value:
                own_path(value)
            inside += value.values()
        elif isinstance(value, (list, tuple)):
            inside += value
