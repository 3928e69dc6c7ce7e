"""What benchmarks/run.py measures: features, training, decoding, memory. Each section yields rows, plain dicts for the table.

Both sides get the same work and take turns in one process (memory: one process each). Their results are compared first.
"""

import copy
import dataclasses
import statistics
import time
from pathlib import Path

from benchmarks import memory, work

LOSS_TOLERANCE = 1e-4  # nats a token, float32
EMBEDDING_TOLERANCE = 1e-4  # of the largest component, float32
ROUNDS, SLOW_ROUNDS = 3, 2  # defaults; the second for the slowest rows on a CPU


@dataclasses.dataclass
class Context:
    """What every section needs. rates: FLOP/s of square matrix products, by "fp32" and "bf16"."""

    scale: work.Scale
    device: str
    repeats: int | None  # None: ROUNDS, or SLOW_ROUNDS
    rates: dict
    folder: Path  # for temporary files
    data: Path  # folder that may hold photographs

    def rounds(self, slow=False):
        """Return the number of rounds of a row; slow: whether it is one of the slowest."""
        return self.repeats or (SLOW_ROUNDS if slow and self.device == "cpu" else ROUNDS)


def take_turns(calls, repeats, device):
    """Run each of `calls` (name to function) once per round. Returns seconds by name, one number per round."""
    seconds = {name: [] for name in calls}
    for number in range(repeats):
        for name, call in calls.items():
            work.wait_for(device)
            began = time.perf_counter()
            call(number)
            work.wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def count_flops(call):
    """Count the floating-point operations of the matrix products and attentions in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def make_row(key, published, ours, unit, flops, rate, equal):
    """Make a row of the table.

    Args:
        key: name of the row.
        published, ours: seconds per unit, one number per round.
        unit: what is counted.
        flops: operations of our side per unit.
        rate: FLOP/s of square matrix products.
        equal: (whether the results are equal, what was compared), or None.
    """
    ratios = [theirs / mine for theirs, mine in zip(published, ours)]
    seconds = statistics.median(ours)
    return {
        "row": key,
        "rounds": len(ours),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "unit": unit,
        "published_per_s": 1 / statistics.median(published),
        "ours_per_s": 1 / seconds,
        "share_of_matmul_rate": flops / seconds / rate,
        "equal": None if equal is None else bool(equal[0]),
        "compared": None if equal is None else equal[1],
    }


# -- training ------------------------------------------------------------------------------------------------------------


def train_rows(context):
    """Measure all variants, samplings and precisions against one published step, whose cost does not depend on the sampling."""
    import torch

    from benchmarks.ours import Training
    from features.packing import plan_epoch
    from models.operators import accelerate_model

    scale = context.scale
    captions = work.caption_set(scale, context.device)
    drawn = {name: plan_epoch(captions.caption_rows, scale.step_captions, name) for name in ("images", "captions")}
    for variant in work.VARIANTS:
        model = accelerate_model(work.build_captioner(variant, scale.clip[0], **scale.gpt).to(context.device))
        theirs = work.published_training(work.build_published(model, **scale.gpt).to(context.device), variant)
        ours = Training(model, captions, scale.step_captions)

        def published(number):
            numbers = drawn["images"][number % len(drawn["images"])]
            theirs.step(captions.embedding_of(numbers), captions.lists(numbers))

        differences = {}
        for sampling, batches in drawn.items():
            numbers = batches[0][: scale.step_captions // 4]
            theirs.model.eval(), model.eval()
            with torch.no_grad():
                losses = theirs.loss(captions.embedding_of(numbers), captions.lists(numbers)), ours.loss(numbers)
            theirs.train(), model.train()
            differences[sampling] = abs(losses[0].item() - losses[1].item())

        calls, flops = {"published": published}, {}
        for precision in ("fp32", "bf16"):
            for sampling in drawn:
                bf16, batches = precision == "bf16", drawn[sampling]
                name = f"train {variant} {sampling} {precision}"
                calls[name] = lambda number, bf16=bf16, batches=batches: ours.step(batches[number % len(batches)], bf16)
        taken = dict.fromkeys(calls, scale.step_captions)  # captions of one call
        if scale.large_step:
            name = f"train {variant} images bf16 {scale.large_step}"
            large = Training(model, captions, scale.large_step)
            batches = plan_epoch(captions.caption_rows, scale.large_step, drop_last=True)
            calls[name], taken[name] = lambda number: large.steps(batches, True), len(batches) * scale.large_step
            large.steps(batches[:1], True)
        few = drawn["images"][-1][: work.CAPTIONS_AN_IMAGE]  # makes the optimizer's state before the first round
        theirs.step(captions.embedding_of(few), captions.lists(few))
        ours.step(few)
        rounds = context.rounds(slow=variant != "mlp")
        for sampling in drawn:  # the products are the same in both precisions
            flops[sampling] = count_flops(lambda: calls[f"train {variant} {sampling} bf16"](rounds))
        seconds = take_turns(calls, rounds, context.device)
        each = {name: [second / taken[name] for second in times] for name, times in seconds.items()}
        for name in list(calls)[1:]:
            sampling, precision = name.split()[2:4]
            equal = (differences[sampling] < LOSS_TOLERANCE, f"loss to {differences[sampling]:.0e}") if precision == "fp32" else None
            rate = context.rates[precision]
            yield make_row(name, each["published"], each[name], "captions", flops[sampling] / scale.step_captions, rate, equal)


# -- features ------------------------------------------------------------------------------------------------------------


def feature_rows(context):
    """Measure extract() against one encoding per caption, without loading and hashing the weights."""
    import torch
    from clip import clip
    from clip.model import build_model

    from benchmarks.ours import encode_pictures
    from benchmarks.published import encode_captions
    from models.encoders import load_encoder
    from models.operators import accelerate_model

    scale = context.scale
    pictures, _ = work.find_pictures(context.folder, context.data, scale.pictures)
    weights = context.folder / "clip.pt"
    work.save_clip(weights, scale.clip)
    theirs = build_model(torch.load(weights, weights_only=True)).float().eval().to(context.device)
    preprocess = clip._transform(scale.clip[1])
    few = pictures[: scale.published_pictures]
    records = [{"image": str(picture), "caption": "x"} for picture in few for _ in range(work.CAPTIONS_AN_IMAGE)]
    if context.device == "cuda":
        pictures = pictures * 25  # enough to fill the batches and the workers

    rows, calls = {}, {}

    def published(number):
        rows["published"] = encode_captions(theirs, preprocess, records, context.folder / "published.pkl")

    calls["published"] = published
    for precision in ("fp32", "bf16"):
        name = f"features {precision}"
        encoder = load_encoder(str(weights), context.device, "bf16" if precision == "bf16" else "no")
        accelerate_model(encoder.module)
        encoder.digest = lambda known=encoder.digest(): known
        flops = count_flops(lambda: encoder.encode(torch.zeros(2, 3, scale.clip[1], scale.clip[1]))) / 2  # of the last, in bf16

        def ours(number, name=name, encoder=encoder):
            rows[name] = encode_pictures(encoder, pictures, work.CAPTIONS_AN_IMAGE, context.folder / "ours.pkl")

        calls[name] = ours
        encode_pictures(encoder, few, 1, context.folder / "ours.pkl")
    encode_captions(theirs, preprocess, records[:2], context.folder / "published.pkl")
    seconds = take_turns(calls, context.rounds(), context.device)
    expected = rows["published"][:: work.CAPTIONS_AN_IMAGE]
    difference = ((rows["features fp32"][: len(few)] - expected).abs().max() / expected.abs().max()).item()
    for name in list(calls)[1:]:
        theirs_each = [second / len(few) for second in seconds["published"]]
        ours_each = [second / len(pictures) for second in seconds[name]]
        equal = (difference < EMBEDDING_TOLERANCE, f"embeddings to {difference:.0e}") if name.endswith("fp32") else None
        yield make_row(name, theirs_each, ours_each, "images", flops, context.rates[name.split()[1]], equal)


# -- decoding ------------------------------------------------------------------------------------------------------------


def decode_rows(context):
    """Measure beam and greedy search in a batch with a cache against one image at a time without; at most entry_length tokens."""
    import torch

    from benchmarks.ours import caption
    from benchmarks.published import beam_search, greedy_search
    from models.operators import accelerate_model

    scale = context.scale
    vocabulary = scale.gpt.get("vocab_size", work.GPT2_VOCABULARY)
    model = work.build_captioner("mlp", scale.clip[0], work.word_tokenizer(vocabulary), **scale.gpt).eval()
    theirs = work.build_published(model, **scale.gpt).eval().to(context.device)
    model = accelerate_model(model.to(context.device))
    models = {"fp32": model, "bf16": copy.deepcopy(model)}
    models["bf16"].gpt.to(torch.bfloat16)  # as predict.py --mixed_precision bf16 does
    embedding = torch.randn(scale.decoded, scale.clip[0], generator=torch.Generator().manual_seed(3)).to(context.device)
    stop = model.stop_token_id
    for decoding, few in (("beam", scale.published_beam), ("greedy", scale.published_greedy)):
        found, calls = {}, {}

        def published(number):
            found["published"] = []
            for row in range(few):
                with torch.no_grad():
                    prefix = theirs.clip_project(embedding[row : row + 1])  # [1, P, E]
                if decoding == "beam":
                    beams = beam_search(theirs.gpt, prefix, scale.beam_size, scale.entry_length, 1.0, stop)
                else:
                    beams = [greedy_search(theirs.gpt, prefix, scale.entry_length, 1.0, stop)]
                found["published"].append([[f"t{token}" for token in tokens if token != stop] for tokens, _ in beams])

        calls["published"] = published
        for precision in models:
            name = f"{decoding} {precision}"

            def ours(number, name=name, model=models[precision]):
                found[name] = caption(model, embedding, decoding, scale.beam_size, scale.entry_length)

            calls[name] = ours
        caption(model, embedding[:2], decoding, scale.beam_size, 2)  # both precisions have run before the first round
        flops = count_flops(lambda: calls[f"{decoding} bf16"](0))
        seconds = take_turns(calls, context.rounds(slow=decoding == "beam"), context.device)
        for name in list(calls)[1:]:
            precision = name.split()[1]
            same = found[name][:few] == found["published"]
            what = f"all {few * len(found['published'][0])} captions" if decoding == "beam" else f"{few} captions"
            theirs_each = [second / few for second in seconds["published"]]
            ours_each = [second / scale.decoded for second in seconds[name]]
            equal = (same, what) if precision == "fp32" else None
            yield make_row(name, theirs_each, ours_each, "captions", flops / scale.decoded, context.rates[precision], equal)


# -- memory --------------------------------------------------------------------------------------------------------------


def memory_rows(context):
    """Measure the peak memory of a training step above the model, each side in its own process."""
    for variant in ("mlp", "transformer"):
        published = memory.measure("published", variant, False, context.device)
        for precision in ("fp32", "bf16"):
            ours = memory.measure("ours", variant, precision == "bf16", context.device)
            yield {
                "row": f"memory {variant} {precision}",
                "ratio": published["step"] / ours["step"],
                "unit": "MB",
                "published_mb": round(published["step"] / 2**20),
                "ours_mb": round(ours["step"] / 2**20),
                "model_mb": round(ours["model"] / 2**20),
            }


SECTIONS = {"features": feature_rows, "train": train_rows, "decode": decode_rows, "memory": memory_rows}
