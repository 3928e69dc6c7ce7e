"""The work both sides are given: networks of random weights, captions of real lengths, pictures; and what the machine itself can do."""

import dataclasses
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import numpy as np

LENGTHS = Path(__file__).with_name("lengths.json")
CAPTIONS_AN_IMAGE = 5
GPT2_VOCABULARY = 50257
# OpenAI's ViT-B/32: embedding width, picture size, layers, width, patch; then the text tower, which nothing here runs, at its smallest.
VIT_B_32 = (512, 224, 12, 768, 32, 77, 64, 64, 1, 1)
# As published for Instagram: every matrix of a block has its adapter.
LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_proj", "c_fc"]}
VARIANTS = {
    "mlp": {"mapping_type": "mlp", "prefix_length": 10, "tune": "full"},
    "transformer": {"mapping_type": "transformer", "prefix_length": 40, "clip_length": 40, "num_layers": 8, "tune": "mapper"},
    "lora": {"mapping_type": "mlp", "prefix_length": 10, "tune": "lora", "lora": dict(LORA)},
}


@dataclasses.dataclass
class Scale:
    """How much of everything; the defaults are what the figures are of, tests take less."""

    gpt: dict = dataclasses.field(default_factory=dict)  # sizes of GPT2Config that are not GPT-2's own
    clip: tuple = VIT_B_32
    images: int = 200  # of which the steps draw
    step_captions: int = 40  # an optimiser step: 8 images x 5
    large_step: int | None = None  # captions of the larger steps that a GPU is filled with
    pictures: int = 80  # encoded by ours
    published_pictures: int = 6  # encoded by the published side, five times each; the time is scaled
    decoded: int = 32  # images captioned by ours, in one batch
    published_beam: int = 2  # images captioned by the published side; the time is scaled
    published_greedy: int = 4  # likewise
    beam_size: int = 5
    entry_length: int = 20  # tokens: GPT-2 of random weights does not stop by itself, and a COCO caption has 12 with 99 in 100 below 22


GPU_SCALE = Scale(images=4000, large_step=400, decoded=256)

# -- captions ------------------------------------------------------------------------------------------------------------


def draw_lengths(count, seed=0):
    """Caption lengths in GPT-2 tokens, drawn from the histogram in lengths.json → int64 [count]."""
    counts = {int(length): count for length, count in json.loads(LENGTHS.read_text(encoding="utf-8"))["counts"].items()}
    share = np.array(list(counts.values())) / sum(counts.values())
    return np.random.default_rng(seed).choice(list(counts), size=count, p=share)


def corpus_length():
    """What the published code pads every caption of that corpus to, in tokens: min(mean + 10 standard deviations, longest)."""
    from features.packing import published_length

    counts = json.loads(LENGTHS.read_text(encoding="utf-8"))["counts"]
    return published_length(np.repeat([int(length) for length in counts], list(counts.values())))


@dataclasses.dataclass
class CaptionSet:
    """Captions of random tokens and real lengths, five an image, with random embeddings."""

    tokens: object  # features.packing.Tokens
    caption_rows: np.ndarray  # int64 [C]
    clip_embedding: object  # float32 [N, D]

    def embedding_of(self, numbers):
        """The embedding of each caption's image: [len(numbers), D]."""
        return self.clip_embedding[self.caption_rows[numbers]]

    def lists(self, numbers):
        """The captions of these numbers as lists of tokens."""
        return [self.tokens[number].tolist() for number in numbers]


def caption_set(scale, device="cpu", seed=0):
    """Draw the captions that training steps are made of → CaptionSet; longer ones than the published padding are cut, for both sides."""
    import torch

    from features.packing import Tokens

    lengths = np.minimum(draw_lengths(scale.images * CAPTIONS_AN_IMAGE, seed), corpus_length())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    vocabulary = scale.gpt.get("vocab_size", GPT2_VOCABULARY)
    ids = np.random.default_rng(seed + 1).integers(1, vocabulary, offsets[-1]).astype(np.int32)
    embedding = torch.randn(scale.images, scale.clip[0], generator=torch.Generator().manual_seed(seed)).to(device)
    return CaptionSet(Tokens(ids, offsets), np.repeat(np.arange(scale.images), CAPTIONS_AN_IMAGE), embedding)


# -- networks ------------------------------------------------------------------------------------------------------------


def word_tokenizer(vocabulary):
    """A tokenizer whose token i is the word "t{i}", the last one <|endoftext|>: a caption shows its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = {f"t{number}": number for number in range(vocabulary - 1)} | {end: vocabulary - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token=end))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, clean_up_tokenization_spaces=False)


def build_gpt2(attention="sdpa", seed=0, **sizes):
    """A GPT2LMHeadModel of random weights, full size unless `sizes` (of its config) say otherwise."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel._from_config(GPT2Config(**sizes), attn_implementation=attention)


def build_captioner(variant, clip_width=512, tokenizer=None, **sizes):
    """Our captioner of random weights → ClipCaptionModel. variant: a key of VARIANTS."""
    import torch

    from models.captioner import ClipCaptionModel
    from models.config import CaptionConfig

    gpt = build_gpt2(**sizes)
    torch.manual_seed(1)
    model = ClipCaptionModel(CaptionConfig(encoder=None, clip_width=clip_width, **VARIANTS[variant]), gpt, tokenizer)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zeros at first: adapters that do nothing yet would make no difference to compare
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_published(ours, attention="eager", **sizes):
    """The published captioner with the weights of ours. Its attention is transformers' eager one, the only one there was."""
    from benchmarks.published import PublishedClipCap, add_adapters

    config = ours.config
    transformer = (config.clip_length, config.num_layers) if config.mapping_type == "transformer" else ()
    theirs = PublishedClipCap(build_gpt2(attention, **sizes), config.clip_width, config.prefix_length, *transformer)
    if ours.config.lora:
        add_adapters(theirs.gpt, **ours.config.lora)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def published_training(theirs, variant):
    """The published training over the published captioner → published.PublishedTraining."""
    from benchmarks.published import PublishedTraining

    settings = VARIANTS[variant]
    return PublishedTraining(theirs, corpus_length(), settings["tune"] == "mapper")


def save_clip(path, sizes=VIT_B_32):
    """Write a CLIP state dict of random weights, rounded to what half precision holds, as all published ones are."""
    import torch
    from clip.model import CLIP

    torch.manual_seed(2)
    torch.save({name: tensor.half().float() for name, tensor in CLIP(*sizes).state_dict().items()}, path)


# -- pictures ------------------------------------------------------------------------------------------------------------


def find_pictures(folder, data, count=80):
    """`count` JPEGs: the photographs of `data`/coco_mini where there are any, else drawn into `folder` → paths, what they are."""
    photographs = sorted(Path(data).glob("coco_mini/train2017/*.jpg"))[:count]
    if photographs:
        return photographs, f"{len(photographs)} COCO photographs"
    return [draw_picture(Path(folder) / f"{number:012d}.jpg", number) for number in range(count)], f"{count} drawn pictures, 640 x 480"


def draw_picture(path, seed, size=(640, 480)):
    """Draw a JPEG of about the size and detail of a COCO photograph (640 x 480, about 150 KB)."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + draw.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=90)
    return path


# -- the machine ---------------------------------------------------------------------------------------------------------


def wait_for(device):
    """Let a GPU finish what it was given; a CPU has."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def matmul_rate(device, dtype, size=2048, tries=6):
    """The best rate this machine multiplies square matrices at, in FLOP/s, by whichever of its libraries is faster."""
    import torch

    from models.operators import fast_matmul

    size = 8192 if device == "cuda" else size
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best = float("inf")
    for multiply in [torch.matmul, fast_matmul] * tries:
        wait_for(device)
        began = time.perf_counter()
        multiply(a, b)
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def machine_name(device):
    """The GPU, or the processor and its cores: "AMD EPYC, 2 cores"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        pass  # not Linux, or a processor that has no such line
    return f"{' '.join(model.split())}, {os.cpu_count()} cores"


def commit():
    """The commit measured, or None outside a repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=LENGTHS.parent, capture_output=True, text=True)
    return done.stdout.strip() or None


class OthersWatch:
    """How much of the machine other programs took since this was made: figures taken beside them are worth little. Linux only."""

    def __init__(self):
        self.began = self._now()

    @staticmethod
    def _now():
        own = sum(os.times()[:4])
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        return own, (sum(fields[:8]) - fields[3] - fields[4]) / ticks, time.monotonic()

    def share(self):
        """→ 0 … 1 of all cores, or None where it cannot be told. Counts children of ours once they have ended."""
        if self.began is None:
            return None
        own, busy, moment = (now - then for now, then in zip(self._now(), self.began))
        return max(0.0, (busy - own) / max(moment * os.cpu_count(), 1e-9))
