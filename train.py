"""Train a captioner: a mapper from image embeddings to a prefix of GPT-2, with GPT-2 tuned or frozen (arXiv:2111.09734).

  MLP mapper, GPT-2 tuned:
    python train.py --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/
  transformer mapper, GPT-2 frozen:
    python train.py --only_prefix --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/ \\
        --mapping_type transformer --num_layers 8 --prefix_length 40 --prefix_length_clip 40
  other ways of tuning, other language models:
    python train.py --data train.pkl --out_dir ./lora/ --tune lora --lr 1e-4 --mapper_lr 2e-5 --init_from coco_weights.pt
    python train.py --data train.pkl --out_dir ./opt/ --language_model facebook/opt-125m --tune ends --warmup_ratio 0.1
  behind a prompt that holds another model's caption of the image:
    python train.py --data train.pkl --out_dir ./posts/ --init_from coco_weights.pt --base_checkpoint coco_weights.pt \\
        --prompt " is a picture of {base} and a social media post would caption it "
  watched on captions it does not learn from, stopped when their CIDEr no longer rises:
    python train.py --data train.pkl --val_data val.pkl --out_dir ./coco_train/ --val_every 2000 --best_by cider --patience 5
  a short run on a CPU, to see that everything works:
    python train.py --data train.pkl --out_dir ./try/ --max_steps 20 --warmup_steps 5 --lr 1e-4 --log_every 1
  several GPUs:
    accelerate launch train.py --data train.pkl --out_dir ./coco_train/

With --tune mapper, ends, head or lora checkpoints hold what was trained, and the mapper; --save_full writes everything (adapters merged
into the weights beneath them).

Writes into --out_dir, under the stem --prefix: {prefix}-000.pt, -001.pt, … (weights after each epoch), {prefix}_latest.pt (weights
within an epoch), {prefix}_best.pt (the best validation, --best_by loss or cider), {prefix}.json (the config), {prefix}_metrics.jsonl and
.png (curves), {prefix}_samples.jsonl (captions at each validation), {prefix}_tensorboard/, {prefix}_state.pt (for --resume). Ctrl-C and
SIGTERM save first; the same command with --resume goes on. `python -m reports.run OUT_DIR` makes a page of it all.
"""

import contextlib
import math
import shlex
import sys
from pathlib import Path

from common import UserError, one_line_errors
from training.batches import packed_steps, settle_row_slots
from training.compiling import compile_language_model
from training.data import load_data, load_validation_data, tokenize_data
from training.interrupt import StopRequest
from training.optimizer import build_optimizer, learning_rate, parameter_groups, settle_warmup
from training.options import parse_options
from training.precision import choose_precision
from training.probe import takes_packed_rows
from training.sampling import format_samples
from training.setup import build_model, caption_first, describe_origin, describe_run
from training.tracking import check_tracker, start_tracker
from training.validate import COLLAPSE_ADVICE, BestSoFar, Validation, describe_figures, find_collapse


@one_line_errors
def main(argv=None):
    options = parse_options(argv, __doc__)

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from tqdm import tqdm

    from features.packing import plan_epoch
    from models.checkpoints import remove_old_checkpoints, save_checkpoint, save_config
    from models.operators import accelerate_model
    from models.tuning import checkpoint_blocks
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
    check_tracker(options.tracker)
    tracker = None if options.tracker == "none" else options.tracker
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=precision, log_with=tracker, project_dir=options.out_dir)
    device, processes, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    say = accelerator.print
    say(f"device: {device}, {processes} process(es); precision: {precision if precision != 'no' else 'fp32'} ({reason})")

    # Data, model, and what of it is trained.
    features = load_data(options.data, options.is_rn, say)
    val_features = load_validation_data(options.val_data, features, options, say) if options.val_data else None
    model = accelerate_model(build_model(options, features, say))
    config = model.config
    sets = [(features, options.data[0]), (val_features, (options.val_data or [None])[0])]
    base, val_base = caption_first(model, sets, options, device, say)
    data = tokenize_data(features, model, options, say, options.data[0], base)
    val_data = tokenize_data(val_features, model, options, say, options.val_data[0], val_base) if val_features else None
    captions_in_all = len(data.tokens)
    steps_per_epoch = captions_in_all // options.bs if options.drop_last else math.ceil(captions_in_all / options.bs)
    if not steps_per_epoch:
        raise UserError(f"--drop_last leaves nothing of {captions_in_all} captions: one batch is --bs {options.bs}. Take a smaller --bs.")
    total_steps = options.epochs * steps_per_epoch
    if options.max_steps is not None:
        total_steps = min(total_steps, options.max_steps)
    options.warmup_steps = settle_warmup(options.warmup_steps, options.warmup_ratio, total_steps)
    if not takes_packed_rows(model, data, options.bs, say):
        data.packed = False
    data.row_slots = settle_row_slots(options.row_tokens, data, options.bs, options.sampling, device_type)
    if val_data:
        val_data.packed, val_data.row_slots = data.packed, data.row_slots
    describe_run(model, data, options, total_steps, precision, device, say)
    if options.gradient_checkpointing:
        checkpoint_blocks(model.gpt)
    if options.compile:
        compile_language_model(model, device_type)

    # Optimiser over trained parameters only.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(trained, options.lr, options.mapper_lr, options.weight_decay)
    optimizer = build_optimizer(groups, options.lr, fused=device_type in ("cpu", "cuda"))
    captioner = model
    model, optimizer = accelerator.prepare(model, optimizer)

    # Resume. `step` counts optimiser steps done; the draw of an epoch depends on seed and epoch alone, so it is all of the position.
    out_dir, step, best = Path(options.out_dir), 0, BestSoFar(options.patience, options.best_by)
    resume_point = state_path(out_dir, options.prefix)
    shaping = "init_from init_parts bs lr warmup_steps sampling drop_last ignore_index cut_captions seed gpt2_dropout"
    shaping += " mapper_lr weight_decay clip_grad accumulate gradient_checkpointing val_every best_by"
    identity = {name: getattr(options, name) for name in shaping.split()}
    identity |= {"total_steps": total_steps, "precision": precision, "model": vars(config)}
    identity |= {"data": features.digest(), "val_data": val_features.digest() if val_features else None}
    torch.manual_seed(options.seed + 1 + rank)
    if options.resume and resume_point.exists():
        state = load_state(resume_point, identity)
        step = state["step"]
        say(f"resumed {resume_point} after step {step:,} of {total_steps:,}")
        if state["finished"]:
            say("this run is finished; nothing to do")
            return 0
        for name, tensor in state["weights"].items():
            trained[name].data.copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"])
        best = BestSoFar(options.patience, **state["best"])
    elif options.resume:
        say(f"nothing to resume at {resume_point}: starting anew")

    def checkpoint_path(label):
        return out_dir / f"{options.prefix}{label}.pt"

    def save_resume_point(finished=False):
        save_state(resume_point, trained, optimizer, step, best.as_dict(), finished, identity)

    log, validation = None, Validation(model, captioner, val_data, options, accelerator, say) if val_data else None
    if accelerator.is_main_process:
        log = RunLog(out_dir, options.prefix, step)
        log.track = start_tracker(accelerator, options, step)
        save_config(config, describe_origin(options, features, identity["data"], argv), out_dir / f"{options.prefix}.json")

    def validate():
        figures, samples = validation.run()
        better = best.update(figures, step)
        epoch = max(step - 1, 0) // steps_per_epoch
        where = f"step {step:,}" if options.val_every else f"epoch {epoch}"
        loss = f"validation loss {figures['val_loss']:.4f}, perplexity {figures['val_perplexity']:.2f}"
        say(f"{where}: {loss}{describe_figures(figures)}{', the best' if better else ''}")
        if samples:
            say("\n".join(format_samples(samples)))
        collapse = find_collapse(figures, bool(options.base_checkpoint)) if step >= min(options.warmup_steps, total_steps) else None
        if collapse:
            say(f"warning: the captions hardly depend on their images: {collapse}. {COLLAPSE_ADVICE}")
        if log:
            log.write_validation(step, epoch, figures | ({"val_collapse": collapse} if collapse else {}), samples)
            if better:
                save_checkpoint(captioner, checkpoint_path("_best"), options.save_full)

    def validation_is_due():
        every = options.val_every or steps_per_epoch
        return validation is not None and best.step < step and (step % every == 0 or step == total_steps)

    # The loop. A loss that is not finite spoils the weights, so none are saved before the losses since the last look were seen.
    model.train()
    losses_unseen, finished, stopping = {}, False, False
    if options.val_every and step and validation_is_due():
        validate()
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=None if log else True)
    with StopRequest() as stop:
        while not finished:
            epoch = step // steps_per_epoch
            batches = plan_epoch(data.caption_rows, options.bs, options.sampling, options.seed, epoch, options.drop_last)
            epoch_end = min((epoch + 1) * steps_per_epoch, total_steps)
            upcoming = packed_steps(data, batches[step % steps_per_epoch :], options.accumulate, rank, processes, device_type)
            while step < epoch_end and not stopping and not best.is_out_of_patience:
                batch = next(upcoming)
                # What all processes must agree on: how many tokens the step predicts, and whether it is the last.
                targets, stopping = batch.predicted, stop.signal_name is not None
                if processes > 1:
                    targets, stopping = accelerator.reduce(torch.tensor([targets, stopping], device=device), "sum").tolist()
                loss_sum = 0.0
                for number, part in enumerate(batch.parts, start=1):
                    with contextlib.nullcontext() if number == len(batch.parts) else accelerator.no_sync(model):
                        part_sum = model(part.to(device)) * batch.has_share
                        # Gradients are averaged over processes: times their number, it is the mean over all tokens of the step.
                        accelerator.backward(part_sum / max(targets, 1) * processes)
                    loss_sum = loss_sum + part_sum.detach()
                if options.clip_grad:
                    accelerator.clip_grad_norm_(trained.values(), options.clip_grad)
                lr = learning_rate(step, options.lr, options.warmup_steps, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, group["peak"], options.warmup_steps, total_steps)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()

                loss_sum = accelerator.reduce(loss_sum, "sum") if processes > 1 else loss_sum
                losses_unseen[step] = loss_sum
                if log:
                    log.count(loss_sum, targets, len(batch.captions))
                if step % options.log_every == 0 or step % options.save_steps == 0 or step == epoch_end or stopping:
                    check_losses(losses_unseen, batches, steps_per_epoch, data)
                if log and (step % options.log_every == 0 or step == epoch_end):
                    line = log.write(step, epoch, lr)
                    bar.set_postfix(epoch=epoch, loss=f"{line['loss']:.3f}", captions_per_s=f"{line['captions_per_s']:.0f}")
                # One that is due as the run is stopped is made up for on resuming.
                if options.val_every and not stopping and validation_is_due():
                    validate()
                if log and step % options.save_steps == 0 and step < epoch_end:
                    save_checkpoint(captioner, checkpoint_path("_latest"), options.save_full)
                    save_resume_point()

            if step < epoch_end and not best.is_out_of_patience:
                break
            if validation_is_due():
                validate()
            finished = step >= total_steps or best.is_out_of_patience
            if log:
                if epoch % options.save_every == 0 or finished:
                    save_checkpoint(captioner, checkpoint_path(f"-{epoch:03d}"), options.save_full)
                    remove_old_checkpoints(out_dir, options.prefix, options.keep_last)
                save_resume_point(finished)
                log.draw(finished)
    bar.close()
    if not finished and log:
        save_checkpoint(captioner, checkpoint_path("_latest"), options.save_full)
        save_resume_point()
    if processes > 1:
        # Torch's gloo may hang when the last to hold the connection between processes is the wrapped model: let go of that first.
        model = optimizer = validation = part_sum = None
        accelerator.free_memory()
    accelerator.end_training()

    if not finished:
        say(f"stopped by {stop.signal_name} after step {step:,}; saved {resume_point}. The same command with --resume goes on.")
        return stop.exit_code
    if best.is_out_of_patience:
        unit = "validations" if options.val_every else "epochs"
        record = f"{best.value:.4f}" if best.by == "loss" else f"{100 * best.value:.1f}"
        say(f"stopped early: {best.epochs_since} {unit} without a better validation {best.by} than {record}")
    last = checkpoint_path("_best" if val_data else f"-{epoch:03d}")
    say(f"done: {step:,} steps; wrote {last}")
    encoder = "" if config.encoder else " --clip_model_type ENCODER"
    kind, thing = ("sound", "SOUND.wav") if config.audio else ("picture", "PICTURE.jpg")
    say(f"caption a {kind}: python predict.py --checkpoint {shlex.quote(str(last))}{encoder} {thing}")
    return 0


def check_losses(losses, batches, steps_per_epoch, data):
    """Look at the losses of the steps since the last look, and forget them. Raises UserError naming the captions of one not finite.

    losses: dict of step → scalar tensor; kept on the device until here, so that a GPU is not made to wait at every step.
    """
    import torch

    values = torch.stack(list(losses.values())).tolist() if losses else []
    for step, value in zip(losses, values):
        if not math.isfinite(value):
            named = data.name_captions(batches[(step - 1) % steps_per_epoch])
            raise UserError(f"loss is {value} at step {step:,}, on {named}. The last good checkpoint is kept; try a smaller --lr.")
    losses.clear()


if __name__ == "__main__":
    sys.exit(main())
