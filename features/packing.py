"""Captions are tokenized once, drawn into batches, and packed around the prefix they share.

A row of a packed batch is made of blocks, one per image: P prefix slots, the tokens of the image's prompt if there is one, then the
image's captions. A caption attends to prefix, prompt and itself; its positions start where these end. The last token of a caption is
predicted and never read, so it has no slot. Loss and gradients equal those of one padded row per caption.

C captions, N images, P prefix_length; R rows of L slots, I images and T predicted tokens in a batch.
"""

import bisect
import dataclasses
import heapq
import itertools

import numpy as np

SAMPLINGS = ("images", "captions")
BLOCKS_A_ROW = (1, 2, 3, 4, 5, 6, 8, 10)  # tried for every batch; the one that costs least is used
# In a GPT-2 layer of width E, attention over a row of L slots costs L / 6E of what the matrix products cost: here for E = 768.
ATTENTION_SLOTS = 6 * 768
SLOTS_TOGETHER = 16
TOKENIZED_TOGETHER = 10_000  # captions


@dataclasses.dataclass
class Tokens:
    """All captions of a data set as one flat array: caption c is ids[offsets[c] : offsets[c + 1]].

    Attributes:
        ids: int32, flat.
        offsets: int64 [C + 1].
        cut: how many captions were longer than allowed and lost their end.
        skip: int64 [C], tokens at the start of a caption that are read and never predicted; None for none.
    """

    ids: np.ndarray
    offsets: np.ndarray
    cut: int = 0
    skip: np.ndarray | None = None

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, caption):
        return self.ids[self.offsets[caption] : self.offsets[caption + 1]]

    @property
    def lengths(self):
        """Tokens of each caption: int64 [C]."""
        return np.diff(self.offsets)

    @property
    def predicted(self):
        """Tokens of each caption that are predicted: int64 [C]."""
        return self.lengths if self.skip is None else self.lengths - self.skip


def tokenize_captions(texts, tokenizer, end_token_id=None, max_tokens=None):
    """Tokenize captions into one flat array.

    Args:
        texts: sequence of str.
        tokenizer: of transformers.
        end_token_id: token that ends each caption, or None.
        max_tokens: longest caption kept whole, the end token included; a longer one loses its end (but not its end token) and is counted.

    Returns:
        Tokens.
    """
    end = [] if end_token_id is None else [end_token_id]
    flat, lengths = [], []
    # In blocks: lists of Python numbers take thirty times the memory of the array.
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        encoded = [ids + end for ids in _encode(list(texts[start : start + TOKENIZED_TOGETHER]), tokenizer)]
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        flat.append(np.fromiter(itertools.chain.from_iterable(encoded), np.int32, lengths[-1].sum()))
    offsets = np.zeros(len(texts) + 1, np.int64)
    flat = np.concatenate([np.zeros(0, np.int32), *flat])
    np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), out=offsets[1:])
    return shorten_captions(Tokens(flat, offsets), max_tokens, end_token_id)


def shorten_captions(tokens, max_tokens, end_token_id=None):
    """Cut captions to `max_tokens` (None: any length); a caption that is cut keeps the end token, where there is one, at its new end."""
    if max_tokens is None or not (tokens.lengths > max_tokens).any():
        return tokens
    shortened = cut_captions(tokens, max_tokens)
    if end_token_id is not None:
        shortened.ids[shortened.offsets[1:][tokens.lengths > max_tokens] - 1] = end_token_id
    return shortened


def _encode(texts, tokenizer):
    """Encode texts as lists of token ids, on all cores where the tokenizer has a backend that can.

    A special token that a caption spells out, such as <|endoftext|>, is encoded as the text it is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]  # without offsets: half the time
    finally:
        backend.encode_special_tokens = before


def published_length(lengths):
    """Return the length to which the published code cuts every caption: min(mean + 10 standard deviations, longest), in tokens."""
    deviation = lengths.std(ddof=1) if len(lengths) > 1 else 0.0
    return min(int(lengths.mean() + 10 * deviation), int(lengths.max()))


def cut_captions(tokens, max_tokens):
    """Cut every caption after `max_tokens` tokens. Returns Tokens."""
    lengths = np.minimum(tokens.lengths, max_tokens)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cut = tokens.cut + int((tokens.lengths > max_tokens).sum())
    skip = None if tokens.skip is None else np.minimum(tokens.skip, lengths)
    return Tokens(tokens.ids[_ranges(tokens.offsets[:-1], lengths)], offsets, cut, skip)


def plan_epoch(caption_rows, bs, sampling="images", seed=0, epoch=0, drop_last=False):
    """Draw the batches of one epoch. The result depends on seed and epoch alone.

    Args:
        caption_rows: int [C], the image row of each caption.
        bs: captions per batch.
        sampling: "captions" shuffles captions one by one, as published; "images" shuffles images and keeps an image's captions together (an
            image is split only where a batch ends).
        seed, epoch: of the draw.
        drop_last: leave out a last batch with fewer captions.

    Returns:
        List of int64 arrays of caption numbers.
    """
    caption_rows = np.asarray(caption_rows)
    draw = np.random.default_rng([seed, epoch])
    if sampling == "captions":
        order = draw.permutation(len(caption_rows))
    elif sampling == "images":
        place = np.empty(caption_rows.max() + 1, np.int64)
        images = np.unique(caption_rows)
        place[images] = draw.permutation(len(images))
        order = np.argsort(place[caption_rows], kind="stable")
    else:
        raise ValueError(f"sampling is {sampling!r}; expected one of {', '.join(SAMPLINGS)}")
    batches = [order[start : start + bs] for start in range(0, len(order), bs)]
    return batches[:-1] if drop_last and len(batches[-1]) < bs else batches


@dataclasses.dataclass
class PackedBatch:
    """One batch, laid out in rows. All tensors but clip_embedding are int64 and come from pack_captions.

    Attributes:
        image_rows: [I], rows of the feature file, one per block.
        input_ids: [R, L]; 0 where there is no token of a prompt or caption.
        position_ids: [R, L].
        block_ids: [R, L]; 0 is padding, blocks count from 1.
        caption_ids: [R, L]; 0 is prefix and prompt (or padding), captions count from 1.
        prefix_slots: [I * P], slots (r * L + l) that take the prefixes, in the order of image_rows.
        predict_slots: [T], slots whose output predicts.
        labels: [T], the tokens predicted there.
        clip_embedding: [I, D] float, filled in by the caller: embeddings[image_rows].
        packed: whether captions share rows; False gives each a row and a prefix of its own.
    """

    image_rows: object
    input_ids: object
    position_ids: object
    block_ids: object
    caption_ids: object
    prefix_slots: object
    predict_slots: object
    labels: object
    clip_embedding: object = None
    packed: bool = True

    def to(self, device):
        """Return the batch with every tensor on `device`."""
        return self._with_every_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self):
        """Return the batch in pinned memory, which a GPU copies from without the processor."""
        return self._with_every_tensor(lambda tensor: tensor.pin_memory())

    def _with_every_tensor(self, function):
        return dataclasses.replace(self, **{name: function(t) for name, t in vars(self).items() if hasattr(t, "to")})


def pack_captions(
    caption_numbers, tokens, caption_rows, prefix_length, ignore_index=None, blocks_a_row=BLOCKS_A_ROW, packed=True, prompts=None,
    row_slots=None,
):  # fmt: skip
    """Lay captions out in rows around the prefixes they share.

    Args:
        caption_numbers: int [n], the captions of this batch.
        tokens: Tokens of the whole set.
        caption_rows: int [C], the image row of each caption.
        prefix_length: P.
        ignore_index: a token that is read but never predicted (the published code ignores 0, which is "!").
        blocks_a_row: images per row to try.
        packed: False gives every caption a row and a prefix of its own, for language models that take no mask of packed rows.
        prompts: Tokens of what stands between prefix and captions, one per row of the features; read, never predicted.
        row_slots: fixed length of a row, whatever the batch. It doubles (and so on) where one image needs more; unpacked rows have the
            next multiple of SLOTS_TOGETHER. None: the shape that costs least.

    Returns:
        PackedBatch.
    """
    import torch

    caption_numbers = np.asarray(caption_numbers)
    image_rows, block_of = np.unique(np.asarray(caption_rows)[caption_numbers], return_inverse=True)
    if not packed:
        caption_numbers = caption_numbers[np.argsort(block_of, kind="stable")]
        image_rows, block_of, blocks_a_row = np.asarray(caption_rows)[caption_numbers], np.arange(len(caption_numbers)), (1,)
    by_block = np.argsort(block_of, kind="stable")
    caption_numbers, block_of = caption_numbers[by_block], block_of[by_block]
    lengths = tokens.offsets[caption_numbers + 1] - tokens.offsets[caption_numbers]
    reads = np.maximum(lengths - 1, 0)  # slots a caption takes: its last token is only predicted

    # What an image's captions share: its prefix, and its prompt.
    prompt_length = np.zeros(len(image_rows), np.int64) if prompts is None else prompts.lengths[image_rows]
    shared = prefix_length + prompt_length

    # Where each caption starts inside its block, and how long each block is.
    before = np.cumsum(reads) - reads
    first_of_block = np.searchsorted(block_of, np.arange(len(image_rows)))
    caption_start = shared[block_of] + before - before[first_of_block][block_of]
    block_length = shared + np.bincount(block_of, reads, len(image_rows)).astype(np.int64)

    if row_slots is None:
        layouts = [_fill_rows(block_length, -(-len(image_rows) // blocks)) for blocks in blocks_a_row]
        row_of_block, start_of_block, rows, slots = min(layouts, key=lambda layout: row_cost(*layout[2:]))
    else:
        row_of_block, start_of_block, rows, slots = _fill_rows_of(row_slots if packed else SLOTS_TOGETHER, block_length, packed)
    block_slot = row_of_block * slots + start_of_block  # the first slot of each block
    caption_slot = block_slot[block_of] + caption_start

    input_ids, position_ids, block_ids, caption_ids = np.zeros((4, rows * slots), np.int64)
    prefix_slots = _ranges(block_slot, np.full(len(image_rows), prefix_length))
    position_ids[prefix_slots] = np.tile(np.arange(prefix_length), len(image_rows))
    block_ids[_ranges(block_slot, block_length)] = np.repeat(np.arange(1, len(image_rows) + 1), block_length)
    if prompts is not None:
        prompt_slots = _ranges(block_slot + prefix_length, prompt_length)
        input_ids[prompt_slots] = prompts.ids[_ranges(prompts.offsets[image_rows], prompt_length)]
        position_ids[prompt_slots] = _ranges(np.full(len(image_rows), prefix_length), prompt_length)
    read_slots = _ranges(caption_slot, reads)
    input_ids[read_slots] = tokens.ids[_ranges(tokens.offsets[caption_numbers], reads)]
    position_ids[read_slots] = _ranges(shared[block_of], reads)
    caption_ids[read_slots] = np.repeat(np.arange(1, len(caption_numbers) + 1), reads)

    # The last shared slot predicts a caption's first token, each caption slot the token after its own.
    predict_slots = _ranges(caption_slot - 1, lengths)
    first = np.cumsum(lengths) - lengths
    predict_slots[first[lengths > 0]] = (block_slot + shared - 1)[block_of][lengths > 0]
    labels = tokens.ids[_ranges(tokens.offsets[caption_numbers], lengths)].astype(np.int64)
    if tokens.skip is not None:
        kept = _ranges(np.zeros_like(lengths), lengths) >= np.repeat(tokens.skip[caption_numbers], lengths)
        predict_slots, labels = predict_slots[kept], labels[kept]
    if ignore_index is not None:
        kept = labels != ignore_index
        predict_slots, labels = predict_slots[kept], labels[kept]

    grid = (array.reshape(rows, slots) for array in (input_ids, position_ids, block_ids, caption_ids))
    arrays = (image_rows, *grid, prefix_slots, predict_slots, labels)
    return PackedBatch(*(torch.from_numpy(array) for array in arrays), packed=packed)


def row_cost(rows, slots):
    """Return the cost of a batch of this shape, in slots of a short row."""
    return rows * slots * (1 + slots / ATTENTION_SLOTS)


def _fill_rows(block_length, rows):
    """Deal blocks out to rows, longest first, each to the emptiest row. Returns row and start of each block, rows, slots per row."""
    row_of_block = np.zeros(len(block_length), np.int64)
    start_of_block = np.zeros(len(block_length), np.int64)
    filled = [(0, row) for row in range(rows)]  # a heap of (slots taken, row)
    for block in np.argsort(-block_length, kind="stable"):
        taken, row = filled[0]
        row_of_block[block], start_of_block[block] = row, taken
        heapq.heapreplace(filled, (taken + int(block_length[block]), row))
    return row_of_block, start_of_block, rows, max(taken for taken, _ in filled)


def _fill_rows_of(row_slots, block_length, several):
    """Lay blocks out in rows of a multiple of `row_slots`, longest first, each where the least room is left. Returns as _fill_rows.

    several: whether a row may hold more than one block.
    """
    slots = -(-int(block_length.max()) // row_slots) * row_slots
    if not several:
        return np.arange(len(block_length)), np.zeros(len(block_length), np.int64), len(block_length), slots
    row_of_block = np.zeros(len(block_length), np.int64)
    start_of_block = np.zeros(len(block_length), np.int64)
    room, rows = [], 0  # (slots left, row) of each row, least first
    for block in np.argsort(-block_length, kind="stable"):
        length = int(block_length[block])
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            left, row, rows = slots, rows, rows + 1
        else:
            left, row = room.pop(place)
        row_of_block[block], start_of_block[block] = row, slots - left
        bisect.insort(room, (left - length, row))
    return row_of_block, start_of_block, rows, slots


def _ranges(starts, lengths):
    """Concatenate arange(start, start + length) over all pairs. Returns int64, flat."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)
