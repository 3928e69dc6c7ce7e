"""--compile: the language model through torch.compile."""

import contextlib
import os
import shutil

from common import UserError

# What torch.compile builds its kernels with: C++ for a CPU, C for what launches them on a GPU.
COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang", "cc"))}


def compile_language_model(model, device_type):
    """Have the blocks of the language model compiled when they are first called, in place: names of parameters stay as they are.

    Rows of packed batches differ in number and length, so shapes are left open: a few graphs serve all of them. Losses stay the same but
    for rounding, and for dropout, whose draws are others. Raises UserError where there is no compiler.
    """
    variable, names = COMPILERS.get(device_type, COMPILERS["cpu"])
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        raise UserError(f"--compile needs a compiler: {' or '.join(wanted)} is not here. Install one, set {variable}, or leave it out.")
    model.gpt.base_model.compile(dynamic=True)


def uncompiled(model):
    """While this context lasts the language model runs as it is: decoding, whose cache grows by a slot a token, is not worth compiling."""
    if getattr(model.gpt.base_model, "_compiled_call_impl", None) is None:
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")
