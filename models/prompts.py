"""Text between prefix and caption: a template with places for other captions.

{base} stands for what the base captioner says of the image, {retrieved} for captions of similar images (features/datastore.py).
"""

import torch

from common import UserError
from models.captioner import BASE_CAPTION, RETRIEVED_CAPTIONS, fill_prompt

MOST_TOGETHER = 64  # images decoded together behind retrieved captions


def encode_prompts(model, clip_embedding, image_ids=None):
    """Tokenize the text that stands between prefix and caption, image by image.

    Args:
        model: ClipCaptionModel with its tokenizer.
        clip_embedding: [B, D], on the model's device.
        image_ids: B ids of images whose own captions are not retrieved, or None.

    Returns:
        list of B lists of token ids; empty lists where the model has no prompt.

    Raises:
        UserError: the prompt quotes a base captioner or a datastore and the model has none.
    """
    template = model.config.prompt
    if not template:
        return [[] for _ in clip_embedding]
    captions = retrieved = [""] * len(clip_embedding)
    if BASE_CAPTION in template:
        if model.base_captioner is None:
            raise UserError("the prompt quotes a base captioner and the checkpoint holds none (original_model.*). Take the whole file.")
        captions = model.base_captioner.caption(clip_embedding)
    if RETRIEVED_CAPTIONS in template:
        if model.datastore is None:
            raise UserError("the prompt shows captions of similar images and there is no datastore of them. Give one (--datastore FILE).")
        retrieved = model.datastore.retrieve(clip_embedding, image_ids, clip_embedding.device)
    return [_encode_prompt(model.tokenizer, fill_prompt(template, *filling)) for filling in zip(captions, retrieved)]


def _encode_prompt(tokenizer, text):
    """Tokenize a prompt as training does (features/tokens.py): white space at its end belongs to the caption's first word where the
    tokenizer joins the two, as GPT-2's joins a space and a letter; else, as for a line break, it stays with the prompt.
    """
    if text == text.rstrip() or not tokenizer.is_fast:
        return tokenizer.encode(text.rstrip(), add_special_tokens=False)
    encoded = tokenizer(text + "A", add_special_tokens=False, return_offsets_mapping=True)
    return [token for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"]) if end <= len(text)]


def add_prompts(model, clip_embedding, prefix, more=(), image_ids=None):
    """Put each image's prompt behind its prefix. Images whose prompts are equally long stay together, so that no row needs padding.

    Args:
        model: ClipCaptionModel.
        clip_embedding: [B, D].
        prefix: [B, P, E].
        more: token ids that follow every prompt.
        image_ids: as encode_prompts takes them.

    Yields:
        image numbers (list of b int), and [b, P + Q, E] with Q tokens of prompt and `more`.
    """
    prompts = [[*ids, *more] for ids in encode_prompts(model, clip_embedding, image_ids)]
    groups = {}
    for image, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(image)
    # Behind retrieved captions callers hand in many images at once, so that groups are not of one image each.
    most = MOST_TOGETHER if model.datastore is not None else len(prompts)
    parts = [(length, images[first : first + most]) for length, images in groups.items() for first in range(0, len(images), most)]
    for length, images in parts:
        start = prefix if len(parts) == 1 else prefix[images]  # [b, P, E]
        if length:
            ids = torch.tensor([prompts[image] for image in images], device=prefix.device)  # [b, Q]
            start = torch.cat([start, model.gpt.get_input_embeddings()(ids).to(start.dtype)], dim=1)  # [b, P + Q, E]
        yield images, start
