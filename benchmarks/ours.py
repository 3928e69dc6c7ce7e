"""Our side of the benchmark: the calls that parse_coco.py, train.py and predict.py make, wrapped for timing."""

import contextlib
import dataclasses
import io

import torch

from benchmarks.published import LEARNING_RATE, PAD
from features.extract import Record, extract
from models.decoding import generate
from training.batches import choose_row_slots, packed_steps
from training.data import CaptionData
from training.optimizer import build_optimizer, published_eps


class Training:
    """The training step of train.py, in float32 or under bf16 autocast (weights stay float32)."""

    def __init__(self, model, captions, bs=40):
        """Prepare the step. captions: work.CaptionSet; "!" is ignored in the loss, as on the published side; bs: captions per step."""
        self.model = model
        self.device = next(model.parameters()).device
        data = CaptionData(captions, captions.tokens, captions.caption_rows, model.config.prefix_length, PAD)
        self.data = dataclasses.replace(data, row_slots=choose_row_slots(data, bs, "images", self.device.type))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(trained, LEARNING_RATE, fused=True)
        self.steps_taken = 0
        model.train()

    def loss(self, numbers, bf16=False):
        """Return the mean cross-entropy per token of these captions, a scalar tensor."""
        return self._loss(self.data.pack(numbers), bf16)

    def _loss(self, batch, bf16):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.model(batch.to(self.device)) / len(batch.labels)

    def step(self, numbers, bf16=False):
        """Take one optimizer step and return its loss."""
        return self.steps([numbers], bf16)

    def steps(self, batches, bf16=False):
        """Take optimizer steps over lists of caption numbers without waiting for the device in between. Returns the last loss."""
        for batch in packed_steps(self.data, batches, 1, 0, 1, self.device.type):
            loss = self._loss(batch.parts[0], bf16)
            loss.backward()
            for group in self.optimizer.param_groups:  # as train.py --published, so that both sides learn the same
                group["eps"] = published_eps(self.steps_taken)
            self.steps_taken += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def encode_pictures(encoder, pictures, captions_each, out):
    """Run extract() over pictures (paths) with `captions_each` captions each. Returns [pictures, D] as the feature file holds it."""
    from features.store import load_features

    records = [Record(str(number), str(path), [{"caption": "x"}] * captions_each) for number, path in enumerate(pictures)]
    with contextlib.redirect_stdout(io.StringIO()):
        extract(records, encoder, out, source="benchmark")
    return load_features(out).clip_embedding


def caption(model, clip_embedding, decoding, beam_size, entry_length):
    """Run generate(). Returns the captions of each image, best first, each as a list of words (see work.word_tokenizer)."""
    kept = beam_size if decoding == "beam" else 1
    found = generate(model, clip_embedding, decoding, beam_size, entry_length, num_captions=kept)
    return [[text.split() for text, _ in captions] for captions in found]
