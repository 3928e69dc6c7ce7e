"""Tiny stand-ins for the big things: language models, CLIP weight files, feature files. Random weights, real formats."""

import json
import pickle
from pathlib import Path

import torch

CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "Two dogs play with a red ball in the park.",
    "A plate of food with broccoli and rice on a table.",
    "The Gateway Arch in St. Louis at sunset.",
    "Watch out for the train!",
    "A cat sleeping on a laptop next to a cup of coffee.",
    "Several people fly kites at the beach on a windy day.",
    "A bathroom with a white sink, a mirror and a toilet.",
]


def train_tokenizer(texts=CAPTIONS, vocab_size=360):
    """Train a byte-level BPE as GPT-2's: "!" is token 0, "." is token 13, <|endoftext|> is the last one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    model = json.loads(raw.to_str())["model"]
    vocab = model["vocab"]
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = GPT2TokenizerFast(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    assert tokenizer.encode("!") == [0], "the tokenizer does not number bytes as GPT-2's does"
    assert tokenizer.encode(".") == [13], "the tokenizer does not number bytes as GPT-2's does"
    return tokenizer


def random_gpt2(vocab_size, width=64, layers=2, heads=4, positions=128, seed=0, scale=0.02, dropout=0.1):
    """Build a GPT-2 of random weights in eval mode; `scale` is the standard deviation its weights are drawn with."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=positions,
        initializer_range=scale,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).eval()


def save_gpt2(folder, texts=CAPTIONS, **sizes):
    """Write a random GPT-2 and the tokenizer trained on `texts` into `folder`, as save_pretrained does. → the folder."""
    tokenizer = train_tokenizer(texts)
    model = random_gpt2(len(tokenizer), **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def word_tokenizer(vocab_size):
    """A tokenizer whose token i is the word "t{i}", the last one <|endoftext|>: a text shows its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    vocab = {f"t{i}": i for i in range(vocab_size - 1)} | {end: vocab_size - 1}
    raw = Tokenizer(models.WordLevel(vocab, unk_token=end))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, bos_token=end, unk_token=end, clean_up_tokenization_spaces=False)


def words(tokens):
    """What word_tokenizer makes of token numbers."""
    return " ".join(f"t{int(token)}" for token in tokens)


def save_clip(path, width, vision, seed=0):
    """Write the state dict of a small random CLIP, `vision` "vit" or "resnet", whose embeddings are `width` wide."""
    from clip.model import CLIP

    torch.manual_seed(seed)
    towers = {
        "vit": dict(vision_layers=1, vision_width=64, vision_patch_size=32),
        "resnet": dict(vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None),
    }
    model = CLIP(
        embed_dim=width,
        image_resolution=64,
        context_length=77,
        vocab_size=64,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
        **towers[vision],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path


def save_tinyvit(folder, seed=0):
    """Write a TinyViT-21M of random weights into `folder` as timm saves one for the hub (576 wide)."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = timm.create_model("tiny_vit_21m_224.dist_in22k_ft_in1k", pretrained=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_picture(path, seed):
    """Write a small JPEG of coloured noise blocks."""
    import numpy
    from PIL import Image

    blocks = numpy.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize((80, 64), Image.Resampling.NEAREST).save(path, quality=90)
    return path


def save_published_features(path, captions, width=512, seed=0):
    """Pickle random embeddings as the published parse script does (no meta), one row for each list of `captions`.

    → clip_embedding [N, D] float32, texts, caption_rows (a row number for each text)
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(captions), width, generator=generator)
    records = []
    for row, texts in enumerate(captions):
        for text in texts:
            records.append({"image_id": str(1000 + row), "caption": text, "id": len(records), "clip_embedding": row})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        pickle.dump({"clip_embedding": embeddings, "captions": records}, file)
    return embeddings, [record["caption"] for record in records], [record["clip_embedding"] for record in records]


FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "num_key_value_heads": None},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
    "mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "bloom": {"n_layer": 3, "n_head": 4},
}


def save_language_model(folder, family, seed=0, **more):
    """Write a small random causal language model of a family of transformers, 64 wide, with the tokenizer of CAPTIONS. → the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    sizes |= {"max_position_embeddings": 2048 if family == "gpt_neo" else 128}
    sizes = {} if family in ("gpt2", "mpt") else sizes
    sizes = {name: value for name, value in (sizes | FAMILIES[family] | more).items() if value is not None}
    ends = {"bos_token_id": len(tokenizer) - 1, "eos_token_id": len(tokenizer) - 1, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.2, **ends, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
