"""The data of a run: feature files read, joined and tokenized, and base captions for prompts."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

from common import UserError, replace_file
from training.device import map_together
from training.options import RETRIEVED

DECODED_TOGETHER = 32  # images


@dataclasses.dataclass(frozen=True)
class CaptionData:
    """A data set as the loop uses it."""

    features: object  # features.store.Features, one row per image
    tokens: object  # features.packing.Tokens of its captions
    caption_rows: object  # [C] int64, the row of each caption
    prefix_length: int  # P
    ignore_index: int | None = None  # a token left out of the loss
    packed: bool = True  # whether captions share rows and prefixes
    prompts: object = None  # features.packing.Tokens between prefix and caption, one per row of the features
    row_slots: int | None = None  # tokens of every row; None: each batch as it fits best

    def pack(self, numbers, **layout):
        """Lay captions out in a batch with the embeddings of their images.

        Args:
            numbers: [n] int, captions.
            layout: arguments of features.packing.pack_captions that replace the data's own.

        Returns:
            features.packing.PackedBatch
        """
        from features.packing import pack_captions

        own = {"packed": self.packed, "ignore_index": self.ignore_index, "prompts": self.prompts, "row_slots": self.row_slots}
        batch = pack_captions(numbers, self.tokens, self.caption_rows, self.prefix_length, **own | layout)
        return dataclasses.replace(batch, clip_embedding=self.features.clip_embedding[batch.image_rows].float())

    def laid_out(self, plan):
        """Return the same data with batches laid out as a training.batches.Plan says."""
        return dataclasses.replace(self, packed=plan.packed, row_slots=plan.row_slots)

    def name_captions(self, numbers):
        """Name a few captions by image_id and text, for messages."""
        shown = [self.features.captions[int(number)] for number in numbers[:5]]
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        return "; ".join(f"{caption['image_id']}: {caption['caption'].strip()[:60]!r}" for caption in shown) + more


def load_data(paths, is_rn, say):
    """Read and join feature files, and drop empty captions.

    Args:
        paths: list of str, feature files or folders of one encoder.
        is_rn: whether the embeddings must be 640 wide.
        say: function that prints a line.

    Returns:
        Features whose captions share one row per image.

    Raises:
        UserError: files do not fit one another or --is_rn, or no caption is left.
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


def load_validation_data(options, trained_on, say):
    """Read the --val_data files.

    Args:
        options: options of train.py.
        trained_on: Features of the training data.
        say: function that prints a line.

    Returns:
        Features; None without --val_data.

    Raises:
        UserError: they do not go together with the training data.
    """
    if not options.val_data:
        return None
    from features.content import check_compatible

    features = load_data(options.val_data, False, say)
    expected = trained_on.kind if features.kind.are_texts else trained_on.image_kind  # texts are validated on pictures or on texts
    check_compatible(features.kind, expected, options.val_data[0], options.data[0])
    return features


def tokenize_data(features, model, options, say, path, base_captions=None, retrieved=None):
    """Tokenize the captions, with the end-of-text token as last target where captions stop there.

    Args:
        features: Features.
        model: ClipCaptionModel with its tokenizer.
        options: options of train.py.
        say: function that prints a line.
        path: the (first) file of the features; the tokens of a large data set are kept beside it.
        base_captions: a text for each row of the features, which takes the place of {base} in --prompt.
        retrieved: likewise of {retrieved}.

    Returns:
        CaptionData

    Raises:
        UserError: the prompt leaves no room, or tokenizer and language model do not belong together.
    """
    from features.packing import cut_captions, published_length
    from features.tokens import tokenize_prompted, tokenize_with_cache
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
        none = [""] * len(features.clip_embedding)
        filled = [fill_prompt(model.config.prompt, *texts) for texts in zip(base_captions or none, retrieved or none)]
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


def attach_datastore(model, features, options, device):
    """Give a model the datastore of --datastore, by default the training data, and record it in its config.

    Args:
        model: ClipCaptionModel, whose datastore and config.retrieval are set.
        features: Features of the training data.
        options: options of train.py.
        device: where embeddings are compared.

    Raises:
        UserError: the datastore cannot be read, does not fit the data, or is too small.
    """
    from features.datastore import Datastore, open_datastore
    from models.encoders.text import load_projection

    count = options.retrieved_captions or RETRIEVED
    paths = options.datastore or options.data
    if options.datastore:
        model.datastore = open_datastore(paths, features.kind, count, "--data", functools.partial(load_projection, device=device))
    else:
        model.datastore = Datastore(features, paths[0], count)
    model.config.retrieval = {"captions": count, "datastore": [str(path) for path in paths], "digest": model.datastore.digest}


def file_digest(path):
    """Return a short digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def load_base_captioner(path, features, device):
    """Load the checkpoint that captions the images first.

    Returns:
        ClipCaptionModel in eval mode.

    Raises:
        UserError: it cannot be read, is of another width than the features, or is itself a prompted model.
    """
    from features.content import check_compatible, checkpoint_kind
    from models.checkpoints import load_checkpoint

    base = load_checkpoint(path, device=device)
    check_compatible(features.kind, checkpoint_kind(base.config), "--data", f"--base_checkpoint {path}")
    if base.config.prompt is not None:
        raise UserError(f"--base_checkpoint {path} is itself a prompted model. Take the one it stands on.")
    return base


def caption_with_base(base, base_digest, features, data_path, say):
    """Caption every row of the features by the base captioner, as prediction does too. The processes of a run share the rows.

    The captions are kept in {data}.base-{key}.jsonl beside the first data file, where `key` is of the features' content and the base
    checkpoint's. A second run reads them from there.

    Args:
        base: BaseCaptioner.
        base_digest: digest of its checkpoint file.
        features: Features.
        data_path: the first file of the features.
        say: function that prints a line.

    Returns:
        List of str, one per row.
    """
    from accelerate.state import PartialState
    from tqdm import tqdm

    key = hashlib.blake2b(f"{features.digest()} {base_digest}".encode(), digest_size=8).hexdigest()
    data_path = Path(data_path)
    path = data_path.with_name(f"{data_path.stem}.base-{key}.jsonl")
    count = len(features.clip_embedding)
    if path.exists():
        try:
            rows = [json.loads(line)["caption"] for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Remove it; the next run makes it again.") from error
        if len(rows) != count:
            raise UserError(f"{path} holds {len(rows)} captions; expected {count}. Remove it; the next run makes it again.")
        say(f"base captions read from {path}")
        return rows
    with tqdm(total=count, desc="base captions", unit=" images", disable=None, leave=False) as bar:

        def caption(start):
            embeddings = features.clip_embedding[start : start + DECODED_TOGETHER].float()
            bar.update(len(embeddings))
            return base.caption(embeddings.to(base.model.clip_device))

        captions = map_together(caption, range(0, count, DECODED_TOGETHER))
    if not PartialState().is_main_process:
        return captions
    with replace_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, text in enumerate(captions):
            file.write(json.dumps({"row": row, "caption": text}, ensure_ascii=False) + "\n")
    say(f"base captions of {count:,} images written to {path}")
    return captions
