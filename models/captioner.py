"""The captioner: a mapper (`clip_project`) in front of a causal language model (`gpt`).

B images, D embedding width, P prefix_length, E language-model width, V vocabulary; R rows of L slots and T predicted tokens in a
packed batch (features/packing.py).
"""

import torch
from huggingface_hub import ModelHubMixin
from torch import nn

from models.loss import caption_loss, cross_entropy
from models.mappers import build_mapper
from models.tuning import apply_tuning, rest_untrained


class ClipCaptionModel(nn.Module, ModelHubMixin, library_name="prefixcap", pipeline_tag="image-to-text", tags=["prefixcap", "clipcap"]):
    """A mapper and a language model; parameters carry the published names (`clip_project.*`, `gpt.*`).

    `from_pretrained`, `save_pretrained` and `push_to_hub` are huggingface_hub's; models/hub.py says what they read and write.
    `base_model` is the captioner whose captions the prompt quotes, or None; it is no part of the parameters or the state dict.

    config: CaptionConfig; gpt: a transformers causal language model; tokenizer: its tokenizer.
    Raises ValueError when the mapper cannot be built (see build_mapper).
    """

    def __init__(self, config, gpt, tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.gpt = gpt
        self.base_model = None  # the ClipCaptionModel whose captions fill {base} in the prompt
        self.read_from, self.read_whole = None, False  # its checkpoint, and whether the language model's weights came from there too
        self.encoder_source = None  # where load_encoder finds the encoder, when the checkpoint file itself holds it
        self.recognised_as = None  # what its file was taken for, in words (models/published/recognise.py)
        width = gpt.get_input_embeddings().weight.shape[1]
        self.clip_project = build_mapper(config, width)
        apply_tuning(self)

    def train(self, mode=True):
        """Switch to training; what has no trained parameters stays in eval mode, without dropout."""
        super().train(mode)
        if mode:
            rest_untrained(self)
        return self

    def __setattr__(self, name, value):
        """As torch's, but a base captioner is kept apart from the modules: not trained, not counted, not in the state dict."""
        if name == "base_model":
            self.__dict__[name] = value if value is None else value.eval()
        else:
            super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        if self.base_model is not None:  # it moves with the model
            self.base_model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_pretrained(self, save_directory):
        from models.hub import write_pretrained

        write_pretrained(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        from models.hub import read_pretrained

        return read_pretrained(model_id, **options)

    @property
    def clip_device(self):
        """The device embeddings go to."""
        return next(self.clip_project.parameters()).device

    @property
    def stop_token_id(self):
        """The token at which a caption ends: the config's stop_token, else the tokenizer's end-of-text."""
        return stop_token_id(self.tokenizer, self.config.stop_token)

    def encode_prefix(self, clip_embedding):
        """Map embeddings to prefixes, normalising first when the config says so.

        clip_embedding: [B, D] (or [B, L, D], several an image), any float dtype → [B, P, E] in the mapper's dtype.
        """
        clip_embedding = clip_embedding.to(next(self.clip_project.parameters()).dtype)
        if self.config.normalize_prefix:
            norm = clip_embedding.norm(2, dim=-1, keepdim=True)
            if clip_embedding.dim() == 3:
                norm = norm.masked_fill(norm == 0, 1)  # zeros mean "no vector here", and stay zeros
            clip_embedding = clip_embedding / norm
        return self.clip_project(clip_embedding).view(len(clip_embedding), self.config.prefix_length, -1)

    def forward(self, batch, reduction="sum"):
        """Cross-entropy of all predicted tokens of a packed batch, in nats: their sum, a float32 scalar; with reduction "none" [T].

        batch: features.packing.PackedBatch with its clip_embedding [I, D] filled in. A batch laid out unpacked (one caption a row)
        goes through the whole language model with an ordinary 2-D mask, as any of them takes.
        """
        prefix = self.encode_prefix(batch.clip_embedding)  # [I, P, E]
        embeds = self.gpt.get_input_embeddings()(batch.input_ids)  # [R, L, E]
        rows, length, width = embeds.shape
        embeds = embeds.view(-1, width).index_copy(0, batch.prefix_slots, prefix.reshape(-1, width).to(embeds.dtype))
        embeds = embeds.view(rows, length, width)
        if batch.packed:
            hidden = self.gpt.base_model(
                inputs_embeds=embeds,
                attention_mask=packed_attention_mask(batch.block_ids, batch.caption_ids, embeds.dtype),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            hidden = hidden.view(-1, hidden.shape[-1])[batch.predict_slots]  # [T, E]
            return caption_loss(self.gpt.get_output_embeddings(), hidden, batch.labels, reduction)
        logits = self.gpt(inputs_embeds=embeds, attention_mask=(batch.block_ids > 0).long(), use_cache=False).logits
        return cross_entropy(logits.view(rows * length, -1)[batch.predict_slots], batch.labels, reduction)


def packed_attention_mask(block_ids, caption_ids, dtype):
    """Additive mask of a packed batch: 0 where a slot may attend, the dtype's lowest number where not.

    block_ids, caption_ids: [R, L] int → [R, 1, L, L]. A slot sees, causally, the prefix of its own block (caption 0) and its own
    caption. Padding is a block of its own, so that no slot is left without anything to attend to. Additive because eager
    attention in transformers 5 adds a boolean mask as if it were numbers.
    """
    same_block = block_ids[:, :, None] == block_ids[:, None, :]
    seen = (caption_ids[:, None, :] == 0) | (caption_ids[:, :, None] == caption_ids[:, None, :])
    allowed = (same_block & seen).tril()  # [R, L, L]
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


def stop_token_id(tokenizer, stop_token=None):
    """The id of `stop_token` (text), or of the tokenizer's end-of-text token when it is None.

    Raises ValueError when the text is not one token of the vocabulary, and when there is neither.
    """
    if stop_token is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer of this language model has no end-of-text token; give a stop token, such as '.'")
        return tokenizer.eos_token_id
    ids = tokenizer.encode(stop_token, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"stop token {stop_token!r} is {len(ids)} tokens of this language model; expected one, such as '.'")
    return ids[0]


def position_count(gpt):
    """How many tokens a language model reads at most, prefix included; None where there is no limit."""
    positions = getattr(gpt.config, "max_position_embeddings", None)
    return positions if positions is not None else getattr(gpt.config, "max_seq_len", None)


def fill_prompt(prompt, base_caption=""):
    """The text between prefix and caption: a prompt with the base model's caption, stripped, in place of {base}."""
    return prompt.replace("{base}", base_caption.strip())
