"""What a caption may not do while it is decoded: repeat an n-gram, or stop too early."""

import torch

from common import UserError


class Constraints:
    """The tokens that each caption must not take next.

    no_repeat_ngram_size: tokens in a row that may not occur twice in a caption, 0 for no such rule; min_length: tokens before the
    stop token may be taken; stop: its id; prompt: list of token ids that every caption begins with. Raises UserError below 0.
    """

    def __init__(self, no_repeat_ngram_size, min_length, stop, prompt):
        for name, value in (("no_repeat_ngram_size", no_repeat_ngram_size), ("min_length", min_length)):
            if value < 0:
                raise UserError(f"{name} is {value}; expected 0 (no such rule) or more tokens")
        self.size = no_repeat_ngram_size
        self.min_length = min_length
        self.stop = stop
        self.prompt = prompt

    def forbidden(self, logits, tokens):
        """logits: [rows, V], for their shape; tokens: [rows, T] taken so far, None for none → bool [rows, V], or None: all allowed.

        Where every token would be forbidden, the stop token is allowed.
        """
        taken = 0 if tokens is None else tokens.shape[-1]
        too_early = self.stop is not None and taken < self.min_length
        if not self.size and not too_early:
            return None
        rows, vocabulary = logits.shape
        mask = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=logits.device)
        if self.size:
            prompt = torch.tensor(self.prompt, dtype=torch.long, device=logits.device).expand(rows, -1)
            text = prompt if tokens is None else torch.cat([prompt, tokens], dim=-1)
            if text.shape[-1] >= self.size:
                grams = text.unfold(1, self.size, 1)  # [rows, number of n-grams, n]
                begun = text[:, None, text.shape[-1] - self.size + 1 :]  # the n - 1 tokens that the next one would complete
                seen = (grams[..., :-1] == begun).all(-1)
                mask.scatter_(1, grams[..., -1].where(seen, vocabulary), True)  # the place after the last is thrown away
        mask = mask[:, :vocabulary]
        if too_early:
            mask[:, self.stop] = True
        if self.stop is not None:
            mask[:, self.stop] &= ~mask.all(-1)
        return mask
