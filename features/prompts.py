"""Text between prefix and caption: prompts tokenised together with the captions they stand before.

Prompt and caption are tokenised as one string, so that a space at the prompt's end belongs to the caption's first word, as in any
running text. What an image's captions have in common of the prompt is laid out once; tokens of the prompt that differ from caption
to caption stand at the caption's head and are read, never predicted.
"""

import numpy as np

from common import UserError
from features.packing import Tokens


def tokenize_prompted(texts, prompts, caption_rows, tokenizer, end_token_id=None, most_tokens=None):
    """Tokenise captions behind the prompts of their images → Tokens of the captions, Tokens of the prompts (one a row of the features).

    texts: C captions; prompts: one text a row; caption_rows: int [C]; most_tokens: room for a prompt and a caption together, in
    tokens; a longer caption loses its end and is counted. Raises UserError when a prompt leaves no room, and for a tokenizer that
    cannot say where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--prompt needs a tokenizer that tells where a token stands in its text (a fast one). Save it with tokenizer.json.")
    joined = [prompts[row] + text for row, text in zip(caption_rows, texts)]
    encoded = tokenizer(joined, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
    heads, shared = [], {}  # tokens of the prompt before each caption; what an image's captions share of them
    for row, ids, places in zip(caption_rows, encoded["input_ids"], encoded["offset_mapping"]):
        head = next((n for n, (_, end) in enumerate(places) if end > len(prompts[row])), len(ids))
        heads.append(head)
        prompt = ids[:head]
        common = shared.setdefault(int(row), prompt)
        length = next((n for n, (a, b) in enumerate(zip(common, prompt)) if a != b), min(len(common), len(prompt)))
        shared[int(row)] = common[:length]

    end = [] if end_token_id is None else [end_token_id]
    captions, skip, cut = [], [], 0
    for row, ids, head in zip(caption_rows, encoded["input_ids"], heads):
        start = len(shared[int(row)])
        ids, unpredicted = ids[start:], head - start
        if most_tokens is not None:
            room = most_tokens - start - len(end)
            if room <= unpredicted:
                raise UserError(f"a prompt of {head} tokens leaves no room for a caption: {prompts[row][:60]!r}…. Take a shorter one.")
            cut += len(ids) > room
            ids = ids[:room]
        captions.append(ids + end)
        skip.append(unpredicted)
    tokens = flat_tokens(captions, cut)
    tokens.skip = np.array(skip, np.int64) if any(skip) else None
    return tokens, flat_tokens([shared.get(row, []) for row in range(len(prompts))])


def flat_tokens(lists, cut=0):
    """Lists of token ids as one flat array → Tokens."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return Tokens(np.fromiter((token for ids in lists for token in ids), np.int32, count=offsets[-1]), offsets, cut)
