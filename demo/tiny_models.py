"""Train a tiny CLIP and a tiny GPT-2 on pictures and captions, and save them in the formats of the real ones.

Both train at the same time, each in its own process with one thread. Models this small gain little from a second thread, and lose much
where another program needs the same core.

    python -m demo.tiny_models clip --folder data/demo --steps 600        (what train_both starts)

Letters: N pictures, B pictures of a batch, T tokens, D the CLIP embedding's width.
"""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file
from demo import scenes as world

CLIP_WIDTH = 256  # D
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own preprocessing
END_OF_TEXT = "<|endoftext|>"
WARMUP_STEPS = 30


def _read_pictures(paths):
    """Read picture files of one size: uint8 [N, 3, H, W]."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]).permute(0, 3, 1, 2)


def _learn(parameters, batch_loss, steps, lr, name, line=0):
    """Take AdamW steps on batch_loss(), with linear warm-up and cosine decay; show a bar on its `line`. Returns the last loss."""
    import torch
    from tqdm import trange

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    bar = trange(steps, desc=name, unit="step", position=line, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def _batches(count, batch_size, rng):
    """Yield lists of `batch_size` different numbers below `count` for ever, each pass in a new order."""
    while True:
        order = rng.sample(range(count), count)
        for start in range(0, max(count - batch_size, 0) + 1, batch_size):
            yield order[start : start + batch_size]


def train_clip(pictures, captions, path, steps=600, batch_size=128, lr=2e-3, seed=0):
    """Train a CLIP with OpenAI's ResNet architecture contrastively, and save a state dict that clip.load(path) opens.

    Args:
        pictures: paths of square pictures of one size, a multiple of 32 pixels.
        captions: for each picture a list of captions, all of the same length.
        path: file to write. The text tower has OpenAI's vocabulary and context, so that clip.tokenize works with it.
        steps, batch_size, lr, seed: of the training.

    Returns:
        The last loss.
    """
    import clip
    import torch
    from clip.model import CLIP
    from torch.nn import functional

    torch.manual_seed(seed)
    batches = _batches(len(pictures), batch_size, random.Random(seed))
    pixels = _read_pictures(pictures)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    tokens = torch.stack([clip.tokenize(texts) for texts in captions])  # [N, 5, 77]
    tokens = tokens[..., : int(tokens.argmax(-1).max()) + 1]  # [N, 5, T]: up to the last end-of-text token, the largest number
    # Most of the vocabulary never occurs. Train only the rows that do, as a vocabulary of their own, and put them back at the end.
    # They keep their order, so that the end-of-text token stays the largest.
    used, tokens = torch.unique(tokens, return_inverse=True)
    model = CLIP(CLIP_WIDTH, pixels.shape[-1], (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)
    vocabulary = model.token_embedding
    model.token_embedding = torch.nn.Embedding.from_pretrained(vocabulary.weight[used].detach(), freeze=False)
    # Twice as fast on a CPU.
    model.visual.to(memory_format=torch.channels_last)

    def batch_loss():
        rows = next(batches)
        images = ((pixels[rows].float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image_embedding = model.encode_image(images)
        text_embedding = model.encode_text(tokens[rows, torch.randint(tokens.shape[1], (len(rows),))])
        image_embedding, text_embedding = (functional.normalize(e.float(), dim=-1) for e in (image_embedding, text_embedding))
        logits = model.logit_scale.exp().clamp(max=100) * image_embedding @ text_embedding.T  # [B, B]
        target = torch.arange(len(rows))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    loss = _learn(model.train().parameters(), batch_loss, steps, lr, "tiny CLIP")
    vocabulary.weight.data[used] = model.token_embedding.weight.data
    model.token_embedding = vocabulary
    # clip.load rounds to fp16 anyway.
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with replace_file(path) as temporary:
        torch.save(state, temporary)
    return loss


def train_tokenizer(texts):
    """Train a byte-level BPE like GPT-2's on texts. Returns a transformers tokenizer; its last token is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)


def train_gpt2(captions, folder, steps=400, batch_size=32, lr=2e-3, width=128, layers=3, seed=0):
    """Train a GPT-2 and its BPE, and save a folder that from_pretrained and AutoTokenizer load.

    It learns the captions of one picture joined in any order, and so learns to repeat what it has read. A frozen GPT-2 needs that to follow
    a prefix.

    Args:
        captions: for each picture a list of texts.
        folder: folder to write.
        steps, batch_size, lr, seed: of the training.
        width, layers: size of the network.

    Returns:
        The last loss.
    """
    import torch
    from torch.nn import functional
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    rng = random.Random(seed)
    batches = _batches(len(captions), batch_size, rng)
    tokenizer = train_tokenizer([text for texts in captions for text in texts])
    end = tokenizer.eos_token_id
    encoded = [[ids + [end] for ids in tokenizer(texts)["input_ids"]] for texts in captions]
    longest = 1 + max(sum(map(len, texts)) for texts in encoded)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=max(128, longest), n_embd=width, n_layer=layers, n_head=max(1, width // 32),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    def batch_loss():
        rows = []
        for number in next(batches):
            texts = rng.sample(encoded[number], len(encoded[number]))
            rows.append(torch.tensor([end] + [token for ids in texts for token in ids]))
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)  # [B, T]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1].clamp(min=0)).logits.float()  # [B, T - 1, V]
        return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100)

    loss = _learn(model.train().parameters(), batch_loss, steps, lr, "tiny GPT-2", line=1)
    # A folder cannot be replaced in one step: fill one beside it, then rename.
    temporary = Path(folder).with_name(Path(folder).name + ".tmp")
    for place in (temporary, Path(folder)):
        shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return loss


def clip_path(folder):
    """The tiny CLIP of the world in `folder`."""
    return Path(folder) / "weights" / "demo_clip.pt"


def gpt2_path(folder):
    """The folder of the tiny GPT-2 of the world in `folder`."""
    return Path(folder) / "weights" / "demo_gpt2"


def lessons_path(folder):
    """The file in which a world without scenes lists what the tiny models learn from: [picture, its captions]."""
    return Path(folder) / "lessons.json"


def _read_lessons(folder):
    """Read the training pictures of the world in `folder`, and the captions of each."""
    if lessons_path(folder).exists():
        pictures, captions = zip(*json.loads(lessons_path(folder).read_text()))
        return [Path(folder) / picture for picture in pictures], list(captions)
    truth = world.read_scenes(folder, "train")
    return [world.picture_path(folder, "train", image_id) for image_id in truth], [world.describe(scene) for scene in truth.values()]


def train_one(name, folder, steps, seed=0, **more):
    """Train the tiny "clip" or "gpt2" on the training pictures of the world in `folder`, unless it is there.

    Args:
        name: "clip" or "gpt2".
        folder: folder of the world.
        steps, seed: of the training.
        more: other settings of train_clip or train_gpt2.

    Returns:
        The last loss; None where nothing had to be trained.
    """
    pictures, captions = _read_lessons(folder)
    clip_path(folder).parent.mkdir(parents=True, exist_ok=True)
    # Both appear under their names only when they are whole.
    if name == "gpt2" and not gpt2_path(folder).exists():
        return train_gpt2(captions, gpt2_path(folder), steps, seed=seed, **more)
    if name == "clip" and not clip_path(folder).exists():
        return train_clip(pictures, captions, clip_path(folder), steps, seed=seed, **more)
    return None


def train_both(folder, clip_steps, gpt2_steps, seed=0):
    """Train both models at the same time, each in its own process. Raises UserError when one fails."""
    running = []
    for name, steps in (("clip", clip_steps), ("gpt2", gpt2_steps)):
        words = [name, "--folder", str(Path(folder).resolve()), "--steps", str(steps), "--seed", str(seed)]
        running.append(subprocess.Popen([sys.executable, "-m", "demo.tiny_models", *words], cwd=Path(__file__).resolve().parent.parent))
    try:
        statuses = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()  # of no effect on one that has ended
    if any(statuses):
        raise UserError(f"training the tiny models ended with exit codes {statuses} (CLIP, GPT-2); see the reason above.")


@one_line_errors
def main(argv=None):
    parser = Parser(prog="demo.tiny_models", description=__doc__)
    parser.add_argument("model", choices=("clip", "gpt2"))
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="folder of a drawn world (default data/demo)")
    parser.add_argument("--steps", type=int, required=True, help="number of optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default 0)")
    options = parser.parse_args(argv)

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    train_one(options.model, options.folder, options.steps, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
