"""What a run is: what a resumed one must share with it, and which names of files belong to another one."""

import json

from common import UserError
from training.optimizer import learning_rate
from training.options import NOT_COMPARED

FIELDS = {"weights", "optimizer", "step", "best", "finished", "random", "identity"}  # of every resume point
LATER_FIELDS = {"interval", "numbered"}  # those written before these were added still load


def describe_identity(options, plan, start, precision, config, digest, val_digest):
    """Describe what a resumed run must share: every option but NOT_COMPARED, and what those resolve to.

    Args:
        options: options of train.py.
        plan: training.batches.Plan.
        start: checkpoint the run started from, or None.
        precision: "no", "bf16" or "fp16".
        config: CaptionConfig.
        digest: digest of the training data; val_digest: of the validation data, or None.

    Returns:
        Dict of plain values.
    """
    identity = {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}
    follows = options.warmup_steps is None and not options.published  # the warm-up changes with the length of the run
    identity |= {"init_from": start, "warmup_steps": plan.warmup_steps, "total_steps": plan.total_steps, "precision": precision}
    identity |= {"warmup_follows": follows}
    return identity | {"model": vars(config), "data": digest, "val_data": val_digest}


def find_differences(recorded, identity):
    """Compare the identity of a resume point with that of this run, over the names that both have.

    Returns:
        Dict of name to (recorded value, value now).
    """
    was, now = _flatten(recorded), _flatten(identity)
    return {name: (was[name], now[name]) for name in was if name in now and was[name] != now[name]}


def _flatten(identity):
    return {name: value for name, value in identity.items() if name != "model"} | _comparable(identity["model"])


def _comparable(model):
    """Return what matters of a model's config as a dict: without a library's version, and the paths of a base model and a datastore."""
    model = json.loads(json.dumps(model))
    for part, name in (("gpt_config", "transformers_version"), ("base", "path"), ("retrieval", "datastore")):
        if isinstance(model.get(part), dict):
            model[part].pop(name, None)
    return model


def _flat(model):
    """Return what matters of a model's config as one dict, whose parts have names such as "lora.rank"."""
    flat = {}
    for name, value in _comparable(model).items():
        flat |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def check_name_is_free(config, path):
    """Check that weights which carry no config of their own are described by the config that a run will write.

    Args:
        config: CaptionConfig of the run.
        path: the file to write it to, `{prefix}.json`.

    Raises:
        UserError: weights of that name have another config, or none; the message names what differs.
    """
    from models.checkpoints import carries_config, config_path, read_config

    weights = sorted(file for file in path.parent.glob("*.pt") if config_path(file) == path and not carries_config(file))
    if not weights:
        return
    differing = "they have no config"
    if path.is_file():
        recorded = read_config(path)
        was, now = _flat(recorded if isinstance(recorded, dict) else vars(recorded)), _flat(vars(config))
        names = [name for name in {**was, **now} if name != "base.digest"]  # the base model's weights are in the checkpoint
        differing = ", ".join(f"{name} {was.get(name)!r} (now {now.get(name)!r})" for name in names if was.get(name) != now.get(name))
    if differing:
        raise UserError(
            f"{weights[0]} holds weights of another model: {differing}. Give another --prefix or --out_dir; to continue that run, give its "
            "options and --resume."
        )


def read_resume_point(path, identity):
    """Read a resume point.

    Args:
        path: the file.
        identity: what describe_identity returned for this run, whose length may be another.

    Returns:
        Its dict.

    Raises:
        UserError: it is none, belongs to another run, or is beyond the end of this one; the message says what differs.
    """
    from models.tensors import read_tensors

    state = read_tensors(path)
    if not isinstance(state, dict) or not FIELDS <= set(state) <= FIELDS | LATER_FIELDS:
        raise UserError(f"{path} is not a resume point of train.py. Remove it, or train without --resume.")
    differing = find_differences(state["identity"], identity)
    differing.pop("total_steps", None)
    recorded = state["identity"]
    if identity["warmup_follows"] and recorded.get("warmup_follows", recorded["warmup_ratio"] is not None):
        differing.pop("warmup_steps", None)
    if differing:
        was = ", ".join(f"{name} {before!r} (now {now!r})" for name, (before, now) in differing.items())
        raise UserError(f"{path} is of another run: {was}. Give the same options, or another --out_dir or --prefix.")
    if state["step"] > identity["total_steps"]:
        found = f"{path} is after step {state['step']:,}, and this run would end at step {identity['total_steps']:,}"
        raise UserError(f"{found}. Give more --epochs or --max_steps, or another --out_dir or --prefix.")
    return state


def describe_new_schedule(recorded, identity, step):
    """Say in one line how the schedule changes for a run that is resumed with another length; None where it has the same.

    Args:
        recorded: identity in the resume point.
        identity: identity of this run.
        step: optimizer steps done.
    """
    was, now = recorded["total_steps"], identity["total_steps"]
    if was == now:
        return None
    rates = [learning_rate(step, identity["lr"], one["warmup_steps"], one["total_steps"]) for one in (recorded, identity)]
    return (
        f"the run has {now:,} steps instead of {was:,}: after step {step:,} the learning rate is {rates[1]:.3g} instead of {rates[0]:.3g}, "
        f"and it reaches 0 at step {now:,}"
    )
