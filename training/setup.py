"""The model a run trains, and what is said and written about the run before it begins."""

import sys

from common import UserError

from .start import choose_start, take_weights


def build_model(options, features, say):
    """Load the language model, put a fresh mapper before it, and take weights from --init_from → ClipCaptionModel.

    Raises UserError when the language model or the checkpoint cannot be had, or does not fit the options.
    """
    import torch

    from models.captioner import CaptionConfig, ClipCaptionModel, stop_token_id
    from models.weights import load_language_model, load_tokenizer

    encoder = features.meta.get("encoder")
    gpt2_type = options.gpt2_type or ("distilgpt2" if encoder == "tinyvit" else "gpt2")
    if not options.gpt2_type:
        say(f"language model: {gpt2_type} (the default for {encoder or 'these'} features)")
    gpt, tokenizer = load_language_model(gpt2_type), load_tokenizer(gpt2_type)
    positions = getattr(gpt.config, "max_position_embeddings", None)
    if positions is not None and options.prefix_length > positions - 2:
        found = f"--prefix_length {options.prefix_length} leaves no room for captions"
        raise UserError(f"{found}: {gpt2_type} has {positions} positions. Take a shorter one.")
    if options.gpt2_dropout is not None:
        for module in gpt.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.gpt2_dropout
    config = CaptionConfig(
        encoder=encoder,
        clip_width=features.width,
        prefix_length=options.prefix_length,
        clip_length=options.prefix_length_clip,
        mapping_type=options.mapping_type,
        num_layers=options.num_layers,
        normalize_prefix=options.normalize_prefix,
        gpt2_type=gpt2_type,
        gpt_config=gpt.config.to_diff_dict(),
        stop_token=options.stop_token,
        tune="mapper" if options.only_prefix else "full",
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
        found = take_weights(model, options.init_from, options, say)
        holds_gpt = options.init_parts != "mapper" and (bool(found.adapters) or any(name.startswith("gpt.") for name in found.state))
        if holds_gpt and options.only_prefix and not options.save_full:
            say(f"checkpoints will hold its language model too, since {gpt2_type} is another (--save_full)")
            options.save_full = True
    return model


def describe_run(model, data, options, total_steps, say):
    """Print what is about to be trained on what, and whether the warm-up fits the run."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    images, lengths = len(data.features.clip_embedding), data.tokens.lengths
    say(f"data: {images:,} images, {len(lengths):,} captions, {lengths.mean():.1f} tokens each (longest {lengths.max()})")
    say(f"parameters: {trained:,} trained of {total:,}")
    if options.warmup_steps > total_steps:
        say(
            f"warm-up of {options.warmup_steps:,} steps is longer than the run of {total_steps:,}: the learning rate will reach "
            f"{total_steps / options.warmup_steps:.0%} of {options.lr:g}. A shorter run wants a smaller --warmup_steps."
        )


def describe_origin(options, features, digest):
    """What goes into the config file beside the weights: arguments, versions, seed, data and its digest → dict of plain values."""
    import accelerate
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "arguments": {name: value for name, value in vars(options).items() if name != "resume"},
        "versions": {**versions, "accelerate": accelerate.__version__},
        "seed": options.seed,
        "data": {"files": options.data, "digest": digest, "meta": features.meta},
    }
