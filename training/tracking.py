"""Where a run can be watched besides its own files: TensorBoard, or Weights & Biases, through accelerate."""

import importlib.util
import json
from pathlib import Path

from common import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # tracker → package
PROJECT = "prefixcap"  # on Weights & Biases
SHOWN = ("loss", "lr", "captions_per_s", "val_loss", "val_perplexity", "val_gap", "val_cider", "val_ended", "val_distinct_share")


def check_tracker(name):
    """Raise UserError when the tracker's package is not installed. name: tensorboard, wandb or none."""
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--tracker {name} needs the package {package}, which is not here. Run `pip install {package}`, or --tracker none.")


def start_tracker(accelerator, options, step):
    """Begin the tracker of a run, on the main process → a callable that takes a line of the metrics file.

    TensorBoard writes into {out_dir}/{prefix}_tensorboard/; a resumed run's events after `step` are hidden there.
    """
    if options.tracker == "none":
        return lambda line: None
    if options.tracker == "tensorboard":
        accelerator.init_trackers(f"{options.prefix}_tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1} if step else {}})
    else:
        accelerator.init_trackers(PROJECT, init_kwargs={"wandb": {"name": options.prefix, "dir": str(Path(options.out_dir))}})
    settings = json.dumps({name: value for name, value in vars(options).items() if name != "resume"}, indent=2)
    if options.tracker == "wandb":
        accelerator.trackers[0].store_init_configuration(json.loads(settings))
    elif not step:
        accelerator.trackers[0].log({"settings": f"```\n{settings}\n```"}, step=0)

    def track(line):
        figures = dict(line)
        if "val_distinct" in line:
            figures["val_distinct_share"] = line["val_distinct"] / line["val_captions"]
        kinds = {name: f"validation/{name[4:]}" if name.startswith("val_") else f"training/{name}" for name in SHOWN}
        accelerator.log({kinds[name]: figures[name] for name in SHOWN if name in figures}, step=line["step"])

    return track
