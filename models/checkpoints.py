"""Checkpoints: bare state dicts under the published names, with a readable config beside them.

`{prefix}-{epoch:03d}.pt`, `{prefix}_latest.pt`, `{prefix}_best.pt` hold weights, `{prefix}.json` everything that rebuilds the model and
says how it was made. A frozen language model is left out unless asked for. A published file has no config: it is recognised from
its names and shapes.
"""

import dataclasses
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch

from common import UserError, replace_file

from .captioner import CaptionConfig, ClipCaptionModel
from .tuning import beneath_adapters, is_adapter, kept_names, merged_state, output_names, untie_output
from .weights import find_weights, load_language_model, load_tokenizer

# What torch and zipfile raise on a damaged file.
DAMAGED = (
    RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, OSError, AssertionError,
    zipfile.BadZipFile, struct.error,
)  # fmt: skip
# transformers once kept its causal mask and a constant as buffers of every GPT-2 layer, and wrote them into state dicts.
OLD_BUFFERS = re.compile(r"gpt\.transformer\.h\.\d+\.attn\.(bias|masked_bias)$")
BASE = "original_model."  # the published name of the model whose captions a prompted one reads
RUN_SUFFIX = re.compile(r"(-\d{3,}|_latest|_best)$")
# GPT-2's number of heads is not in its shapes; these widths settle it (distilgpt2 and gpt2, -medium, -large, -xl).
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
GPT2_NAMES = {(768, 6): "distilgpt2", (768, 12): "gpt2", (1024, 24): "gpt2-medium", (1280, 36): "gpt2-large", (1600, 48): "gpt2-xl"}
ENCODER_OF_WIDTH = {512: "ViT-B/32", 640: "RN50x4", 576: "tinyvit"}


def config_path(checkpoint):
    """Where the config of a checkpoint file stands: coco_prefix-009.pt → coco_prefix.json."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(RUN_SUFFIX.sub("", checkpoint.stem) + ".json")


def trained_state(model, full=False):
    """The state dict a checkpoint holds: mapper and what else was trained, or all of it with `full` (adapters merged in)."""
    if full:
        state = merged_state(model)
    else:
        kept = kept_names(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name in kept}
    if model.base_model is not None:
        of_base = trained_state(model.base_model, full=model.base_model.read_whole)
        state |= {f"{BASE}{name}": tensor for name, tensor in of_base.items()}
    return state


def save_tensors(content, path):
    """torch.save under a temporary name, then rename. Equal content gives equal bytes, whatever the file's name."""
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # On a full disk torch's writer first fails with the reason, then trips over its own end.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def save_checkpoint(model, path, full=False):
    """Write a model's weights as a bare state dict. full: with the language model, even where it is frozen."""
    save_tensors({name: tensor.detach().cpu() for name, tensor in trained_state(model, full).items()}, path)


def remove_old_checkpoints(out_dir, run_name, keep_last):
    """Remove numbered checkpoints of a run but the latest `keep_last`; None keeps all."""
    if keep_last is None:
        return
    numbered = re.compile(re.escape(run_name) + r"-\d{3,}\.pt")
    found = [path for path in Path(out_dir).iterdir() if numbered.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))[:-keep_last]:
        path.unlink()


def save_config(config, made_by, path):
    """Write `{prefix}.json`: "model" rebuilds the captioner; "made_by" says how it came to be (arguments, versions, seed, data)."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps({"model": dataclasses.asdict(config), "made_by": made_by}, indent=2) + "\n", encoding="utf-8")


def read_config(path):
    """Read the "model" part of a `{prefix}.json` → CaptionConfig. Raises UserError when it is not one."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
        return CaptionConfig(**fields)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a config this version reads ({reason}). Take the one train.py wrote.") from error


def read_tensors(path):
    """Read a file of tensors and plain containers; nothing in it is run. Raises UserError when it is missing, damaged or wants code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}. Give the path of a .pt file, such as one that train.py wrote.")
    try:
        refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"asks for {wanted.group(1)}" if wanted else "is damaged, or holds more than tensors"
        raise UserError(f"{path} {found}; expected a state dict of tensors. Nothing in it was run.") from error
    except DAMAGED as error:
        reason = (str(error).splitlines() or ["ends early"])[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}). Copy or download it again.") from error


def refuse_compressed(path):
    """Raise UserError when a zip's members are compressed: torch stores them plainly, and a small bomb could fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > os.path.getsize(path):
                raise UserError(f"{path} holds compressed data ({member.filename}), which torch never writes: refused.")


def read_state_dict(path):
    """Read a checkpoint's state dict, without the buffers of old transformers. Raises UserError when it is something else."""
    state = read_tensors(path)
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is not a checkpoint: expected a state dict of tensors (names clip_project.* and gpt.*).")
    return {name: tensor for name, tensor in state.items() if not OLD_BUFFERS.match(name)}


def infer_config(state, path):
    """Recognise a published state dict from its names and shapes → CaptionConfig.

    Published weights stop at "." and take ViT-B/32 (512 wide) or RN50x4 (640) features; the 640-wide transformer was trained on
    normalised ones. Raises UserError when the shapes fit none.
    """
    token_table = state.get("gpt.transformer.wte.weight")
    if token_table is None:
        raise UserError(
            f"{path} has no config beside it ({config_path(path).name}) and no gpt.* weights to recognise it by. "
            f"Put the .json that train.py wrote beside it, or train with --save_full."
        )
    width = token_table.shape[1]
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("gpt.transformer.h."))
    if width not in GPT2_HEADS:
        raise UserError(f"{path} holds a GPT-2 {width} wide, whose number of heads cannot be known. Put its .json config beside it.")
    if "clip_project.prefix_const" in state:
        clip_width = state["clip_project.linear.weight"].shape[1]
        mapper = {
            "mapping_type": "transformer",
            "prefix_length": len(state["clip_project.prefix_const"]),
            "clip_length": state["clip_project.linear.weight"].shape[0] // width,
            "num_layers": len({name.split(".")[3] for name in state if name.startswith("clip_project.transformer.layers.")}),
            "normalize_prefix": clip_width == 640,
        }
    elif "clip_project.model.2.weight" in state:
        clip_width = state["clip_project.model.0.weight"].shape[1]
        mapper = {"mapping_type": "mlp", "prefix_length": state["clip_project.model.2.weight"].shape[0] // width}
    elif "clip_project.weight" in state:
        clip_width = state["clip_project.weight"].shape[1]
        mapper = {"mapping_type": "linear", "prefix_length": state["clip_project.weight"].shape[0] // width}
    else:
        raise UserError(f"{path} has no mapper this version knows; found {', '.join(sorted(state)[:3])}, …; expected clip_project.*.")
    gpt_config = {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": GPT2_HEADS[width],
        "vocab_size": len(token_table),
        "n_positions": len(state["gpt.transformer.wpe.weight"]),
    }
    return CaptionConfig(
        encoder=ENCODER_OF_WIDTH.get(clip_width),
        clip_width=clip_width,
        gpt2_type=GPT2_NAMES.get((width, layers), "gpt2"),
        gpt_config=gpt_config,
        stop_token=".",
        **mapper,
    )


def load_state(model, state, path, complete=False):
    """Load a state dict into a captioner; what its tuning does not train may be absent from it.

    complete: what its tuning trains must be there; else the language model may be absent altogether, as from a mapper to start with.
    Raises UserError listing every missing, unexpected and misshapen key.
    """
    if model.config.tune != "lora" and any(is_adapter(name) for name in state):
        raise UserError(f"{path} holds adapters. Train with --tune lora, or start from a file written with --save_full, which merges them.")
    table_name, head_name = (f"gpt.{name}" for name in output_names(model.gpt))
    head, table = state.get(head_name), state.get(table_name)
    if head is not None and table is not None and head.shape == table.shape and not torch.equal(head, table):
        # An output layer trained apart from the token table would be overwritten by it while the two are tied.
        untie_output(model.gpt, head)
    state = beneath_adapters(model, state)
    own = model.state_dict()
    of_gpt = {name for name in state if name.startswith("gpt.")}
    if of_gpt <= kept_names(model) and model.config.tune != "full":
        expected = {name for name in kept_names(model) if of_gpt or complete or not name.startswith("gpt.")}
    else:
        expected = {name for name in own if of_gpt or not name.startswith("gpt.")}
        expected = {name for name in expected if not is_adapter(name) or name in state}
    if head_name not in state and model.gpt.config.tie_word_embeddings:
        expected.discard(head_name)
    faults = [f"missing {name}" for name in sorted(expected - set(state))]
    faults += [f"unexpected {name}" for name in sorted(set(state) - set(own))]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(expected & set(state))
        if state[name].shape != own[name].shape
    ]
    if faults:
        raise UserError(f"{path} does not fit the model: {'; '.join(faults)}. Take the checkpoint's own config and options.")
    model.load_state_dict(state, strict=False)


def load_checkpoint(path, gpt2_type=None, device="cpu"):
    """Build a captioner from a checkpoint file, ours or a published one → ClipCaptionModel in eval mode, with .config and .tokenizer.

    path: a .pt file, or a name under data/weights/. gpt2_type: overrides where the language model's weights or tokenizer come from.
    Raises UserError when the file cannot be read, is not recognised, or does not fit.
    """
    found = find_weights(str(path), f"{path}.pt")
    path = found if found is not None and found.is_file() else Path(path)
    state = read_state_dict(path)
    beside = config_path(path)
    config = read_config(beside) if beside.is_file() else infer_config(state, path)
    if gpt2_type is not None:
        config = dataclasses.replace(config, gpt2_type=gpt2_type)
    base_state = {name.removeprefix(BASE): tensor for name, tensor in state.items() if name.startswith(BASE)}
    model = build_captioner(config, {name: tensor for name, tensor in state.items() if not name.startswith(BASE)}, path)
    if config.base is not None:
        known = {field.name for field in dataclasses.fields(CaptionConfig)}
        base_config = CaptionConfig(**{name: value for name, value in config.base.items() if name in known})
        model.base_model = build_captioner(base_config, base_state, path).to(device).eval()
    return model.to(device).eval()


def build_captioner(config, state, path):
    """Build a captioner from its config and a state dict; what the state dict has not of the language model comes by its name."""
    tokenizer = load_tokenizer(config.gpt2_type)
    if config.tune == "lora" and not any(is_adapter(name) for name in state):
        config = dataclasses.replace(config, tune="full", lora=None)  # written with its adapters merged in
    whole = bool(config.gpt_config) and holds_language_model(state, config)
    gpt = build_language_model(config.gpt_config) if whole else load_language_model(config.gpt2_type)
    try:
        model = ClipCaptionModel(config, gpt, tokenizer)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_state(model, state, path, complete=True)
    model.read_whole, model.read_from = whole, path
    return model


def holds_language_model(state, config):
    """Whether a state dict holds the whole language model, so that its weights need not come from elsewhere."""
    of_gpt = {name.removeprefix("gpt.") for name in state if name.startswith("gpt.")}
    if config.tune in ("full", "mapper") or not of_gpt:
        return bool(of_gpt)
    with torch.device("meta"):
        skeleton = build_language_model(config.gpt_config)
    return set(skeleton.state_dict()) - {output_names(skeleton)[1]} <= of_gpt


def build_language_model(gpt_config):
    """Make a causal language model from its config as a dict; its weights are to be loaded, and are not drawn at random first."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {name: value for name, value in gpt_config.items() if name not in ("model_type", "transformers_version", "dtype")}
    config = AutoConfig.for_model(gpt_config["model_type"], **fields)
    with no_init_weights():  # drawing 124M numbers takes seconds
        try:
            gpt = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        except ValueError:  # a language model without SDPA
            gpt = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    gpt.tie_weights()
    return gpt
