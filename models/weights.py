"""Where weights come from: data/weights/ first, then the library's own cache, then the hub.

A site without a network puts files under data/weights/ (see data/README.md) and never waits for a hub.
"""

import os
from pathlib import Path

from common import UserError

PROBE_SECONDS = 4  # an unreachable hub otherwise costs the library most of a minute a name


def weights_folder():
    """The folder looked in first: data/weights under the working directory."""
    return Path("data/weights")


def find_weights(*names):
    """Return the first of `names` that exists, as a path or under data/weights/; None when none does."""
    for name in names:
        for path in (weights_folder() / name, Path(name)):
            if path.exists():
                return path
    return None


def hub_is_reachable(address):
    """Tell within a few seconds whether `address` answers at all, through the user's proxy if one is set."""
    import httpx

    try:
        httpx.head(address, timeout=PROBE_SECONDS, follow_redirects=False)
    except httpx.HTTPError:
        return False
    return True


def _from_library(load, name, what):
    """Call load(source, local_files_only=…) on the folder, the cache, then the hub. Raises UserError when none has `name`."""
    from huggingface_hub import constants

    folder = find_weights(name)
    if folder is not None and folder.is_dir():
        try:
            return load(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no {what} that transformers reads: {error}. Expected what save_pretrained writes.") from error
    if folder is not None:
        raise UserError(f"{folder} is a file; expected the folder of a {what} (config.json, model.safetensors, tokenizer files).")
    try:
        return load(name, local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache: ask the hub
    if not os.environ.get("HF_HUB_OFFLINE") and hub_is_reachable(constants.ENDPOINT):
        try:
            return load(name, local_files_only=False)
        except (OSError, ValueError) as error:
            reason = f"the hub answered: {str(error).splitlines()[0]}"
    else:
        reason = "the hub cannot be reached"
    raise UserError(
        f"no {what} named {name}: looked in {weights_folder() / name}, in the library's cache, and {reason}. "
        f"Download config.json, model.safetensors, vocab.json and merges.txt from {constants.ENDPOINT}/{name} "
        f"into {weights_folder() / name}/."
    )


def load_language_model(name):
    """Load a causal language model by name or folder, float32, on the CPU, attention through SDPA.

    → the model in eval mode. Raises UserError saying where it looked and what to download.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would cut through the script's own lines

    def load(source, local_files_only):
        return AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local_files_only, dtype=torch.float32, attn_implementation="sdpa"
        )

    return _from_library(load, name, "language model")


def load_tokenizer(name):
    """Load the tokenizer of a language model by name or folder. Raises UserError as load_language_model does."""
    from transformers import AutoTokenizer

    def load(source, local_files_only):
        return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)

    return _from_library(load, name, "tokenizer")


def load_language_model_config(name):
    """Load the config of a language model by name or folder. Raises UserError as load_language_model does."""
    from transformers import AutoConfig

    def load(source, local_files_only):
        return AutoConfig.from_pretrained(source, local_files_only=local_files_only)

    return _from_library(load, name, "language model's config")
