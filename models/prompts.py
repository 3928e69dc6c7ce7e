"""Text between prefix and caption: a template whose {base} is what the base captioner says of the image."""

import torch

from common import UserError
from models.captioner import fill_prompt

BASE_CAPTION = "{base}"
BASE_ENTRY_LENGTH = 67  # tokens, as published


def base_captions(base_model, clip_embedding, batch_size=64):
    """Caption embeddings with the base captioner, greedily, 67 tokens at most → list of str, white space around them stripped.

    clip_embedding: [B, D], as the captioner itself gets it (the base normalises by its own config).
    """
    from models.decoding import generate

    texts = []
    for start in range(0, len(clip_embedding), batch_size):
        batch = clip_embedding[start : start + batch_size]
        texts += [captions[0][0].strip() for captions in generate(base_model, batch, "greedy", entry_length=BASE_ENTRY_LENGTH)]
    return texts


def encode_prompts(model, clip_embedding):
    """The tokens that stand between prefix and caption, for each image → list of lists of ids; empty where the model has no prompt.

    clip_embedding: [B, D]. Raises UserError when the prompt quotes a base captioner and the model has none.
    """
    template = model.config.prompt
    if not template:
        return [[] for _ in clip_embedding]
    captions = [""] * len(clip_embedding)
    if BASE_CAPTION in template:
        if model.base_model is None:
            raise UserError("the prompt quotes a base captioner and the checkpoint holds none (original_model.*). Take the whole file.")
        captions = base_captions(model.base_model, clip_embedding)
    # Without the space at its end, which belongs to the caption's first word, as in training (features/prompts.py).
    texts = [fill_prompt(template, caption).rstrip() for caption in captions]
    return [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def add_prompts(model, clip_embedding, prefix, more=()):
    """Put each image's prompt, and the tokens `more`, behind its prefix; images whose prompts are equally long stay together, so that no
    row needs padding.

    → pairs of image numbers and [b, P + Q, E], Q tokens of prompt and `more`.
    """
    prompts = [[*ids, *more] for ids in encode_prompts(model, clip_embedding)]
    groups = {}
    for image, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(image)
    for length, images in groups.items():
        start = prefix if len(groups) == 1 else prefix[images]
        if length:
            ids = torch.tensor([prompts[image] for image in images], device=prefix.device)
            start = torch.cat([start, model.gpt.get_input_embeddings()(ids).to(start.dtype)], dim=1)
        yield images, start
