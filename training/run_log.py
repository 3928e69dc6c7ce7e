"""The run's log: one JSON line per logging interval and validation, sample captions, a picture of the curves, and a tracker."""

import importlib.util
import json
import math
import time
from pathlib import Path

from common import UserError

SECONDS_BETWEEN_PICTURES = 30
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # from tracker to package
PROJECT = "prefixcap"  # on Weights & Biases
TRACKED = ("loss", "lr", "captions_per_s", "val_loss", "val_perplexity", "val_gap", "val_cider", "val_ended", "val_distinct_share")


class RunLog:
    """Writes {run_name}_metrics.jsonl, {run_name}_metrics.png and {run_name}_samples.jsonl, and shows a progress bar.

    A line of metrics holds step (optimizer steps done), epoch, loss (nats per token, mean over the interval), lr and captions_per_s of the
    interval; or, of a validation, figures whose names begin with val_. A line of samples is a row of CaptionSample.score. Where a run
    is resumed at a step, later lines of both are cut off. Only the main process writes.
    """

    def __init__(self, options, accelerator, total_steps, position, settings):
        """Open the log.

        Args:
            options: options of train.py.
            accelerator: accelerate.Accelerator.
            total_steps: optimizer steps of the whole run.
            position: training.state.Position, where the run begins.
            settings: dict of options as settled, for the tracker.

        Raises:
            UserError: the folder cannot be written.
        """
        from tqdm import tqdm

        self.writes, self.run_name = accelerator.is_main_process, options.prefix
        self.path = Path(options.out_dir) / f"{options.prefix}_metrics.jsonl"
        self.samples = Path(options.out_dir) / f"{options.prefix}_samples.jsonl"
        self.picture = self.path.with_suffix(".png")
        self.drawn = time.monotonic()
        self.losses = []  # (step, loss, captions) of the steps since check_losses
        self._track = lambda line: None
        if self.writes:
            self._cut_back(position.step)
            self._track = start_tracker(accelerator, options, settings, position.step)
        self.bar = tqdm(total=total_steps, initial=position.step, unit="step", disable=None if self.writes else True)
        self._begin(position.interval)

    def _cut_back(self, step):
        """Keep the lines up to `step`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.samples):
                kept = [line for line in self._lines(path) if line["step"] <= step] if step else []
                if kept or path == self.path:
                    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                else:
                    path.unlink(missing_ok=True)  # samples are there where something was validated
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}. Give another --out_dir.") from error

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

    def _begin(self, interval=None):
        sums = interval or {"loss_sum": 0.0, "tokens": 0, "captions": 0, "seconds": 0.0}
        self.loss_sum, self.tokens, self.captions = sums["loss_sum"], sums["tokens"], sums["captions"]
        self.started = time.perf_counter() - sums["seconds"]

    def interval(self):
        """Return the sums of the current interval, for the resume point: a dict of numbers; None at its beginning."""
        if not self.captions:
            return None
        seconds = time.perf_counter() - self.started
        return {"loss_sum": float(self.loss_sum), "tokens": int(self.tokens), "captions": self.captions, "seconds": seconds}

    def count(self, step, result, captions):
        """Add one optimizer step.

        Args:
            step: optimizer steps done.
            result: training.optimizer.StepResult; its tensors are read only when a line is written.
            captions: [n] int64, numbers of the step's captions.
        """
        self.losses.append((step, result.loss_sum, captions))
        self.loss_sum = self.loss_sum + result.loss_sum
        self.tokens += result.tokens
        self.captions += len(captions)
        self.bar.update()

    def check_losses(self, data):
        """Check the losses since the last check. They stay on the device until then, so that a GPU need not wait at every step.

        Raises:
            UserError: one is not finite; the message names its captions.
        """
        import torch

        values = torch.stack([loss for _, loss, _ in self.losses]).tolist() if self.losses else []
        for (step, _, captions), value in zip(self.losses, values):
            if not math.isfinite(value):
                named = data.name_captions(captions)
                raise UserError(f"loss is {value} at step {step:,}, on {named}. The last good checkpoint is kept; try a smaller --lr.")
        self.losses = []

    def write(self, step, epoch, lr):
        """Write the line of this interval, begin the next, and return the line as a dict."""
        line = {
            "step": step,
            "epoch": epoch,
            "loss": float(self.loss_sum) / max(1, int(self.tokens)),
            "lr": lr,
            "captions_per_s": round(self.captions / (time.perf_counter() - self.started), 2),
        }
        if self.writes:
            self._append(self.path, [line])
            self._track(line)
        self.bar.set_postfix(epoch=epoch, loss=f"{line['loss']:.3f}", captions_per_s=f"{line['captions_per_s']:.0f}")
        self._begin()
        return line

    def write_validation(self, step, epoch, figures, samples):
        """Write the figures of a validation as a line, and the rows of its sample captions."""
        line = {"step": step, "epoch": epoch, **figures}
        if self.writes:
            self._append(self.path, [line])
            self._append(self.samples, [{"step": step, "epoch": epoch, **row} for row in samples])
            self._track(line)

    def _append(self, path, lines):
        if lines:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def draw(self, finished):
        """Draw the picture of the log so far. Unless the run is finished, it is not drawn again within half a minute."""
        from reports.plots import plot_training

        if not self.writes or (not finished and time.monotonic() - self.drawn < SECONDS_BETWEEN_PICTURES):
            return
        lines = self._lines(self.path)
        if lines:
            plot_training(lines, self.run_name, self.picture)
        self.drawn = time.monotonic()

    def close(self):
        """End the progress bar."""
        self.bar.close()


def check_tracker(name):
    """Raise UserError when the package of a tracker ("tensorboard", "wandb" or "none") is not installed."""
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--tracker {name} needs {package}, which is not installed. Run `pip install {package}`, or take --tracker none.")


def start_tracker(accelerator, options, settings, step):
    """Begin the tracker of a run, on the main process.

    TensorBoard writes into {out_dir}/{prefix}_tensorboard/; there a resumed run's events after `step` are hidden.

    Returns:
        Function that takes a line of the metrics file.
    """
    if options.tracker == "none":
        return lambda line: None
    if options.tracker == "tensorboard":
        accelerator.init_trackers(f"{options.prefix}_tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1} if step else {}})
    else:
        accelerator.init_trackers(PROJECT, init_kwargs={"wandb": {"name": options.prefix, "dir": str(Path(options.out_dir))}})
    shown = json.dumps({name: value for name, value in settings.items() if name != "resume"}, indent=2)
    if options.tracker == "wandb":
        accelerator.trackers[0].store_init_configuration(json.loads(shown))
    elif not step:
        accelerator.trackers[0].log({"settings": f"```\n{shown}\n```"}, step=0)

    def track(line):
        figures = dict(line)
        if "val_distinct" in line:
            figures["val_distinct_share"] = line["val_distinct"] / line["val_captions"]
        names = {name: f"validation/{name[4:]}" if name.startswith("val_") else f"training/{name}" for name in TRACKED}
        accelerator.log({names[name]: figures[name] for name in TRACKED if name in figures}, step=line["step"])

    return track
