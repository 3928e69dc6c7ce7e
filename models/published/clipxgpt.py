"""CLIPxGPT's published weights, decoded as they were trained to be: their greedy loop, and the vision tower inside the file.

B images, P prefix_length, E width of the language model, T tokens so far, V vocabulary, D embedding width.
"""

from pathlib import Path

import torch

from common import UserError
from models.published.downloads import WEIGHTS, find_published

MOST_TOKENS = 40  # as published
# Heads of CLIP's vision towers by width; what remains has heads 64 wide, as all of OpenAI's.
VISION_HEADS = {768: 12, 1024: 16}
VISION_HEAD_WIDTH = 64
NAMES = {"S": "flickr_small", "L": "flickr_large"}  # in models/published/downloads.py
FOLDERS = {"S": "small", "L": "large"}


def find_clipxgpt(size=None, name=None):
    """Find weights under weights/small|large/ or data/weights/small|large/ → the path.

    size: "S" or "L"; name: of the file there, without it model.pt, as published; with neither, S's is meant.
    Raises UserError saying what to fetch and where to put it.
    """
    file_name = name or "model.pt"
    letters = [size] if size else ["S", "L"] if name else ["S"]
    places = [folder / FOLDERS[letter] / file_name for letter in letters for folder in (Path("weights"), Path("data/weights"))]
    for place in places:
        for path in (place, place.with_name(f"{place.name}.pt")):
            if path.is_file():
                return path
    letter = letters[0]
    if name is None:
        try:
            return find_published(NAMES[letter])
        except UserError as error:
            raise UserError(f"no --checkpoint given, which means CLIPxGPT's published weights: {error}") from error
    raise UserError(
        f"no CLIPxGPT weights {' or '.join(map(str, places))}. Download {WEIGHTS[NAMES[letter]].address} (published size {letter}) and put "
        f"it at {Path('weights') / FOLDERS[letter] / 'model.pt'}, or name another file."
    )


def decode_as_published(model, prefix, entry_length, temperature, stop, return_ended=False):
    """The published greedy loop, batched over images.

    Begin-of-text comes before the prefix. Positions are added by hand, and once more by GPT-2; the published loop adds them in place,
    so that from the second step on begin-of-text and prefix carry them three times, the tokens twice. Ends at `stop` or after 40
    tokens; the last token is dropped whatever it is.
    prefix: [B, P, E] → (text, mean log-probability of a token) of each image; text stripped, its first letter upper case. return_ended: a
    third, whether it ended at `stop`.
    """
    from transformers import DynamicCache

    gpt, tokenizer = model.gpt, model.tokenizer
    table, positions = gpt.get_input_embeddings().weight, gpt.transformer.wpe.weight
    start = torch.cat([table[tokenizer.bos_token_id].expand(len(prefix), 1, -1), prefix], dim=1)  # [B, 1 + P, E]
    length = start.shape[1]
    start = start + positions[:length]
    tokens, scores = [], []
    stopped = torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    cache = DynamicCache(config=gpt.config)
    for step in range(min(entry_length, MOST_TOKENS, len(positions) - length + 1)):
        if step == 0:
            logits = gpt(inputs_embeds=start, use_cache=False, logits_to_keep=1).logits[:, -1]
        else:
            end = length + step
            added = table[tokens[-1]][:, None] + positions[end - 1]  # [B, 1, E]
            if step == 1:
                added = torch.cat([start + positions[:length], added], dim=1)
            logits = gpt(inputs_embeds=added, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        score, token = (logits / temperature).log_softmax(-1).max(-1)
        tokens.append(token)
        scores.append(score.masked_fill(stopped, torch.nan))
        stopped = stopped | (token == stop)
        if stopped.all():
            break
    tokens, scores = torch.stack(tokens, dim=1), torch.stack(scores, dim=1)  # [B, T]
    lengths = (~scores.isnan()).sum(1)
    results = []
    for row, count, score in zip(tokens.tolist(), lengths.tolist(), scores.nanmean(1).tolist()):
        text = tokenizer.decode(row[: count - 1]).strip()
        results.append((text[:1].upper() + text[1:], score, *([row[count - 1] == stop] if return_ended else [])))
    return results


# -- the vision tower ----------------------------------------------------------------------------------------------------


def _empty_tower(state, path):
    """A CLIPVisionModel without weights, of the sizes of `state`. Raises UserError when they cannot be read off it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    patches, rows = state.get("embeddings.patch_embedding.weight"), state.get("embeddings.position_embedding.weight")
    first = state.get("encoder.layers.0.mlp.fc1.weight")
    witnesses = {"embeddings.patch_embedding": (patches, 4), "embeddings.position_embedding": (rows, 2)}
    witnesses["encoder.layers.0.mlp.fc1"] = (first, 2)
    for name, (tensor, dims) in witnesses.items():
        if tensor is None or tensor.dim() != dims:
            shown = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UserError(f"{path} does not fit a vision tower: ie.model.{name}.weight is {shown}. Download the file again.")
    width, patch = patches.shape[0], patches.shape[-1]
    side = round(max(len(rows) - 1, 1) ** 0.5)
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.") and name.endswith((".weight", ".bias"))}
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=first.shape[0], image_size=side * patch, patch_size=patch,
        num_hidden_layers=len([layer for layer in layers if sum(name.startswith(f"encoder.layers.{layer}.") for name in state) >= 8]),
        num_attention_heads=VISION_HEADS.get(width, max(1, width // VISION_HEAD_WIDTH)),
    )  # fmt: skip
    try:
        with torch.device("meta"):
            return CLIPVisionModel(config)
    except ValueError as error:
        raise UserError(f"{path} holds a vision tower {width} wide, which cannot be built: {error}. Download the file again.") from error


def check_vision(state, path):
    """Raise UserError listing every missing, unexpected and misshapen key of a CLIPxGPT file's vision tower; → the empty tower.

    state: its tensors under transformers' names (what follows ie.model.).
    """
    tower = _empty_tower(state, path)
    own = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    faults = [f"missing ie.model.{name}" for name in sorted(set(own) - set(state))]
    faults += [f"unexpected ie.model.{name.removeprefix('ie.')}" for name in sorted(set(state) - set(own))]
    faults += [
        f"ie.model.{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    if faults:
        raise UserError(f"{path} does not fit a vision tower: {'; '.join(faults)}. Download the file again.")
    return tower


def build_encoder(name, pooling):
    """ "clipxgpt:FILE" → Tower, as models.encoders builds every encoder: after the post layer norm, before any projection."""
    from models.encoders.encoder import finish_tower
    from models.encoders.hugging_face import vision_module
    from models.encoders.openai import openai_preprocess
    from models.published.recognise import open_vision

    path = name.partition(":")[2]
    state = open_vision(path)
    tower = check_vision(state, path)
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    tower.load_state_dict({prefix + key: tensor.float() for key, tensor in state.items()}, assign=True)
    for module in tower.modules():  # the row numbers are no weights, and were made without memory
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return finish_tower(name, vision_module(tower, pooling), *openai_preprocess(tower.config.image_size), pooling)
