"""Files of tensors: written whole or not at all, and read without running code from them."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

from common import ARCHIVE_ERRORS, UserError, replace_file

# What readers of weights, images and archives raise on a file that is damaged or of another kind.
READ_ERRORS = (
    *ARCHIVE_ERRORS, OSError, SyntaxError, TypeError, AttributeError, ArithmeticError, AssertionError, pickle.UnpicklingError,
)  # fmt: skip


def save_tensors(content, path):
    """Write with torch.save under a temporary name, then rename. Equal content gives equal bytes, whatever the file's name."""
    import torch

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
        return load_plainly(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"asks for {wanted.group(1)}" if wanted else "is damaged, or holds more than tensors"
        raise UserError(f"{path} {found}; expected a state dict of tensors. Nothing in it was run.") from error
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or ["ends early"])[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}). Copy or download it again.") from error


def read_state(path):
    """Read a weight file (.safetensors, or a state dict of torch) as a dict of tensors, without running code from it.

    Raises:
        UserError: its tensors would take more memory than the file.
        One of READ_ERRORS: anything else that is wrong.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    state = load_plainly(path)
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, torch.Tensor) and tensor.numel() > max(1, tensor.untyped_storage().nbytes() // tensor.element_size()):
            raise UserError(f"{path} promises more data than it holds ({name} is {tuple(tensor.shape)}): refused. Download it again.")
    return state


def load_plainly(path):
    """Read a file of torch on the CPU, without running code from it; warnings on files that are of another kind are left out.

    Raises:
        UserError: its members are compressed.
        One of READ_ERRORS: anything else that is wrong.
    """
    import torch

    refuse_compressed(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def refuse_compressed(path, concerns=lambda name: True):
    """Refuse a zip whose members would take more memory than the file: torch stores them plainly and one after another.

    Args:
        path: a file, zip or not.
        concerns: function(name of a member) that tells whether it will be read.

    Raises:
        UserError: members are compressed, or share their bytes.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if concerns(member.filename)]
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} holds compressed data ({member.filename}), which torch never writes: refused.")
    if sum(member.file_size for member in members) > os.path.getsize(path):
        raise UserError(f"{path} promises more data than it holds: refused. Download it again.")
