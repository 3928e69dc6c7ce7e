"""Train a captioner: a mapper from image embeddings to a prefix of GPT-2, with GPT-2 tuned or frozen (arXiv:2111.09734).

  MLP mapper, GPT-2 tuned:
    python train.py --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/
  transformer mapper, GPT-2 frozen:
    python train.py --only_prefix --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/ \\
        --mapping_type transformer --num_layers 8 --prefix_length 40 --prefix_length_clip 40
  a short run on a CPU, to see that everything works:
    python train.py --data train.pkl --out_dir ./try/ --max_steps 20 --warmup_steps 5 --lr 1e-4 --log_every 1
  several GPUs:
    accelerate launch train.py --data train.pkl --out_dir ./coco_train/

Writes into --out_dir, under the stem --prefix: {prefix}-000.pt, -001.pt, … (weights after each epoch), {prefix}_latest.pt (weights
within an epoch), {prefix}.json (the config), {prefix}_metrics.jsonl and .png (loss and learning rate), {prefix}_state.pt (for --resume).
"""

import math
import shlex
import sys
from pathlib import Path

from common import UserError, one_line_errors
from training.optimiser import build_optimizer, learning_rate
from training.options import parse_options
from training.precision import choose_precision


def load_data(options, say):
    """Read and join the feature files, drop empty captions → Features whose captions share a row an image."""
    from features.store import Features, group_by_image, join_features, load_features

    features = join_features([group_by_image(load_features(path)) for path in options.data], options.data)
    if options.is_rn and features.width != 640:
        raise UserError(f"--is_rn expects 640-wide embeddings (RN50x4); {options.data[0]} holds {features.width}. Leave --is_rn out.")
    kept = [caption for caption in features.captions if caption["caption"].strip()]
    if len(kept) < len(features.captions):
        say(f"{len(features.captions) - len(kept):,} empty captions left out")
    if not kept:
        raise UserError(f"{options.data[0]} holds empty captions only: nothing to learn from.")
    return Features(features.clip_embedding, kept, features.meta)


def tokenize_data(texts, tokenizer, positions, options, say):
    """Tokenise the captions, with the end-of-text token as last target where captions stop there → packing.Tokens."""
    from features.packing import cut_captions, published_length, tokenize_captions

    stops_at_end = options.stop_token in (None, tokenizer.eos_token)
    room = None if positions is None else positions - options.prefix_length
    end_token_id = tokenizer.eos_token_id if stops_at_end else None
    if options.cut_captions:
        tokens = tokenize_captions(texts, tokenizer, end_token_id)
        longest = published_length(tokens.lengths)
        tokens = cut_captions(tokens, longest if room is None else min(longest, room))
    else:
        tokens = tokenize_captions(texts, tokenizer, end_token_id, room)
    if tokens.cut:
        say(f"{tokens.cut:,} of {len(tokens):,} captions cut to {tokens.lengths.max()} tokens")
    return tokens


def build_model(options, features, say):
    """Load the language model, put a fresh mapper before it, and take weights from --init_from → ClipCaptionModel."""
    import torch

    from models.captioner import CaptionConfig, ClipCaptionModel, stop_token_id
    from models.checkpoints import load_state, read_state_dict
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
    )
    torch.manual_seed(options.seed)
    try:
        model = ClipCaptionModel(config, gpt, tokenizer)
        stop_token_id(tokenizer, options.stop_token)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    if options.init_from:
        state = read_state_dict(options.init_from)
        load_state(model, state, options.init_from)
        holds_gpt = any(name.startswith("gpt.") for name in state)
        say(f"starting from {options.init_from}: {'mapper and language model' if holds_gpt else 'mapper'} taken")
        if holds_gpt and options.only_prefix and not options.save_full:
            say(f"checkpoints will hold its language model too, since {gpt2_type} is another (--save_full)")
            options.save_full = True
    return model


def describe_run(model, tokens, features, options, total_steps, say):
    """Print what is about to be trained on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lengths = tokens.lengths
    images, captions = len(features.clip_embedding), len(tokens)
    say(f"data: {images:,} images, {captions:,} captions, {lengths.mean():.1f} tokens each (longest {lengths.max()})")
    say(f"parameters: {trained:,} trained of {total:,}")
    if options.warmup_steps > total_steps:
        reached = total_steps / options.warmup_steps
        say(
            f"warm-up of {options.warmup_steps:,} steps is longer than the run of {total_steps:,}: the learning rate will reach "
            f"{reached:.0%} of {options.lr:g}. A shorter run wants a smaller --warmup_steps."
        )


def describe_origin(options, features):
    """What goes into the config file beside the weights: arguments, versions, seed, data."""
    import accelerate
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "arguments": vars(options),
        "versions": {**versions, "accelerate": accelerate.__version__},
        "seed": options.seed,
        "data": {"files": options.data, "digest": features.digest(), "meta": features.meta},
    }


@one_line_errors
def main(argv=None):
    options = parse_options(argv, __doc__)

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from tqdm import tqdm

    from features.packing import pack_captions, plan_epoch
    from models.checkpoints import save_checkpoint, save_config
    from training.run_log import RunLog
    from training.state import load_state, restore_random_states, save_state, state_path

    # Device, precision and seed. A second run in one process (a notebook, a test) must not inherit the first one's settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    device_type = PartialState(cpu=options.device == "cpu").device.type
    if options.device and options.device != device_type:
        raise UserError(f"--device {options.device} is not here; this machine offers {device_type}. Leave --device out.")
    precision, reason = choose_precision(options.mixed_precision, device_type)
    if precision == "fp16" and device_type != "cuda":
        raise UserError(f"--mixed_precision fp16 needs CUDA; this run is on {device_type}. Take bf16 or no.")
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=precision)
    device, processes, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    say = accelerator.print
    say(f"device: {device}, {processes} process(es); precision: {precision if precision != 'no' else 'fp32'} ({reason})")

    # Data, model, and what of it is trained.
    features = load_data(options, say)
    model = build_model(options, features, say)
    config, positions = model.config, getattr(model.gpt.config, "max_position_embeddings", None)
    tokens = tokenize_data([caption["caption"] for caption in features.captions], model.tokenizer, positions, options, say)
    caption_rows = features.caption_rows
    steps_per_epoch = len(tokens) // options.bs if options.drop_last else math.ceil(len(tokens) / options.bs)
    if not steps_per_epoch:
        raise UserError(f"--drop_last leaves nothing of {len(tokens)} captions: one batch is --bs {options.bs}. Take a smaller --bs.")
    total_steps = options.epochs * steps_per_epoch
    if options.max_steps is not None:
        total_steps = min(total_steps, options.max_steps)
    describe_run(model, tokens, features, options, total_steps, say)

    # Optimiser over trained parameters only.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(trained.values(), options.lr, fused=device_type in ("cpu", "cuda"))
    captioner = model
    model, optimizer = accelerator.prepare(model, optimizer)

    # Resume. `step` counts optimiser steps done; the draw of an epoch depends on seed and epoch alone, so it is all of the position.
    out_dir, step = Path(options.out_dir), 0
    resume_point = state_path(out_dir, options.prefix)
    shaping = ("init_from", "bs", "lr", "warmup_steps", "sampling", "drop_last", "ignore_index", "cut_captions", "seed")
    identity = {name: getattr(options, name) for name in shaping}
    identity |= {"total_steps": total_steps, "data": features.digest(), "precision": precision, "model": vars(config)}
    torch.manual_seed(options.seed + 1 + rank)
    if options.resume and resume_point.exists():
        state = load_state(resume_point, identity)
        for name, tensor in state["weights"].items():
            trained[name].data.copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"])
        step = state["step"]
        say(f"resumed {resume_point} after step {step:,} of {total_steps:,}")
        if step >= total_steps:
            say("this run is finished; nothing to do")
            return 0
    elif options.resume:
        say(f"nothing to resume at {resume_point}: starting anew")

    log = None
    if accelerator.is_main_process:
        log = RunLog(out_dir, options.prefix, step)
        save_config(config, describe_origin(options, features), out_dir / f"{options.prefix}.json")
    checkpoint = out_dir / f"{options.prefix}-{max(0, math.ceil(total_steps / steps_per_epoch) - 1):03d}.pt"

    # The loop.
    model.train()
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=None if accelerator.is_main_process else True)
    while True:
        epoch = step // steps_per_epoch
        batches = plan_epoch(caption_rows, options.bs, options.sampling, options.seed, epoch, options.drop_last)
        epoch_end = min((epoch + 1) * steps_per_epoch, total_steps)
        while step < epoch_end:
            captions = batches[step % steps_per_epoch]
            share = captions[rank * len(captions) // processes : (rank + 1) * len(captions) // processes]
            batch = pack_captions(share if len(share) else captions[:1], tokens, caption_rows, config.prefix_length, options.ignore_index)
            batch.clip_embedding = features.clip_embedding[batch.image_rows].float()
            loss_sum = model(batch.to(device))
            if not len(share):
                loss_sum = loss_sum * 0.0  # a part-batch smaller than the number of processes: this one only joins the exchange
            targets = torch.tensor(len(batch.labels) if len(share) else 0, device=device)
            targets = accelerator.reduce(targets, "sum") if processes > 1 else targets
            # Gradients are averaged over processes: times their number, it is the mean over all tokens of the step.
            accelerator.backward(loss_sum / targets.clamp(min=1) * processes)
            lr = learning_rate(step, options.lr, options.warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()

            loss_sum = accelerator.reduce(loss_sum.detach(), "sum") if processes > 1 else loss_sum.detach()
            if log:
                log.count(loss_sum, targets, len(captions))
                if step % options.log_every == 0 or step == epoch_end:
                    line = log.write(step, epoch, lr)
                    bar.set_postfix(epoch=epoch, loss=f"{line['loss']:.3f}", captions_per_s=f"{line['captions_per_s']:.0f}")
                    if not math.isfinite(line["loss"]):
                        raise UserError(f"loss is {line['loss']} at step {step}. Take a smaller --lr; checkpoints so far are kept.")
                if step % options.save_steps == 0 and step < epoch_end:
                    save_checkpoint(captioner, out_dir / f"{options.prefix}_latest.pt", options.save_full)
                    save_state(resume_point, trained, optimizer, step, identity)

        if log:
            if epoch % options.save_every == 0 or step == total_steps:
                save_checkpoint(captioner, out_dir / f"{options.prefix}-{epoch:03d}.pt", options.save_full)
            save_state(resume_point, trained, optimizer, step, identity)
            log.draw(finished=step >= total_steps)
        if step >= total_steps:
            break
    bar.close()
    accelerator.end_training()

    loss = f", loss {line['loss']:.3f}" if log and total_steps else ""
    say(f"done: {total_steps:,} steps{loss}; wrote {checkpoint}")
    encoder = "" if config.encoder else " --clip_model_type ENCODER"
    say(f"caption a picture: python predict.py --checkpoint {shlex.quote(str(checkpoint))}{encoder} PICTURE.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
