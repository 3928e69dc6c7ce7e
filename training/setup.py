"""The model a run trains, the memory it will take, and what is printed and written about the run before it begins."""

import dataclasses
import json
import shlex
import sys

from common import UserError
from training.data import attach_datastore, caption_with_base, file_digest, load_base_captioner, tokenize_data
from training.options import LR
from training.start import take_weights
from training.texts import describe_text_training, in_text_space

FEW_STEPS = 5000
FLOAT32 = 4  # bytes; weights, gradients and AdamW's two averages are float32 whatever the precision


def build_model(options, features, start, say):
    """Load the language model, put a fresh mapper before it, and take weights from `start`.

    Args:
        options: options of train.py.
        features: Features of the training data.
        start: checkpoint to start from, or None.
        say: function that prints a line.

    Returns:
        ClipCaptionModel, and whether checkpoints must hold its language model although it is frozen.

    Raises:
        UserError: language model or checkpoint cannot be read, or do not fit the options.
    """
    import torch

    from models.captioner import ClipCaptionModel, position_count, stop_token_id
    from models.tuning import kept_names, mark_trained
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
    if features.meta.get("normalized") and not options.normalize_prefix:
        say("the features are stored normalised: --normalize_prefix is on")
    config = _describe_model(options, features, gpt, gpt2_type)
    torch.manual_seed(options.seed)
    try:
        model = ClipCaptionModel(config, gpt, tokenizer)
        stop_token_id(tokenizer, options.stop_token)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    if start is None:
        return model, False
    filled = take_weights(model, start, options, say)
    mark_trained(model)
    needs_all = not filled <= kept_names(model)
    if needs_all and not options.save_full:
        say(f"checkpoints will hold its language model too, since {gpt2_type} is another (--save_full)")
    return model, needs_all


def _describe_model(options, features, gpt, gpt2_type):
    """Return the CaptionConfig of a run."""
    from models.config import CaptionConfig
    from models.tuning import default_targets

    lora = options.lora and {**options.lora, "targets": options.lora["targets"] or default_targets(gpt)}
    return CaptionConfig(
        encoder=features.meta.get("encoder"),
        clip_width=features.width,
        prefix_length=options.prefix_length,
        clip_length=options.prefix_length_clip,
        mapping_type=options.mapping_type,
        num_layers=options.num_layers,
        # A mapper trained on normalised features needs normalised embeddings of pictures too, and encoders give them unnormalised.
        normalize_prefix=options.normalize_prefix or bool(features.meta.get("normalized")),
        gpt2_type=gpt2_type,
        gpt_config=json.loads(gpt.config.to_json_string()),  # plain values only, whatever objects a config holds
        stop_token=options.stop_token,
        pooling=features.meta.get("pooling", "pooled"),
        audio=features.meta.get("audio"),
        tune=options.tune,
        lora=lora,
        freeze_mapper=options.freeze_mapper,
        embeddings_per_image=features.embeddings_per_image,
        prompt=options.prompt,
        text_training=describe_text_training(options, features),
    )


def set_dropout(gpt, share):
    """Set every dropout of a language model: GPT-2 has modules for it, OPT and Llama numbers."""
    import torch

    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, share)


def prepare_data(features, val_features, model, options, device, say):
    """Tokenize the captions, behind base captions of their images or captions of similar images where --prompt asks for them.

    Args:
        features: Features of the training data.
        val_features: Features of the validation data, or None.
        model: ClipCaptionModel; with --base_checkpoint its base captioner and config.base are set, for {retrieved} its datastore and
            config.retrieval.
        options: options of train.py.
        device: where the base captioner decodes, and the datastore is searched.
        say: function that prints a line.

    Returns:
        CaptionData of the training data, and of the validation data or None.
    """
    sets = [(features, options.data[0])] + ([(in_text_space(val_features, model), options.val_data[0])] if val_features else [])
    captions, retrieved = [None] * len(sets), [None] * len(sets)
    if options.base_checkpoint:
        from models.base_captioner import BaseCaptioner

        base = load_base_captioner(options.base_checkpoint, features, device)
        digest = file_digest(base.origin.path)
        model.base_captioner = BaseCaptioner(base)
        captions = [caption_with_base(model.base_captioner, digest, some, path, say) for some, path in sets]
        base.to("cpu")
        model.config.base = dataclasses.asdict(base.config) | {"path": str(options.base_checkpoint), "digest": digest}
    if "{retrieved}" in (options.prompt or ""):
        from features.datastore import ids_by_row

        attach_datastore(model, features, options, device)
        retrieved = [model.datastore.retrieve(some.clip_embedding, ids_by_row(some), device) for some, _ in sets]
        example = retrieved[0][int(features.caption_rows[0])]
        say(f"captions retrieved from {model.datastore.name} ({len(model.datastore.keys):,} images), for example: {example}")
    found = [tokenize_data(some, model, options, say, path, *texts) for (some, path), *texts in zip(sets, captions, retrieved)]
    return found[0], found[1] if val_features else None


def describe_run(model, data, options, plan, start, precision, device, say):
    """Print data, trained parameters, the estimated memory, and a warning where the schedule is too slow for a run so short."""
    from models.tuning import parameter_table

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
            f"{mib['gradients']}, optimizer {mib['optimizer']}, activations {mib['activations']})"
        )
    else:
        say("memory: not estimated for this language model")
    if plan.warmup_steps > plan.total_steps:
        say(
            f"warm-up of {plan.warmup_steps:,} steps is longer than the run of {plan.total_steps:,}: the learning rate will reach "
            f"{plan.total_steps / plan.warmup_steps:.0%} of {options.lr:g}. A shorter run needs a smaller --warmup_steps."
        )
    if options.lr == LR and plan.total_steps < FEW_STEPS and start is None and not options.published:
        say(
            f"advice: {plan.total_steps:,} steps at the published --lr of {LR:g}, meant for 140,000, teach a fresh mapper little. "
            "docs/small-captioner.md says what small data sets want."
        )


def describe_origin(settings, features, digest, argv=None):
    """Describe how the weights were made, for the config file beside them.

    Args:
        settings: dict of all options, as settled.
        features: Features of the training data.
        digest: digest of their content.
        argv: words after the script's name; None takes the program's own.

    Returns:
        Dict of plain values: command, arguments, versions, seed, data.
    """
    import accelerate
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": shlex.join(["python", "train.py", *map(str, sys.argv[1:] if argv is None else argv)]),
        "arguments": {name: value for name, value in settings.items() if name != "resume"},
        "versions": {**versions, "accelerate": accelerate.__version__},
        "seed": settings["seed"],
        "data": {"files": settings["data"], "digest": digest, "meta": features.meta},
    }


def estimate_memory(model, data, options, precision, device="cpu"):
    """Estimate the most memory that a step holds at once.

    Activations are counted by running the batch with the most tokens on tensors without content, which costs neither memory nor
    arithmetic. On a CPU the freed memory that the C library keeps comes on top (models.operators.keep_freed_memory).

    Returns:
        Dict of bytes: peak, weights, gradients, optimizer, activations; None where this does not work with the language model.
    """
    import torch

    from models.operators import KEPT_FREED

    weights = sum(parameter.numel() for parameter in model.parameters()) * FLOAT32
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    counted = count_activations(model, data, options, precision, device)
    if counted is None:
        return None
    activations, logits = counted
    gradients, averages = sum(trained) * FLOAT32, 2 * sum(trained) * FLOAT32
    # The backward pass begins with all activations, the logits' gradient and the largest weight's; it ends with all gradients. While
    # it runs, freed activations leave gaps that gradients fill only in part: half of them come on top, as measured with GPT-2.
    begins = activations + 2 * logits + max(trained) * FLOAT32 + gradients // 2
    ends = gradients + max(trained) * FLOAT32
    kept = KEPT_FREED if torch.device(device).type == "cpu" else 0
    peak = weights + averages + max(begins, ends) + kept
    return {"peak": peak, "weights": weights, "gradients": gradients, "optimizer": averages, "activations": activations}


def count_activations(model, data, options, precision, device="cpu"):
    """Count what the forward pass of the first epoch's longest batch keeps for the backward pass.

    Returns:
        Bytes kept, and bytes of the logits; None where it cannot be counted.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from features.packing import plan_epoch
    from models.tuning import find_blocks

    lengths = data.tokens.lengths
    numbers = max(plan_epoch(data.caption_rows, options.bs, options.sampling), key=lambda one: lengths[one].sum())
    batch = data.pack(numbers[: -(-len(numbers) // options.accumulate)])
    kept = {}  # from storage to its bytes and the tensor, which is held so that no other takes its place

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    was_training = model.training
    states = torch.get_rng_state()
    device = torch.device(device)
    autocast = torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no")

    def without_content(tensor):
        return mode.from_tensor(tensor.detach()).to(device).requires_grad_(tensor.requires_grad)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = type(batch)(**{name: without_content(t) if torch.is_tensor(t) else t for name, t in vars(batch).items()})
            own = {name: without_content(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
            model.train()
            with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                torch.func.functional_call(model, own, (fake,))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    finally:
        model.train(was_training)
        torch.set_rng_state(states)
    weights = {tensor.untyped_storage()._cdata for tensor in own.values()}
    activations = sum(size for storage, (size, _) in kept.items() if storage not in weights)
    if options.gradient_checkpointing:
        blocks = len(find_blocks(model.gpt)[1])
        width = model.gpt.get_input_embeddings().weight.shape[1]
        activations = activations // blocks + blocks * batch.input_ids.numel() * width * FLOAT32
    return activations, len(batch.labels) * model.gpt.get_output_embeddings().weight.shape[0] * FLOAT32
