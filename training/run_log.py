"""The run's log: one JSON line a logging interval and a validation, sample captions, and a picture of the curves."""

import json
import time
from pathlib import Path

from common import UserError

SECONDS_BETWEEN_PICTURES = 30


class RunLog:
    """Writes {run_name}_metrics.jsonl, {run_name}_metrics.png and {run_name}_samples.jsonl.

    A line of metrics holds step (optimiser steps done), epoch, loss (nats a token, mean over the interval), lr and captions_per_s of the
    interval; or, of a validation, figures whose names begin with val_. A line of samples is a row of training.sampling. On resuming at
    `start_step` later lines of both are cut off. Raises UserError when the folder cannot be written.
    """

    def __init__(self, out_dir, run_name, start_step=0):
        self.path = Path(out_dir) / f"{run_name}_metrics.jsonl"
        self.samples = Path(out_dir) / f"{run_name}_samples.jsonl"
        self.picture = self.path.with_suffix(".png")
        self.title = run_name
        self.drawn = time.monotonic()
        self.track = lambda line: None  # what else is told of each line (training.tracking)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.samples):
                kept = [line for line in self._lines(path) if line["step"] <= start_step] if start_step else []
                if kept or path == self.path:
                    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                else:
                    path.unlink(missing_ok=True)  # samples are there where something was validated
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}. Give another --out_dir.") from error
        self._begin()

    def _lines(self, path):
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the line a killed run was writing
        return lines

    def _begin(self):
        self.loss_sum, self.tokens, self.captions, self.started = 0.0, 0, 0, time.perf_counter()

    def write_validation(self, step, epoch, figures, samples):
        """Write the figures of a validation as a line, and the rows of its sample captions."""
        line = {"step": step, "epoch": epoch, **figures}
        self._append(self.path, [line])
        if samples:
            self._append(self.samples, [{"step": step, "epoch": epoch, **row} for row in samples])
        self.track(line)

    def _append(self, path, lines):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def count(self, loss_sum, tokens, captions):
        """Add one optimiser step: its sum of losses in nats, tokens and captions (scalar tensors are read only when a line is written)."""
        self.loss_sum = self.loss_sum + loss_sum
        self.tokens += tokens
        self.captions += captions

    def write(self, step, epoch, lr):
        """Write the line of this interval and begin the next → the line as a dict."""
        line = {
            "step": step,
            "epoch": epoch,
            "loss": float(self.loss_sum) / max(1, int(self.tokens)),
            "lr": lr,
            "captions_per_s": round(self.captions / (time.perf_counter() - self.started), 2),
        }
        self._append(self.path, [line])
        self.track(line)
        self._begin()
        return line

    def draw(self, finished):
        """Draw the picture of the log so far; unless the run is finished, not again within half a minute."""
        from reports.plots import plot_training

        if not finished and time.monotonic() - self.drawn < SECONDS_BETWEEN_PICTURES:
            return
        lines = self._lines(self.path)
        if lines:
            plot_training(lines, self.title, self.picture)
        self.drawn = time.monotonic()
