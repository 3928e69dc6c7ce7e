"""Measure the peak memory of one training step of 8 images x 5 captions, above the model's own; each side runs in its own process.

    python -m benchmarks.memory published mlp            prints a line of JSON: bytes above the model, and bytes of the model
    python -m benchmarks.memory ours transformer --bf16

On a CPU this is the peak of resident memory during the step, minus that after loading the model, without mapped files. With --device cuda
it is torch's max_memory_allocated, likewise.
"""

import gc
import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

from benchmarks import work
from common import Parser, UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent


def peak_of_step(side, variant, bf16=False, device="cpu", scale=None):
    """Return {"step": peak bytes above the model, "model": bytes of its parameters}. scale: work.Scale (default full size)."""
    import torch

    scale = scale or work.Scale()
    ours = work.build_captioner(variant, scale.clip[0], **scale.gpt).to(device)
    captions = work.caption_set(scale, device)
    numbers = list(range(scale.step_captions))
    if side == "ours":
        from benchmarks.ours import Training
        from models.operators import accelerate_model

        training = Training(accelerate_model(ours), captions)

        def step(some):
            training.step(some, bf16)
    else:
        theirs = work.build_published(ours, **scale.gpt).to(device)
        del ours
        training = work.published_training(theirs, variant)

        def step(some):
            training.step(captions.embedding_of(some), captions.lists(some))

    gc.collect()
    model = sum(tensor.numel() * tensor.element_size() for tensor in training.model.parameters())
    before = torch.cuda.memory_allocated() if device == "cuda" else resident()
    step(numbers[: work.CAPTIONS_AN_IMAGE])  # makes the optimizer's state before the step that is measured
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(numbers)
        return {"step": torch.cuda.max_memory_allocated() - before, "model": model}
    with Peak() as peak:
        step(numbers)
    return {"step": peak.bytes - before, "model": model}


def resident():
    """Return the bytes of memory this process holds, without mapped files; where the system does not say, the most it ever held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Peak:
    """Watch resident() every few milliseconds while the block runs; .bytes is the maximum."""

    def __enter__(self):
        self.bytes, self.ended = resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.ended.wait(0.003):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, resident())


def measure(side, variant, bf16=False, device="cpu"):
    """Run peak_of_step in a new process. Raises UserError when it fails."""
    words = [sys.executable, "-m", "benchmarks.memory", side, variant, "--device", device, *(["--bf16"] if bf16 else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words[1:])} failed: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.memory", description=__doc__)
    parser.add_argument("side", choices=("published", "ours"))
    parser.add_argument("variant", choices=tuple(work.VARIANTS))
    parser.add_argument("--bf16", action="store_true", help="run our side under bf16 autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    print(json.dumps(peak_of_step(options.side, options.variant, options.bf16, options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
