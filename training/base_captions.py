"""The first stage of a prompted run: a base model's caption of every image, decoded once and kept beside the features."""

import hashlib
import json
from pathlib import Path

from common import UserError, replace_file

BATCH = 32  # images decoded at once


def load_base_model(path, features, device):
    """Load the checkpoint that captions the images first → ClipCaptionModel in eval mode. Raises UserError when it does not fit."""
    from models.checkpoints import load_checkpoint

    base = load_checkpoint(path, device=device)
    width, encoder = features.clip_embedding.shape[-1], features.meta.get("encoder")
    if base.config.clip_width != width:
        raise UserError(
            f"--base_checkpoint {path} wants {base.config.clip_width}-wide embeddings ({base.config.encoder}); the data holds {width} "
            f"({encoder}). Take a base of the data's encoder."
        )
    if base.config.prompt is not None:
        raise UserError(f"--base_checkpoint {path} is itself a prompted model. Take the one it stands on.")
    return base


def digest_of(path):
    """A short name for a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def base_captions(base, base_digest, features, data_path, say):
    """The base model's caption of every row of the features, as prediction too will have it → list of str.

    They are read from, or written to, {data}.base-{key}.jsonl beside the first data file; the key is of the features' content and
    the base checkpoint's.
    """
    from tqdm import tqdm

    from models.base_captioner import BaseCaptioner

    key = hashlib.blake2b(f"{features.digest()} {base_digest}".encode(), digest_size=8).hexdigest()
    data_path = Path(data_path)
    path = data_path.with_name(f"{data_path.stem}.base-{key}.jsonl")
    count = len(features.clip_embedding)
    if path.exists():
        try:
            rows = [json.loads(line)["caption"] for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Remove it; it will be made again.") from error
        if len(rows) != count:
            raise UserError(f"{path} holds {len(rows)} captions; expected {count}. Remove it; it will be made again.")
        say(f"base captions read from {path}")
        return rows
    captioner, captions = BaseCaptioner(base), []
    for start in tqdm(range(0, count, BATCH), desc="base captions", unit="batch", disable=None, leave=False):
        captions += captioner.caption(features.clip_embedding[start : start + BATCH].float().to(base.clip_device))
    with replace_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, text in enumerate(captions):
            file.write(json.dumps({"row": row, "caption": text}, ensure_ascii=False) + "\n")
    say(f"base captions of {count:,} images written to {path}")
    return captions
