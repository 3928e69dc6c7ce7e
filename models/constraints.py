"""Rules of decoding: no n-gram twice, no caption shorter than a minimum."""

import torch

from common import UserError


class Constraints:
    """Find the tokens that each caption must not take next.

    Args:
        no_repeat_ngram_size: size of the n-grams that may not occur twice in a caption, in tokens; 0 for no such rule.
        min_length: tokens before the stop token may be taken.
        stop: id of the stop token.
        prompt: list of token ids that every caption begins with.

    Raises:
        UserError: a number is negative.
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
        """Mark the forbidden tokens. Where every token would be forbidden, the stop token is allowed.

        Args:
            logits: [rows, V]; only its shape is used.
            tokens: [rows, T] taken so far, or None at the start.

        Returns:
            bool [rows, V], or None where all are allowed.
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
                mask.scatter_(1, grams[..., -1].where(seen, vocabulary), True)  # column V is dropped below
        mask = mask[:, :vocabulary]  # [rows, V]
        if too_early:
            mask[:, self.stop] = True
        if self.stop is not None:
            mask[:, self.stop] &= ~mask.all(-1)
        return mask
