"""Where and in which number format a run computes: device, precision, processes, and torch.compile."""

import contextlib
import os
import shutil

from common import UserError
from training.run_log import check_tracker

# What torch.compile builds its kernels with: C++ for a CPU, C for what launches them on a GPU.
COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang", "cc"))}

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # ways of accelerate that are not supported


def start_accelerator(options):
    """Set up device, precision, processes and tracker as the options ask, and print them.

    Returns:
        accelerate.Accelerator; its mixed_precision is "no", "bf16" or "fp16". Weights stay float32 either way.

    Raises:
        UserError: a device, precision or tracker that this machine does not have, a sharded model, or processes that cannot train together.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    sharded = next((name for name in SHARDED if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")), None)
    if sharded:
        found = f"accelerate is set up for {sharded}, which spreads a model over GPUs"
        raise UserError(f"{found}; train.py keeps the whole model on each. Run accelerate config again, for multi-GPU without it.")
    # oneDNN keeps 1,024 compiled matrix products. Packed batches bring new shapes with each step, so most are of no more use; they took
    # 0.7 GB after 40 steps of a language model of 30 layers.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # A second run in one process (a notebook, a test) must not inherit the settings of the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    # On a CPU accelerate brings a launcher's processes together only where it is told that the device is one.
    cpu = options.device == "cpu" or (options.device is None and not torch.accelerator.is_available())
    device_type = PartialState(cpu=cpu).device.type
    if options.device and options.device != device_type:
        raise UserError(f"--device {options.device} is not available; this machine offers {device_type}. Leave --device out.")
    precision, reason = choose_precision(options.mixed_precision, device_type)
    if precision == "fp16" and device_type != "cuda":
        raise UserError(f"--mixed_precision fp16 needs CUDA; this run is on {device_type}. Take bf16 or no.")
    check_tracker(options.tracker)
    tracker = None if options.tracker == "none" else options.tracker
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, log_with=tracker, project_dir=options.out_dir)
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != started:
        found = f"a launcher started {started} processes, and on {device_type} each would train for itself"
        raise UserError(f"{found}. Start one process, or give --device cpu.")
    name = "fp32" if precision == "no" else precision
    accelerator.print(f"device: {accelerator.device}, {accelerator.num_processes} process(es); precision: {name} ({reason})")
    return accelerator


def choose_precision(wanted, device_type):
    """Settle --mixed_precision.

    Args:
        wanted: "auto", "no", "bf16" or "fp16". auto is bf16 where the hardware multiplies bf16, else float32.
        device_type: "cuda", "cpu" or "mps".

    Returns:
        The value for accelerate ("no", "bf16" or "fp16"), and the reason to print.
    """
    import torch

    if wanted != "auto":
        return wanted, "as asked"
    if device_type == "cuda":
        has_bf16, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    elif device_type == "cpu":
        has_bf16, what = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported(), "this CPU"
    else:
        has_bf16, what = False, device_type
    return ("bf16", f"{what} multiplies bf16") if has_bf16 else ("no", f"{what} does not multiply bf16")


def compile_language_model(model, device_type):
    """Compile the language model's blocks in place; names of parameters stay as they are.

    Rows of packed batches differ in number and length, so shapes are left open and a few graphs serve all of them. Losses stay the same
    except for rounding and the draws of dropout.

    Raises:
        UserError: there is no compiler.
    """
    variable, names = COMPILERS.get(device_type, COMPILERS["cpu"])
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        raise UserError(f"--compile needs a compiler: {' or '.join(wanted)} was not found. Install one, set {variable}, or leave it out.")
    model.gpt.base_model.compile(dynamic=True)


def map_together(function, items):
    """Apply a function to every item, shared by the processes of the run as equal runs of neighbours.

    Args:
        function: item -> list of objects that can be pickled.
        items: sequence.

    Returns:
        List of all results in the order of the items, the same in every process.
    """
    from accelerate.state import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    rank, processes = state.process_index, state.num_processes
    own = items[rank * len(items) // processes : (rank + 1) * len(items) // processes]
    return gather_object([result for item in own for result in function(item)])


def uncompiled(model):
    """Run the language model uncompiled while this context lasts: decoding grows the cache by one slot per token."""
    if model.gpt.base_model._compiled_call_impl is None:
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")
