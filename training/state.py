"""Where a run stands: its files of weights, its resume point, the best validation so far, and how it ends."""

import contextlib
import dataclasses
import enum
import math
import signal
import threading
from pathlib import Path

from common import claim_output
from training.identity import check_name_is_free, describe_new_schedule, read_resume_point


def claim_run(options, writes):
    """Return a context in which no other run writes files of this name; `writes`: whether this is the process that writes."""
    return claim_output(Path(options.out_dir) / options.prefix) if writes else contextlib.nullcontext()


class Ending(enum.Enum):
    """How a run ends."""

    FINISHED = "finished"
    OUT_OF_PATIENCE = "out of patience"
    STOPPED = "stopped by a signal"


def find_ending(step, plan, best, stopping=False):
    """Return how the run ends after `step` optimizer steps; None where it does not."""
    if step >= plan.total_steps:
        return Ending.FINISHED
    if best.is_out_of_patience:
        return Ending.OUT_OF_PATIENCE
    return Ending.STOPPED if stopping else None


class StopRequest:
    """A context in which SIGINT and SIGTERM only set `signal_name`; a second SIGINT interrupts at once, as usual.

    Outside the main thread (a notebook's worker) signals keep their handlers.
    """

    def __init__(self):
        self.signal_name = None
        self.exit_code = 0
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        self.exit_code = 128 + number


class BestSoFar:
    """The best validation, by loss (lowest) or CIDEr (highest), and how many came since."""

    def __init__(self, patience=None, by="loss", value=None, epochs_since=0, step=-1):
        """Begin with no validation, or as `as_dict` recorded it.

        Args:
            patience: validations without a better one before training stops; None never stops it.
            step: optimizer steps done at the last validation.
        """
        self.patience, self.by, self.value, self.epochs_since, self.step = patience, by, value, epochs_since, step

    def update(self, figures, step):
        """Count a validation and return whether it is the best.

        Args:
            figures: what Validation.run returned.
            step: optimizer steps done.
        """
        value = figures[f"val_{self.by}"]
        better = self.value is None or (value < self.value if self.by == "loss" else value > self.value)
        better = better and not math.isnan(value)
        self.value = value if better else self.value
        self.epochs_since = 0 if better else self.epochs_since + 1
        self.step = step
        return better

    @property
    def is_out_of_patience(self):
        return self.patience is not None and self.epochs_since >= self.patience

    def describe_wait(self, unit):
        """Say how many validations came without a better one."""
        record = f"{self.value:.4f}" if self.by == "loss" else f"{100 * self.value:.1f}"
        return f"{self.epochs_since} {unit} without a better validation {self.by} than {record}"

    def as_dict(self):
        """Return what a resume point records."""
        return {"by": self.by, "value": self.value, "epochs_since": self.epochs_since, "step": self.step}


def random_states():
    """Return the state of every random generator that dropout draws from, as a dict of tensors."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states):
    """Set the generators back to what random_states returned."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@dataclasses.dataclass
class Position:
    """Where a run begins."""

    best: BestSoFar
    step: int = 0  # optimizer steps done
    interval: dict | None = None  # sums of the logging interval that the run was stopped in


class Checkpoints:
    """Every file of weights that a run writes: their names, and what goes into them. Only the main process writes.

    `{prefix}-{epoch:03d}.pt` (numbered), `{prefix}_latest.pt`, `{prefix}_best.pt` hold weights; `{prefix}.json` the config;
    `{prefix}_state.pt` is the resume point, one file with all that a stopped run needs to end in the same weights.
    """

    def __init__(self, options, model, optimizer, identity, full, writes=True):
        """Name the files.

        Args:
            options: options of train.py.
            model: the bare ClipCaptionModel.
            optimizer: its optimizer.
            identity: what describe_identity returned.
            full: whether checkpoints hold the whole language model.
            writes: whether this process writes.
        """
        self.stem = Path(options.out_dir) / options.prefix
        self.save_every, self.keep_last = options.save_every, options.keep_last
        self.model, self.optimizer, self.identity, self.full, self.writes = model, optimizer, identity, full, writes
        self.numbered = []  # epochs whose numbered checkpoints this run wrote
        self.resume_point = self.path("_state")

    @property
    def config_file(self):
        """Path of the config, which describes every file of weights of this name."""
        return self.stem.with_name(f"{self.stem.name}.json")

    def path(self, label):
        """Return the path of the file with this label: "-003", "_latest", "_best" or "_state"."""
        return self.stem.with_name(f"{self.stem.name}{label}.pt")

    def numbered_path(self, epoch):
        """Return the path of an epoch's checkpoint."""
        return self.path(f"-{epoch:03d}")

    def save_config(self, made_by):
        """Write `{prefix}.json`: the model's config, and how the run was made."""
        from models.checkpoints import save_config

        if self.writes:
            save_config(self.model.config, made_by, self.config_file)

    def save_weights(self, label):
        """Write a checkpoint with this label."""
        from models.checkpoints import save_checkpoint

        if self.writes:
            save_checkpoint(self.model, self.path(label), self.full)

    def save_epoch(self, epoch, is_last):
        """Write the numbered checkpoint of an epoch where one is due, and remove those that --keep_last does not keep."""
        if epoch % self.save_every and not is_last:
            return
        self.save_weights(f"-{epoch:03d}")
        self.numbered = [number for number in self.numbered if number != epoch] + [epoch]
        while self.keep_last is not None and len(self.numbered) > self.keep_last:
            oldest = self.numbered.pop(0)
            if self.writes:
                self.numbered_path(oldest).unlink(missing_ok=True)

    def save_resume_point(self, step, best, interval, finished=False):
        """Write the resume point.

        Args:
            step: optimizer steps done.
            best: BestSoFar.
            interval: sums of the current logging interval (RunLog.interval).
            finished: whether the run has reached its end.
        """
        from models.tensors import save_tensors

        if not self.writes:
            return
        content = {
            "weights": {name: tensor.detach().cpu() for name, tensor in self._trained().items()},
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "best": best.as_dict(),
            "finished": finished,
            "random": random_states(),
            "identity": self.identity,
            "interval": interval,
            "numbered": self.numbered,
        }
        save_tensors(content, self.resume_point)

    def find_position(self, options, plan, say):
        """Find where the run begins: with --resume at the resume point, whose weights and random generators it takes over.

        Args:
            options: options of train.py.
            plan: training.batches.Plan.
            say: function that prints a line.

        Returns:
            Position

        Raises:
            UserError: the resume point is damaged, or the folder's files belong to another run; the message names what differs.
        """
        path = self.resume_point
        state = read_resume_point(path, self.identity) if options.resume and path.exists() else None
        if self.writes:
            check_name_is_free(self.model.config, self.config_file)
        if state is None:
            if options.resume:
                say(f"nothing to resume at {path}: starting from scratch")
            return Position(BestSoFar(options.patience, options.best_by))
        step, trained = state["step"], self._trained()
        for name, tensor in state["weights"].items():
            trained[name].data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"])
        # Resume points of older versions do not say which numbered checkpoints their run wrote: those of its epochs so far.
        self.numbered = state.get("numbered", list(range(0, step // plan.steps_per_epoch, options.save_every)))
        say(f"resumed {path} after step {step:,} of {plan.total_steps:,}")
        changed = describe_new_schedule(state["identity"], self.identity, step)
        if changed:
            say(changed)
        return Position(BestSoFar(options.patience, **state["best"]), step, state.get("interval"))

    def _trained(self):
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
