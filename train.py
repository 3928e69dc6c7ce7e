"""Train a captioner: a mapper from image embeddings to a prefix of GPT-2, with GPT-2 tuned or frozen (arXiv:2111.09734).

  one GPU (MLP mapper, GPT-2 tuned, as published):
    python train.py --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/
  several GPUs:
    accelerate launch train.py --data ./data/coco/oscar_split_ViT-B_32_train.pkl --out_dir ./coco_train/
  a minute on a CPU, to see that everything works:
    python train.py --data train.pkl --out_dir ./try/ --max_steps 20 --warmup_steps 5 --lr 1e-4 --log_every 1

Writes into --out_dir, with --prefix in front of every name: -000.pt, -001.pt ... (weights after each epoch), _best.pt (weights of the
best validation), _latest.pt (weights within an epoch), .json (what rebuilds the model, and how it was made), _metrics.jsonl and .png
(curves), _samples.jsonl (captions at each validation), _tensorboard/, and _state.pt (the resume point). Ctrl-C and SIGTERM save first;
the same command with --resume continues. `python -m reports.run OUT_DIR` makes a web page of it all.
"""

import shlex
import sys

from common import one_line_errors
from training.batches import make_plan, run_batches
from training.data import load_data, load_validation_data
from training.device import start_accelerator
from training.identity import describe_identity
from training.optimizer import prepare_training, train_step
from training.options import parse_options
from training.run_log import RunLog
from training.setup import build_model, describe_origin, describe_run, prepare_data
from training.start import choose_start
from training.state import Checkpoints, Ending, StopRequest, claim_run, find_ending
from training.validate import Validation


@one_line_errors
def main(argv=None):
    options = parse_options(argv, __doc__)
    accelerator = start_accelerator(options)
    with claim_run(options, accelerator.is_main_process):
        return train(options, accelerator, argv)


def train(options, accelerator, argv):
    from models.operators import accelerate_model

    say, device = accelerator.print, accelerator.device

    # Data, model, and what of it is trained.
    features = load_data(options.data, options.is_rn, say)
    val_features = load_validation_data(options, features, say)
    start = choose_start(options, features, say)
    captioner, needs_all = build_model(options, features, start, say)
    accelerate_model(captioner)
    data, val_data = prepare_data(features, val_features, captioner, options, device, say)

    # Plan: how long the run is, and how its batches are laid out.
    plan = make_plan(captioner, data, options, device.type, say)
    data, val_data = data.laid_out(plan), val_data and val_data.laid_out(plan)
    describe_run(captioner, data, options, plan, start, accelerator.mixed_precision, device, say)

    # Optimizer, over trained parameters only.
    model, optimizer = prepare_training(captioner, options, accelerator)

    # Resume. `step` counts optimizer steps done.
    digests = features.digest(), val_features and val_features.digest()
    identity = describe_identity(options, plan, start, accelerator.mixed_precision, captioner.config, *digests)
    settled = vars(options) | {"init_from": start, "warmup_steps": plan.warmup_steps, "save_full": options.save_full or needs_all}
    files = Checkpoints(options, captioner, optimizer, identity, settled["save_full"], accelerator.is_main_process)
    position = files.find_position(options, plan, say)
    step, best = position.step, position.best
    if options.resume and step and find_ending(step, plan, best):
        say("this run is finished; nothing to do")
        return 0
    log = RunLog(options, accelerator, plan.total_steps, position, settled)
    files.save_config(describe_origin(settled, features, digests[0], argv))
    validation = Validation(model, captioner, val_data, options, plan, accelerator, files, log, best)

    # The loop. A loss that is not finite spoils the weights, so weights are saved only after the losses so far were checked.
    model.train()
    if (step or not plan.total_steps) and validation.is_due(step):  # the run was stopped before it, or has no steps at all
        validation.report(step)
    ending = find_ending(step, plan, best)
    if ending:
        save_progress(files, log, plan, step, best, ending)
    with StopRequest() as stop:
        for batch in run_batches(data, options, plan, step, accelerator):
            result = train_step(model, batch, optimizer, step, plan, options, accelerator, stop.signal_name is not None)
            step += 1
            log.count(step, result, batch.captions)
            ends_epoch, logs = plan.ends_epoch(step), step % options.log_every == 0
            validates = validation.is_due(step) and (ends_epoch or not result.stopping)
            saves = ends_epoch or result.stopping or step % options.save_steps == 0
            if logs or validates or saves:
                log.check_losses(data)
            if logs or ends_epoch:
                log.write(step, plan.epoch_of(step), result.lr)
            if validates:
                validation.report(step)
            ending = find_ending(step, plan, best, result.stopping)
            if saves or ending:
                save_progress(files, log, plan, step, best, ending)
            if ending:
                break
    log.close()

    # The end. Torch's gloo may hang where the wrapped model is the last to hold the connection between processes: release it first.
    del model, optimizer, validation
    accelerator.free_memory()
    accelerator.end_training()
    if ending is Ending.STOPPED:
        say(f"stopped by {stop.signal_name} after step {step:,}; saved {files.resume_point}. The same command with --resume continues.")
        return stop.exit_code
    if ending is Ending.OUT_OF_PATIENCE:
        say(f"stopped early: {best.describe_wait('validations' if options.val_every else 'epochs')}")
    say_how_to_predict(files.path("_best" if val_data else f"-{plan.epoch_of(step):03d}"), step, captioner.config, say)
    return 0


def save_progress(files, log, plan, step, best, ending):
    """Save what is due after a step: at an epoch's end its numbered checkpoint, else the latest weights; and the resume point."""
    finished = ending in (Ending.FINISHED, Ending.OUT_OF_PATIENCE)
    at_epoch_end = plan.ends_epoch(step) or finished
    if at_epoch_end:
        files.save_epoch(plan.epoch_of(step), is_last=finished)
    if ending is Ending.STOPPED or not at_epoch_end:
        files.save_weights("_latest")
    files.save_resume_point(step, best, log.interval(), finished)
    if at_epoch_end:
        log.draw(finished)


def say_how_to_predict(checkpoint, step, config, say):
    """Print what was written last, and the command that captions with it."""
    encoder = "" if config.encoder else " --clip_model_type ENCODER"
    kind, thing = ("sound", "SOUND.wav") if config.audio else ("picture", "PICTURE.jpg")
    say(f"done: {step:,} steps; wrote {checkpoint}")
    say(f"caption a {kind}: python predict.py --checkpoint {shlex.quote(str(checkpoint))}{encoder} {thing}")


if __name__ == "__main__":
    sys.exit(main())
