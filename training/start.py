"""Where a run's weights come from: --init_from takes any checkpoint, ours or a published one, and uses what fits."""

from pathlib import Path

from common import UserError
from models.mappers import MAPPERS

# The names under which Clotho's published recipe keeps the weights it starts from: as its README spells it, and as its code does.
CLOTHO_WEIGHTS = ("model_wieghts.pt", "model_weights.pt")
PARTS = {"all": ("clip_project.", "gpt."), "gpt": ("gpt.",), "mapper": ("clip_project.",)}
GROUPS = {
    "mapper": ("clip_project.",),
    "token table": ("gpt.transformer.wte.",),
    "position table": ("gpt.transformer.wpe.",),
    "blocks": ("gpt.transformer.h.",),
    "final norm": ("gpt.transformer.ln_f.",),
    "head": ("gpt.lm_head.",),
    "language model": ("gpt.",),  # what the others leave, in architectures that are not GPT-2's
}
OPTION_OF_FIELD = {"clip_length": "prefix_length_clip"}  # where the option's name is not the config field's


def choose_start(options, features, say):
    """Choose the checkpoint a run starts from.

    --init_from as given ("none" is none). Without it, features that parse_clotho.py wrote start from the weights that the published
    recipe keeps in the working folder, and this is printed.

    Args:
        options: options of train.py.
        features: Features of the training data.
        say: function that prints a line.

    Returns:
        A path, or None.
    """
    if options.init_from:
        return None if options.init_from.lower() == "none" else options.init_from
    if "audio" not in features.meta and "clotho" not in str(features.meta.get("source", "")).lower():
        return None
    found = next((name for name in CLOTHO_WEIGHTS if Path(name).is_file()), None)
    if found:
        say(f"these are Clotho's features and {found} is here: starting from it, as published (--init_from none prevents it)")
    return found


def take_weights(model, path, options, say):
    """Load a checkpoint's weights into a fresh captioner, and print what was taken and what starts fresh.

    Args:
        model: ClipCaptionModel, which is changed.
        path: the checkpoint.
        options: options of train.py; gpt2_type and init_parts are read.
        say: function that prints a line.

    Returns:
        Set of names of the model's tensors that were filled.

    Raises:
        UserError: mapper, width or language model does not fit; the message explains it.
    """
    from models.checkpoints import open_checkpoint
    from models.state_dicts import fill_captioner

    found = open_checkpoint(path, options.gpt2_type)
    parts = PARTS[options.init_parts]
    holds_gpt = any(name.startswith("gpt.") for name in found.state)
    if options.init_parts == "gpt" and not holds_gpt:
        raise UserError(f"{path} holds a mapper and no language model. Take --init_parts mapper, or a checkpoint of --save_full.")
    faults = []
    if "clip_project." in parts:
        faults += _mapper_faults(model.config, found)
    if "gpt." in parts and holds_gpt:
        faults += _language_model_faults(model, found)
    if faults:
        raise UserError(f"{path} ({found.kind}) does not fit this run: {'; '.join(faults)}.")
    if "clip_project." in parts and model.config.normalize_prefix != found.config.normalize_prefix:
        was, now = ("normalised" if config.normalize_prefix else "unnormalised" for config in (found.config, model.config))
        say(f"note: {path} was trained on {was} embeddings, this run is on {now} ones (--normalize_prefix)")
    if found.config.decoding_style == "clipxgpt":
        say("note: CLIPxGPT's weights saw positions twice; this run adds them once, and has to adapt the weights to that")
    filled = fill_captioner(model, found, parts)
    what = {"all": "mapper and language model" if holds_gpt else "mapper", "gpt": "language model", "mapper": "mapper"}[options.init_parts]
    say(f"starting from {path}: {what} taken ({found.kind})")
    say(f"  taken: {_count_groups(model, filled, parts)}")
    fresh = _count_groups(model, filled, parts, taken=False)
    if fresh:
        source = "" if holds_gpt and "gpt." in parts else f" (language model: {model.config.gpt2_type} as it comes)"
        say(f"  not taken: {fresh}{source}")
    if found.adapters and "gpt." in parts:
        say(f"  merged: LoRA adapters of {len(found.adapters)} layers")
    return filled


def _mapper_faults(config, found):
    """List what keeps a checkpoint's mapper from being this run's, with the option that mends it."""
    theirs = found.config
    if theirs.clip_width != config.clip_width:
        names = [f"{c.clip_width} wide ({c.encoder or 'encoder unknown'})" for c in (theirs, config)]
        return [f"it takes embeddings {names[0]}, the data has them {names[1]}: parse with its encoder, or give --init_parts gpt"]
    fields = ["mapping_type", "prefix_length"]
    if theirs.mapping_type == config.mapping_type:
        fields += [field for field in MAPPERS[config.mapping_type].shaped_by if field not in fields]
    differing = {OPTION_OF_FIELD.get(field, field): (getattr(theirs, field), getattr(config, field)) for field in fields}
    differing = {option: pair for option, pair in differing.items() if pair[0] != pair[1]}
    if not differing:
        return []
    found_here = ", ".join(f"{option} {was} where this run has {now}" for option, (was, now) in differing.items())
    advice = " ".join(f"--{option} {was}" for option, (was, _) in differing.items())
    return [f"its mapper has {found_here}: give {advice}, or --init_parts gpt for its language model under a fresh mapper"]


def _language_model_faults(model, found):
    """List what keeps a checkpoint's language model from being this run's."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("gpt.")}
    theirs = {name: tuple(tensor.shape) for name, tensor in found.state.items() if name.startswith("gpt.")}
    table = "gpt.transformer.wte.weight"
    blocks = [len({name.split(".")[3] for name in names if name.startswith("gpt.transformer.h.")}) for names in (theirs, own)]
    if table not in own or table not in theirs or (own[table] == theirs[table] and blocks[0] == blocks[1]):
        return []  # fill_captioner names what else may not fit
    shapes = [f"{names[table][1]} wide, {count} blocks, {names[table][0]:,} tokens" for names, count in zip((theirs, own), blocks)]
    advice = f"give --gpt2_type {found.config.gpt2_type}, or --init_parts mapper"
    return [f"its language model is {shapes[0]}; this run's {model.config.gpt2_type} is {shapes[1]}: {advice}"]


def _count_groups(model, filled, parts, taken=True):
    """Count the parameters of each group that came from the checkpoint, or did not: "mapper 31,493,120, token table ..."."""
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():  # a head tied to the token table is counted there
        if (name in filled and name.startswith(parts)) == taken:
            counts[next(group for group, starts in GROUPS.items() if name.startswith(starts))] += parameter.numel()
    return ", ".join(f"{group} {count:,}" for group, count in counts.items() if count)
