"""The captioner: a mapper (`clip_project`) in front of a causal language model (`gpt`).

B images, D embedding width, P prefix_length, E width of the language model, V vocabulary. A packed batch (features/packing.py) has
R rows of L slots, and T predicted tokens.
"""

import dataclasses
import re

import torch
from torch import nn

from models.loss import caption_loss, cross_entropy
from models.mappers import build_mapper
from models.texts import add_noise
from models.tuning import apply_tuning, rest_untrained

BASE_CAPTION, RETRIEVED_CAPTIONS = "{base}", "{retrieved}"  # places in a prompt


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a captioner's weights came from; the defaults describe a fresh one."""

    path: object = None  # Path of the checkpoint file
    kind: str | None = None  # one line on what the file was recognised as (models/published/recognise.py)
    held_language_model: bool = False  # whether the whole language model was in the file
    encoder: str | None = None  # name for load_encoder where the file itself holds the encoder


class ClipCaptionModel(nn.Module):
    """A mapper and a language model; parameters carry the published names (`clip_project.*`, `gpt.*`).

    Attributes:
        base_captioner: BaseCaptioner whose captions fill {base} in the prompt, or None. It is not part of the module: it is not trained,
            counted, moved, or in the state dict.
        datastore: features.datastore.Datastore whose captions fill {retrieved} in the prompt, or None. It is no part of the module either.
        memory: float32 [M, J], normalised embeddings of texts onto which those of pictures are projected (models/texts.py), or None.
        tower: the encoder's TextTower, where that projects pictures; loaded when it is first needed.
        origin: Origin of the weights.

    Args:
        config: CaptionConfig.
        gpt: a transformers causal language model.
        tokenizer: its tokenizer; not needed for training on token numbers.

    Raises:
        ValueError: the mapper cannot be built (see build_mapper), or the language model cannot be tuned as the config says.
    """

    def __init__(self, config, gpt, tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.gpt = gpt
        self.base_captioner = None
        self.datastore = self.memory = self.tower = None
        self.origin = Origin()
        width = gpt.get_input_embeddings().weight.shape[1]
        self.clip_project = build_mapper(config, width)
        apply_tuning(self)

    def train(self, mode=True):
        """Switch to training mode; parts without trained parameters stay in eval mode, without dropout."""
        super().train(mode)
        if mode:
            rest_untrained(self)
        return self

    @property
    def clip_device(self):
        """The device that embeddings go to."""
        return next(self.clip_project.parameters()).device

    @property
    def stop_token_id(self):
        """The token that ends a caption: the config's stop_token, else the tokenizer's end-of-text."""
        return stop_token_id(self.tokenizer, self.config.stop_token)

    def encode_prefix(self, clip_embedding):
        """Map embeddings to prefixes, normalising first when the config says so; training on texts adds noise.

        Args:
            clip_embedding: [B, D], or [B, L, D] with several vectors per image; any float dtype.

        Returns:
            [B, P, E] in the mapper's dtype.
        """
        clip_embedding = clip_embedding.to(next(self.clip_project.parameters()).dtype)
        if self.training and self.config.text_training:
            clip_embedding = add_noise(clip_embedding, self.config.text_training["noise_variance"])
        if self.config.normalize_prefix:
            norm = clip_embedding.norm(2, dim=-1, keepdim=True)
            if clip_embedding.dim() == 3:
                norm = norm.masked_fill(norm == 0, 1)  # a vector of zeros means "none here", and stays zero
            clip_embedding = clip_embedding / norm
        return self.clip_project(clip_embedding).view(len(clip_embedding), self.config.prefix_length, -1)

    def forward(self, batch, reduction="sum"):
        """Compute the cross-entropy of all predicted tokens of a batch, in nats.

        Args:
            batch: features.packing.PackedBatch with its clip_embedding [I, D] filled in. A batch laid out unpacked (one caption per row)
                goes through the whole language model with an ordinary 2-D mask, which every architecture accepts.
            reduction: "sum", or "none" for one value per predicted token.

        Returns:
            float32 scalar, or [T].
        """
        prefix = self.encode_prefix(batch.clip_embedding)  # [I, P, E]
        embeds = self.gpt.get_input_embeddings()(batch.input_ids)  # [R, L, E]
        rows, length, width = embeds.shape
        embeds = embeds.view(-1, width).index_copy(0, batch.prefix_slots, prefix.reshape(-1, width).to(embeds.dtype))  # [R · L, E]
        embeds = embeds.view(rows, length, width)  # [R, L, E]
        if batch.packed:
            hidden = self.gpt.base_model(
                inputs_embeds=embeds,
                attention_mask=packed_attention_mask(batch.block_ids, batch.caption_ids, embeds.dtype),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            hidden = hidden.view(-1, hidden.shape[-1])[batch.predict_slots]  # [T, E]
            return caption_loss(self.gpt.get_output_embeddings(), hidden, batch.labels, reduction)
        logits = self.gpt(inputs_embeds=embeds, attention_mask=(batch.block_ids > 0).long(), use_cache=False).logits  # [R, L, V]
        return cross_entropy(logits.view(rows * length, -1)[batch.predict_slots], batch.labels, reduction)


def packed_attention_mask(block_ids, caption_ids, dtype):
    """Build the additive mask of a packed batch: 0 where a slot may attend, the dtype's lowest number elsewhere.

    A slot sees, causally, the prefix of its own block (caption 0) and its own caption. Padding is a block of its own, so that every slot
    attends to something. The mask is additive because eager attention in transformers 5 adds a boolean mask as if it were numbers.

    Args:
        block_ids: [R, L] int.
        caption_ids: [R, L] int.
        dtype: of the embeddings.

    Returns:
        [R, 1, L, L].
    """
    same_block = block_ids[:, :, None] == block_ids[:, None, :]  # [R, L, L]
    seen = (caption_ids[:, None, :] == 0) | (caption_ids[:, :, None] == caption_ids[:, None, :])
    allowed = (same_block & seen).tril()
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]  # [R, 1, L, L]


def stop_token_id(tokenizer, stop_token=None):
    """Find the id of `stop_token` (text), or of the tokenizer's end-of-text token when it is None.

    Raises:
        ValueError: the text is not one token of the vocabulary, or there is no end-of-text token.
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
    """Return how many tokens a language model can read, prefix included; None where there is no limit."""
    positions = getattr(gpt.config, "max_position_embeddings", None)
    return positions if positions is not None else getattr(gpt.config, "max_seq_len", None)


def fill_prompt(prompt, base_caption="", retrieved=""):
    """Return the text between prefix and caption: the prompt with texts, stripped, in place of {base} and {retrieved}."""
    texts = {BASE_CAPTION: base_caption.strip(), RETRIEVED_CAPTIONS: retrieved.strip()}
    return re.sub("|".join(map(re.escape, texts)), lambda place: texts[place[0]], prompt)
