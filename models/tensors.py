"""Files of tensors: written whole or not at all, and read without running code from them."""

import pickle
import re
from pathlib import Path

import torch

from common import UserError, replace_file
from models.weights import READ_ERRORS, refuse_compressed


def save_tensors(content, path):
    """Write with torch.save under a temporary name, then rename. Equal content gives equal bytes, whatever the file's name."""
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # On a full disk torch's writer fails twice; the first error has the reason.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_tensors(path):
    """Read a file of tensors and plain containers, on the CPU, without running code from it.

    Raises:
        UserError: the file is missing or damaged, or asks for code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}. Give the path of a .pt file, such as one that train.py wrote.")
    try:
        refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"asks for {wanted.group(1)}" if wanted else "is damaged, or holds more than tensors"
        raise UserError(f"{path} {found}; expected a state dict of tensors. Nothing in it was run.") from error
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or ["ends early"])[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}). Copy or download it again.") from error
