"""The work of both sides: networks with random weights, captions of real lengths, pictures; and the speed of the machine itself."""

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
# OpenAI's ViT-B/32: embedding width, picture size, layers, width, patch; then the smallest possible text tower, which is not used.
VIT_B_32 = (512, 224, 12, 768, 32, 77, 64, 64, 1, 1)
# As published for Instagram: an adapter at every matrix of a block.
LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_proj", "c_fc"]}
VARIANTS = {
    "mlp": {"mapping_type": "mlp", "prefix_length": 10, "tune": "full"},
    "transformer": {"mapping_type": "transformer", "prefix_length": 40, "clip_length": 40, "num_layers": 8, "tune": "mapper"},
    "lora": {"mapping_type": "mlp", "prefix_length": 10, "tune": "lora", "lora": dict(LORA)},
}


@dataclasses.dataclass
class Scale:
    """How much of everything; the published figures use the defaults, tests use less."""

    gpt: dict = dataclasses.field(default_factory=dict)  # sizes of GPT2Config that differ from GPT-2's
    clip: tuple = VIT_B_32
    images: int = 200  # images that the steps draw from
    step_captions: int = 40  # captions per optimizer step: 8 images x 5
    large_step: int | None = None  # captions per step that fill a GPU
    pictures: int = 80  # encoded by ours
    published_pictures: int = 6  # encoded by the published side, five times each; the time is scaled
    decoded: int = 32  # images captioned by ours in one batch
    published_beam: int = 2  # images captioned by the published side; the time is scaled
    published_greedy: int = 4  # likewise
    beam_size: int = 5
    entry_length: int = 20  # tokens; random weights never stop, and a COCO caption has 12 tokens (99 of 100 have fewer than 22)


GPU_SCALE = Scale(images=4000, large_step=400, decoded=256)

# -- captions ------------------------------------------------------------------------------------------------------------


def draw_lengths(count, seed=0):
    """Draw caption lengths in GPT-2 tokens from the histogram in lengths.json: int64 [count]."""
    counts = {int(length): count for length, count in json.loads(LENGTHS.read_text(encoding="utf-8"))["counts"].items()}
    share = np.array(list(counts.values())) / sum(counts.values())
    return np.random.default_rng(seed).choice(list(counts), size=count, p=share)


def corpus_length():
    """Return the length in tokens to which the published code pads that corpus: min(mean + 10 standard deviations, longest)."""
    from features.packing import published_length

    counts = json.loads(LENGTHS.read_text(encoding="utf-8"))["counts"]
    return published_length(np.repeat([int(length) for length in counts], list(counts.values())))


@dataclasses.dataclass
class CaptionSet:
    """Captions of random tokens and real lengths, five per image, with random embeddings."""

    tokens: object  # features.packing.Tokens
    caption_rows: np.ndarray  # int64 [C]
    clip_embedding: object  # float32 [N, D]

    def embedding_of(self, numbers):
        """Return the embedding of each caption's image: [len(numbers), D]."""
        return self.clip_embedding[self.caption_rows[numbers]]

    def lists(self, numbers):
        """Return these captions as lists of tokens."""
        return [self.tokens[number].tolist() for number in numbers]


def caption_set(scale, device="cpu", seed=0):
    """Draw the captions of training steps: a CaptionSet. Captions beyond the published padding are cut, for both sides."""
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
    """Build a tokenizer whose token i is the word "t{i}" and the last <|endoftext|>, so that a caption shows its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = {f"t{number}": number for number in range(vocabulary - 1)} | {end: vocabulary - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token=end))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, clean_up_tokenization_spaces=False)


def build_gpt2(attention="sdpa", seed=0, **sizes):
    """Build a GPT2LMHeadModel with random weights; `sizes` of its config replace GPT-2's own."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel._from_config(GPT2Config(**sizes), attn_implementation=attention)


def build_captioner(variant, clip_width=512, tokenizer=None, **sizes):
    """Build our captioner with random weights. variant: a key of VARIANTS."""
    import torch

    from models.captioner import ClipCaptionModel
    from models.config import CaptionConfig

    gpt = build_gpt2(**sizes)
    torch.manual_seed(1)
    model = ClipCaptionModel(CaptionConfig(encoder=None, clip_width=clip_width, **VARIANTS[variant]), gpt, tokenizer)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # they start at zero, and adapters without effect could not be compared
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_published(ours, attention="eager", **sizes):
    """Build the published captioner with our weights, and eager attention, the only kind when it was published."""
    from benchmarks.published import PublishedClipCap, add_adapters

    config = ours.config
    transformer = (config.clip_length, config.num_layers) if config.mapping_type == "transformer" else ()
    theirs = PublishedClipCap(build_gpt2(attention, **sizes), config.clip_width, config.prefix_length, *transformer)
    if ours.config.lora:
        add_adapters(theirs.gpt, **ours.config.lora)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def published_training(theirs, variant):
    """Build the published training of the published captioner."""
    from benchmarks.published import PublishedTraining

    settings = VARIANTS[variant]
    return PublishedTraining(theirs, corpus_length(), settings["tune"] == "mapper")


def save_clip(path, sizes=VIT_B_32):
    """Write a CLIP state dict of random weights, rounded to half precision like all published ones."""
    import torch
    from clip.model import CLIP

    torch.manual_seed(2)
    torch.save({name: tensor.half().float() for name, tensor in CLIP(*sizes).state_dict().items()}, path)


# -- pictures ------------------------------------------------------------------------------------------------------------


def find_pictures(folder, data, count=80):
    """Find `count` photographs in `data`/coco_mini, else draw pictures into `folder`. Returns paths, and what they are in words."""
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
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def matmul_rate(device, dtype, size=2048, tries=6):
    """Measure the best rate of square matrix products in FLOP/s, by the faster of this machine's libraries."""
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
    """Name the GPU, or the processor and its cores: "AMD EPYC, 2 cores"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        pass  # not Linux, or a processor without that line
    return f"{' '.join(model.split())}, {os.cpu_count()} cores"


def commit():
    """Return the commit that is measured; None outside a repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=LENGTHS.parent, capture_output=True, text=True)
    return done.stdout.strip() or None


class OthersWatch:
    """Measure how much of the machine other programs use, since figures measured beside them are not reliable. Linux only."""

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
        """Return the share of all cores since this was made, 0 to 1; None where it is unknown. Children of ours count as ours."""
        if self.began is None:
            return None
        own, busy, moment = (now - then for now, then in zip(self._now(), self.began))
        return max(0.0, (busy - own) / max(moment * os.cpu_count(), 1e-9))
