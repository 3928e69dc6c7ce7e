"""Which number format a run computes in."""


def choose_precision(wanted, device_type):
    """Settle --mixed_precision → (value for accelerate, the reason to print).

    wanted: auto, no, bf16 or fp16. auto is bf16 where the hardware multiplies bf16, else float32; weights stay float32 either way.
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
