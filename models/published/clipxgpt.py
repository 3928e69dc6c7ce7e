"""CLIPxGPT's published weights: where they are found, and the greedy loop they were published with.

Letters: B images, P prefix_length, E width of the language model, T tokens so far.
"""

from pathlib import Path

import torch

from common import UserError
from models.published.downloads import WEIGHTS, find_published

MOST_TOKENS = 40  # as published
NAMES = {"S": "flickr_small", "L": "flickr_large"}  # in models/published/downloads.py
FOLDERS = {"S": "small", "L": "large"}


def find_clipxgpt(size=None, name=None):
    """Find weights under weights/small|large/ or data/weights/small|large/.

    Args:
        size: "S" or "L"; None tries both with a name, and S without.
        name: of the file there; None means model.pt, as published, or else the published weights by download.

    Returns:
        Path of the file.

    Raises:
        UserError: says what to download and where to put it.
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
    """Decode greedily as published, all images together.

    Begin-of-text precedes the prefix. Positions are added here, and once more by GPT-2. The published loop adds them in place: from the
    second step on, begin-of-text and prefix carry them three times and the tokens twice. It ends at `stop` or after 40 tokens, and drops
    the last token whatever it is.

    Args:
        model: ClipCaptionModel.
        prefix: [B, P, E] float.
        entry_length: longest caption in tokens.
        temperature: divides the logits.
        stop: token that ends a caption.
        return_ended: whether to return as a third value if the caption ended at `stop`.

    Returns:
        (text, mean log-probability per token) per image. The text is stripped, and its first letter is upper case.
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
