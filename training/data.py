"""What a run learns from: feature files read, joined and tokenised."""

import dataclasses
import os
from pathlib import Path

from common import UserError


@dataclasses.dataclass
class CaptionData:
    """A data set as the loop uses it."""

    features: object  # features.store.Features, one row an image
    tokens: object  # features.packing.Tokens of its captions
    caption_rows: object  # int64 [C], the row of each caption
    prefix_length: int  # P
    ignore_index: int | None = None  # a token left out of the loss
    packed: bool = True  # whether captions share rows and prefixes
    prompts: object = None  # features.packing.Tokens between prefix and caption, one a row of the features
    row_slots: int | None = None  # slots of every row; None: as each batch fits best

    def pack(self, numbers, **layout):
        """Lay these captions out in a batch, with the embeddings of their images → features.packing.PackedBatch."""
        from features.packing import pack_captions

        own = {"packed": self.packed, "ignore_index": self.ignore_index, "prompts": self.prompts, "row_slots": self.row_slots}
        batch = pack_captions(numbers, self.tokens, self.caption_rows, self.prefix_length, **own | layout)
        batch.clip_embedding = self.features.clip_embedding[batch.image_rows].float()
        return batch

    def name_captions(self, numbers):
        """A few captions by image_id and text, for messages."""
        shown = [self.features.captions[int(number)] for number in numbers[:5]]
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        return "; ".join(f"{caption['image_id']}: {caption['caption'].strip()[:60]!r}" for caption in shown) + more


def load_data(paths, is_rn, say):
    """Read and join feature files, leave empty captions out → Features whose captions share a row an image.

    Raises UserError when files do not fit one another, when --is_rn does not fit them, or when no caption is left.
    """
    from features.store import drop_empty_captions, group_by_image, join_features, load_features

    features = join_features([group_by_image(load_features(path)) for path in paths], paths)
    if is_rn and features.width != 640:
        raise UserError(f"--is_rn expects 640-wide embeddings (RN50x4); {paths[0]} holds {features.width}. Leave --is_rn out.")
    features, dropped = drop_empty_captions(features)
    if dropped:
        say(f"{dropped:,} empty captions left out")
    if not len(features.captions):
        raise UserError(f"{paths[0]} holds empty captions only: nothing to learn from.")
    return features


def load_validation_data(paths, trained_on, options, say):
    """Read the --val_data files → Features. Raises UserError when they are of another encoder than the training data."""
    features = load_data(paths, False, say)
    ours, theirs = trained_on.meta.get("encoder"), features.meta.get("encoder")
    if features.width != trained_on.width or (ours and theirs and ours != theirs):
        raise UserError(
            f"{paths[0]} holds {features.width}-wide embeddings ({theirs}); {options.data[0]} holds {trained_on.width} ({ours}). "
            f"Parse the validation pictures with the encoder of the training data."
        )
    return features


def tokenize_data(features, model, options, say, path, base_captions=None):
    """Tokenise the captions, with the end-of-text token as last target where captions stop there → CaptionData.

    path: the (first) file of the features, beside which the tokens of a large data set are kept;
    base_captions: a text for each row of the features, which takes the place of {base} in --prompt.
    """
    from features.packing import cut_captions, published_length
    from features.prompts import tokenize_prompted
    from features.token_cache import tokenize_with_cache
    from models.captioner import fill_prompt, position_count

    tokenizer = model.tokenizer
    stops_at_end = options.stop_token is None or options.stop_token == tokenizer.eos_token
    positions = position_count(model.gpt)
    room = None if positions is None else positions - options.prefix_length
    end_token_id = tokenizer.eos_token_id if stops_at_end else None
    texts = features.texts
    cache, writes = Path(path).with_name(Path(path).name + ".tokens.npz"), os.environ.get("RANK", "0") == "0"
    prompts = None
    if model.config.prompt is not None:
        filled = [fill_prompt(model.config.prompt, base) for base in base_captions or [""] * len(features.clip_embedding)]
        tokens, prompts = tokenize_prompted(texts, filled, features.caption_rows, tokenizer, end_token_id, room)
        if options.cut_captions:
            tokens = cut_captions(tokens, published_length(tokens.lengths))
    elif options.cut_captions:
        tokens = tokenize_with_cache(texts, tokenizer, end_token_id, None, cache, writes)
        longest = published_length(tokens.lengths)
        tokens = cut_captions(tokens, longest if room is None else min(longest, room))
    else:
        tokens = tokenize_with_cache(texts, tokenizer, end_token_id, room, cache, writes)
    table = model.gpt.get_input_embeddings().weight.shape[0]
    largest = max((part.ids.max() for part in (tokens, prompts) if part is not None and len(part.ids)), default=0)
    if largest >= table:
        raise UserError(f"the tokenizer gives token {largest}; the language model knows {table}. They do not belong together.")
    if tokens.cut:
        say(f"{tokens.cut:,} of {len(tokens):,} captions cut to {tokens.lengths.max()} tokens")
    return CaptionData(features, tokens, features.caption_rows, options.prefix_length, options.ignore_index, prompts=prompts)
