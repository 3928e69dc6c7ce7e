"""Where weights come from: data/weights/ first, then the library's own cache, then the hub.

A site without a network puts files under data/weights/ (see data/README.md) and never waits for a hub.
"""

import copy
import functools
import os
import sys
import warnings
from pathlib import Path

from common import UserError

# The hub's full names of models known by a short one.
HUB_NAMES = {"distilgpt2": "distilbert/distilgpt2"}
HUB_NAMES |= {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
# Fields of a language model's config that this program decides.
NOT_PASSED = ("model_type", "transformers_version", "dtype", "torch_dtype", "attn_implementation", "quantization_config", "auto_map")
MOST_UNSAVED = 2**26  # numbers that a small language model may hold beside its weights: masks of GPT-Neo's length
PROBE_SECONDS = 4  # the library itself waits most of a minute per name for an unreachable hub
LANGUAGE_MODEL_FILES = "config.json, model.safetensors and the tokenizer's files (vocab.json and merges.txt, or tokenizer.json)"


def weights_folder():
    """Return the folder that is searched first: data/weights under the working directory."""
    return Path("data/weights")


def find_weights(*names):
    """Return the first of `names` that exists, as a path or under data/weights/; None when none does."""
    for name in names:
        for path in (weights_folder() / name, Path(name)):
            if path.exists():
                return path
    return None


def hub_is_reachable(address):
    """Tell within a few seconds whether `address` answers, through the user's proxy if one is set."""
    import httpx2

    try:
        httpx2.head(address, timeout=PROBE_SECONDS, follow_redirects=False)
    except httpx2.HTTPError:
        return False
    return True


def first_line(error, most=160):
    """Return the beginning of an error's text for a message of one line; its type where the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def pick_file(found, names):
    """Return `found` itself, or the first of `names` in the folder `found`. Raises UserError when there is none."""
    for path in (found, *(found / name for name in names)):
        if path.is_file():
            return path
    raise UserError(f"{found} holds {'neither ' if len(names) > 1 else 'no '}{' nor '.join(names)}. Put the published weights there.")


def refuse_oversized(build, size):
    """Build a model without memory first, and refuse one that is larger than its weight files can fill.

    Args:
        build: function that builds the model; called on torch's meta device.
        size: of the weight files, in bytes. Each number takes at least one.

    Returns:
        The model without memory.

    Raises:
        ValueError: the model has more parameters than the files have bytes.
    """
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that loading weights does nothing there
        model = build()
    numbers, size = sum(tensor.numel() for tensor in model.parameters()), max(size, 2**20)
    # Buffers, such as GPT-Neo's masks of attention, need not be in the file.
    if numbers > size or sum(tensor.numel() for tensor in model.buffers()) > 16 * size:
        raise ValueError(f"a model of {numbers:,} numbers for {size:,} bytes of weights")
    return model


def hub_file(repository, names, what, place):
    """Find the first of `names` in a repository of the hub, in the library's cache or by download.

    Args:
        repository: name on the hub.
        names: names of files, in order of preference.
        what: the model's name, for the message.
        place: folder where a user may put the file, for the message.

    Returns:
        Path of the file.

    Raises:
        UserError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    reason = "the hub cannot be reached"
    if not constants.HF_HUB_OFFLINE and hub_is_reachable(constants.ENDPOINT):
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except (OSError, RuntimeError, ValueError) as error:
                reason = f"the download failed ({first_line(error)})"
    raise UserError(
        f"no weights of {what}: looked in {place} and the hub's cache, and {reason}. "
        f"Download {constants.ENDPOINT}/{repository}/resolve/main/{names[0]} and put it at {place / names[0]}."
    )


def load_from_library(load, name, what, files=LANGUAGE_MODEL_FILES):
    """Call load(source, local_files_only=...) on the folder `name`, then for the cache, then for the hub.

    Args:
        load: function that loads a model or tokenizer.
        name: name on the hub, or path of a folder.
        what: kind of thing, for the message.
        files: what to download, for the message.

    Returns:
        What `load` returns.

    Raises:
        UserError: none of the places has `name`; it comes with code of its own; or `load` raised it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    load = _without_code(load, what)
    name = os.path.expanduser(name)
    is_path = name.startswith((".", "/"))
    folder = Path(name) if is_path and Path(name).exists() else find_weights(name)
    if folder is not None and folder.is_dir():
        try:
            return load(str(folder), local_files_only=True)
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises Exception itself
            raise UserError(
                f"{folder} holds no {what} that transformers reads: {first_line(error, 300)}. Expected what save_pretrained writes."
            ) from error
    if folder is not None:
        raise UserError(f"{folder} is a file; expected the folder of a {what} ({files}).")
    if is_path or name.count("/") > 1:  # a name on the hub is OWNER/NAME at most
        raise UserError(f"no folder {Path(name).absolute()}; expected the folder of a {what} ({files}). Check the path.")
    try:
        return load(name, local_files_only=True)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError, StrictDataclassError):
        pass  # not in the cache, or damaged there: ask the hub
    if not os.environ.get("HF_HUB_OFFLINE") and hub_is_reachable(constants.ENDPOINT):
        try:
            return load(name, local_files_only=False)
        except UserError:
            raise
        except (OSError, ValueError, StrictDataclassError) as error:
            reason = f"the hub answered: {first_line(error)}"
    else:
        reason = "the hub cannot be reached"
    raise UserError(
        f"no {what} named {name}: looked in {weights_folder() / name}, in the library's cache, and {reason}. "
        f"Download {files} from {constants.ENDPOINT}/{HUB_NAMES.get(name, name)} into {weights_folder() / name}/, "
        "or give the path of a folder that holds them."
    )


def _without_code(load, what):
    """Wrap the function that load_from_library calls: transformers' refusal to run a stranger's code becomes one line of ours."""

    def wrapped(source, local_files_only):
        try:
            return load(source, local_files_only=local_files_only)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(f"{source} is a {what} with code of its own, which is never run. Take one that transformers knows.") from error

    return wrapped


def load_language_model(name):
    """Load a causal language model by name or folder, on the CPU, in float32 and eval mode, with SDPA attention where it has that.

    Raises:
        UserError: says which places were searched and what to download.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would interrupt the script's own lines

    def load(source, local_files_only):
        settings = {"local_files_only": local_files_only, "trust_remote_code": False, "dtype": torch.float32}
        try:
            return AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", **settings)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", **settings)

    return load_from_library(load, name, "language model")


def load_tokenizer(name):
    """Load the tokenizer of a language model by name or folder. Raises UserError as load_language_model does."""
    from transformers import AutoTokenizer

    return load_from_library(functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=False), name, "tokenizer")


def load_language_model_config(name):
    """Load the config of a language model by name or folder. Raises UserError as load_language_model does."""
    from transformers import AutoConfig

    return load_from_library(functools.partial(AutoConfig.from_pretrained, trust_remote_code=False), name, "language model's config")


def build_language_model(gpt_config, size=None):
    """Make a causal language model from its config as a dict. Its weights are not initialised: load them next.

    Args:
        gpt_config: the config, which may come from a stranger.
        size: of the weights to load, in bytes; None makes a model without memory.

    Raises:
        UserError: transformers makes no model of it, or one that is larger than the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {name: value for name, value in gpt_config.items() if name not in NOT_PASSED and not name.startswith("_")}

    def build():
        config = AutoConfig.for_model(gpt_config["model_type"], **copy.deepcopy(fields))
        settings = {"dtype": torch.float32, "trust_remote_code": False}
        with no_init_weights():  # drawing 124M numbers takes seconds
            try:
                return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **settings)
            except ValueError:  # a language model without SDPA
                return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **settings)

    try:
        gpt = refuse_oversized(build, sys.maxsize if size is None else max(size, MOST_UNSAVED))
        if size is not None:
            gpt = build()
    except Exception as error:  # the config's class and the model's raise whatever a wrong value leads to
        raise UserError(f"gpt_config describes no language model that fits the weights: {first_line(error, 300)}") from error
    gpt.tie_weights()
    return gpt
