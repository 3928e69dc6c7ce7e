"""The language model with a key-value cache, as decoding uses it.

R rows, P prefix_length, E language-model width, V vocabulary.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Decoder:
    """The language model with its cache: rows in, logits of the next token out, divided by the temperature.

    Args:
        gpt: a causal language model of transformers.
        temperature: float above 0.
        most_tokens: slots that a row will need, prefix and caption together.
    """

    def __init__(self, gpt, temperature, most_tokens):
        self.gpt = gpt
        self.temperature = temperature
        self.cache = DynamicCache(config=gpt.config)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self.cache.layers = [_InPlaceLayer(most_tokens) for _ in self.cache.layers]

    def __call__(self, **inputs):
        """Read input_ids [rows, 1] or inputs_embeds [rows, P, E]; return logits [rows, V], float32 or better."""
        logits = self.gpt(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [rows, V]
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits if self.temperature == 1 else logits / self.temperature

    def keep(self, rows):
        """Keep these rows of the cache, in this order, repeats allowed."""
        self.cache.batch_select_indices(rows)

    def reorder(self, rows, prefix_length):
        """Keep these rows, each in the place of one with the same prefix, so that only slots behind the prefix are copied."""
        for layer in self.cache.layers:
            if isinstance(layer, _InPlaceLayer):
                layer.reorder(rows, prefix_length)
            else:
                layer.batch_select_indices(rows)


class _InPlaceLayer(DynamicLayer):
    """A cache layer that writes into memory reserved at the start; the library's layer copies everything at every token."""

    def __init__(self, most_tokens):
        super().__init__()
        self.most_tokens = most_tokens
        self.store = None  # [2, rows, heads, most_tokens, head width]: keys and values
        self.length = 0

    def _show(self):
        self.keys, self.values = self.store[..., : self.length, :]
        return self.keys, self.values

    def update(self, key_states, value_states, *args, **kwargs):
        """Add keys and values [rows, heads, n, head width]; return all so far."""
        if self.store is None:
            rows, heads, _, width = key_states.shape
            self.store = key_states.new_empty(2, rows, heads, self.most_tokens, width)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.length + key_states.shape[-2]
        self.store[0, ..., self.length : end, :] = key_states
        self.store[1, ..., self.length : end, :] = value_states
        self.length = end
        return self._show()

    def batch_select_indices(self, indices):
        """Keep these rows, in this order, repeats allowed."""
        kept = self.store.new_empty(2, len(indices), *self.store.shape[2:])
        kept[..., : self.length, :] = self.store[:, indices, :, : self.length]
        self.store = kept
        self._show()

    def reorder(self, indices, start):
        """Reorder the rows from slot `start` on; earlier slots stay."""
        self.store[..., start : self.length, :] = self.store[:, indices, :, start : self.length]
