"""The model a run trains, and what is said and written about the run before it begins."""

import shlex
import sys

from common import UserError
from training.start import choose_start, take_weights


def build_model(options, features, say):
    """Load the language model, put a fresh mapper before it, and take weights from --init_from → ClipCaptionModel.

    Raises UserError when the language model or the checkpoint cannot be had, or does not fit the options.
    """
    import torch

    from models.captioner import ClipCaptionModel, position_count, stop_token_id
    from models.config import CaptionConfig
    from models.tuning import default_targets, kept_names, mark_trained
    from models.weights import load_language_model, load_tokenizer

    encoder = features.meta.get("encoder")
    gpt2_type = options.gpt2_type or ("distilgpt2" if encoder == "tinyvit" else "gpt2")
    if not options.gpt2_type:
        say(f"language model: {gpt2_type} (the default for {encoder or 'these'} features)")
    gpt, tokenizer = load_language_model(gpt2_type), load_tokenizer(gpt2_type)
    positions = position_count(gpt)
    if positions is not None and options.prefix_length > positions - 2:
        found = f"--prefix_length {options.prefix_length} leaves no room for captions"
        raise UserError(f"{found}: {gpt2_type} has {positions} positions. Take a shorter one.")
    if options.gpt2_dropout is not None:
        set_dropout(gpt, options.gpt2_dropout)
    # Features stored normalised train a mapper that pictures, which the encoder gives unnormalised, must reach normalised too.
    stored_normalized = bool(features.meta.get("normalized"))
    if stored_normalized and not options.normalize_prefix:
        say("the features are stored normalised: --normalize_prefix is on")
    lora = options.lora and {**options.lora, "targets": options.lora["targets"] or default_targets(gpt)}
    vectors = features.clip_embedding.shape[1] if features.clip_embedding.ndim == 3 else 1
    config = CaptionConfig(
        encoder=encoder,
        clip_width=features.clip_embedding.shape[-1],
        prefix_length=options.prefix_length,
        clip_length=options.prefix_length_clip,
        mapping_type=options.mapping_type,
        num_layers=options.num_layers,
        normalize_prefix=options.normalize_prefix or stored_normalized,
        gpt2_type=gpt2_type,
        gpt_config=gpt.config.to_diff_dict(),
        stop_token=options.stop_token,
        pooling=features.meta.get("pooling", "pooled"),
        audio=features.meta.get("audio"),
        tune=options.tune,
        lora=lora,
        freeze_mapper=options.freeze_mapper,
        embeddings_per_image=vectors,
        prompt=options.prompt,
        mapper_heads=options.mapper_heads,
        mapper_dropout=options.mapper_dropout,
    )
    torch.manual_seed(options.seed)
    try:
        model = ClipCaptionModel(config, gpt, tokenizer)
        stop_token_id(tokenizer, options.stop_token)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    options.init_from = choose_start(options, features, say)
    if options.init_from:
        filled = take_weights(model, options.init_from, options, say)
        mark_trained(model)
        if not filled <= kept_names(model) and not options.save_full:
            say(f"checkpoints will hold its language model too, since {gpt2_type} is another (--save_full)")
            options.save_full = True
    return model


def caption_first(model, several, options, device, say):
    """Caption every image by --base_checkpoint and give the captioner its base model → one list of base captions for each data set.

    several: pairs of features (or None) and the path of their first file. Without a base checkpoint every list is None.
    """
    if not options.base_checkpoint:
        return [None] * len(several)
    from dataclasses import asdict

    from accelerate.state import PartialState

    from models.base_captioner import BaseCaptioner
    from training.base_captions import base_captions, digest_of, load_base_model

    base = load_base_model(options.base_checkpoint, several[0][0], device)
    digest = digest_of(base.origin.path)
    with PartialState().main_process_first():
        found = [features and base_captions(base, digest, features, path, say) for features, path in several]
    model.base_captioner = BaseCaptioner(base.to("cpu"))
    model.config.base = asdict(base.config) | {"path": str(options.base_checkpoint), "digest": digest}
    return found


def set_dropout(gpt, share):
    """Set every dropout of a language model: GPT-2 has modules for it, OPT and Llama numbers."""
    import torch

    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


def describe_run(model, data, options, total_steps, precision, device, say):
    """Print what is about to be trained on what, the memory it will take, and whether the warm-up fits the run."""
    from models.tuning import parameter_table
    from training.memory import estimate_memory

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    images, lengths = len(data.features.clip_embedding), data.tokens.lengths
    say(f"data: {images:,} images, {len(lengths):,} captions, {lengths.mean():.1f} tokens each (longest {lengths.max()})")
    say(f"parameters: {trained:,} trained of {total:,} (--tune {options.tune})")
    for part, of_it, size in parameter_table(model):
        say(f"  {part:<16} {of_it:>14,} of {size:>14,}")
    estimate = estimate_memory(model, data, options, precision, device)
    if estimate:
        mib = {name: f"{size / 2**20:,.0f}" for name, size in estimate.items()}
        say(
            f"memory: about {mib['peak']} MiB at the peak of a step, beside the program's own (weights {mib['weights']}, gradients "
            f"{mib['gradients']}, optimiser {mib['optimiser']}, activations {mib['activations']})"
        )
    else:
        say("memory: not estimated for this language model")
    if options.warmup_steps > total_steps:
        say(
            f"warm-up of {options.warmup_steps:,} steps is longer than the run of {total_steps:,}: the learning rate will reach "
            f"{total_steps / options.warmup_steps:.0%} of {options.lr:g}. A shorter run wants a smaller --warmup_steps."
        )


def describe_origin(options, features, digest, argv=None):
    """What goes into the config file beside the weights: command, arguments, versions, seed, data and its digest → dict of plain values.

    argv: the words after the script's name; None takes the program's own.
    """
    import accelerate
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": shlex.join(["python", "train.py", *map(str, sys.argv[1:] if argv is None else argv)]),
        "arguments": {name: value for name, value in vars(options).items() if name != "resume"},
        "versions": {**versions, "accelerate": accelerate.__version__},
        "seed": options.seed,
        "data": {"files": options.data, "digest": digest, "meta": features.meta},
    }
