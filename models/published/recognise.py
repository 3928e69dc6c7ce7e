"""What a weight file is: told from its names and shapes, under every name that it was published with.

  ClipCap     clip_project.* and gpt.*                          MLP, one Linear, or transformer before a GPT-2 of any size
  CLIPxGPT    mp.* and td.model.*, with ie.* its vision tower   bare, or as "model_state_dict" of a training file
  Instagram   ClipCap's names; prompted: the same again under original_model.*; LoRA: peft's names
  PrefixCap   ClipCap's names, with a config beside the file

E width of the language model, D width of an embedding, P prefix_length, K clip_length.
"""

import dataclasses
import re

import torch

from common import UserError
from models.config import CaptionConfig
from models.published.shapes import infer_config

# transformers once kept GPT-2's causal mask and CLIP's row numbers as buffers, and wrote them into state dicts.
OLD_BUFFERS = re.compile(r"(.*\.)?transformer\.h\.\d+\.attn\.(bias|masked_bias)|ie\.model\.embeddings\.position_ids")
# What the Instagram captioner was told, as published: {base} is the caption of the model it started from.
PUBLISHED_PROMPT = " is a picture of {base} and a social media post would caption it "
PUBLISHED_ALPHA = 16  # of the published LoRA weights; the file does not hold it
OURS = "PrefixCap checkpoint, with its config"
ADAPTER = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")


@dataclasses.dataclass
class Recognised:
    """A weight file's content under the project's names, and what it is."""

    path: object  # the file
    kind: str  # one line for the reader
    config: CaptionConfig
    state: dict  # name → tensor, clip_project.* and gpt.*
    names: dict  # the project's name → the file's name, of every tensor in state
    renames: tuple = ()  # (the project's prefix, the file's prefix): how the file would name what it lacks
    adapters: dict = dataclasses.field(default_factory=dict)  # module of gpt → (lora_A [r, in], lora_B [out, r])
    base: "Recognised | None" = None  # the captioner whose captions the prompt quotes
    vision: dict | None = None  # CLIPxGPT's vision tower under transformers' names

    def name_in_file(self, name):
        """The name that the file has, or would have, for the project's `name`."""
        if name in self.names:
            return self.names[name]
        module, _, last = name.rpartition(".")
        if module.removeprefix("gpt.") in self.adapters:
            name = f"{module}.base_layer.{last}"
        for ours, theirs in self.renames:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name


def plain_state(content, path):
    """What was read from a file → its state dict, without the buffers of old transformers. Raises UserError when it holds none."""
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        content = content["model_state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise UserError(f"{path} is not a checkpoint: expected a state dict of tensors (names clip_project.* and gpt.*).")
    return {str(name): tensor for name, tensor in content.items() if not OLD_BUFFERS.fullmatch(str(name))}


def recognise(content, path, config=None, gpt2_type=None, root=""):
    """Tell what a file holds → Recognised.

    content: what was read from the file; path: its name, for messages; config: the CaptionConfig that stands beside the file and
    decides, or a dict of fields (and n_head) that overrule what is recognised; gpt2_type: a language model that knows its number of
    heads, asked where the width does not settle it; root: what stood before every name in the file.
    Raises UserError, naming the keys, when the content fits no form.
    """
    content = plain_state(content, path)
    base_content = {name: tensor for name, tensor in content.items() if name.startswith("original_model.")}
    renamed, renames, vision = _rename(content.keys() - base_content.keys(), path)
    renames = renames or (("", ""),)
    live = isinstance(config, CaptionConfig) and config.tune == "lora"  # ours, whose adapters stay adapters
    state = {ours: content[theirs] for ours, theirs in renamed.items() if live or not ADAPTER.fullmatch(ours)}
    names = {ours: root + renamed[ours] for ours in state}
    renames = tuple((ours, root + theirs) for ours, theirs in renames)
    vision = {name.removeprefix("ie.model."): content[name] for name in vision} or None
    adapters = {} if live else _pair_adapters({ours: content[theirs] for ours, theirs in renamed.items()}, renamed, path)
    found = Recognised(path, OURS, config, state, names, renames, adapters, vision=vision)
    for name, theirs in renamed.items():
        if not live and ADAPTER.fullmatch(name):  # named without the adapter's label, for messages
            found.names[ADAPTER.sub(r"\1.lora_\2", name)] = theirs
    hints = config if isinstance(config, dict) else {}
    if not isinstance(config, CaptionConfig):
        clipxgpt = ("clip_project.", "mp.") in renames
        found.config = infer_config(found, path, clipxgpt, hints, gpt2_type)
        found.kind = _describe_kind(found, clipxgpt, bool(base_content))
    if base_content:
        stripped = {name.removeprefix("original_model."): tensor for name, tensor in base_content.items()}
        of_both = {name: hints[name] for name in ("n_head", "gpt2_type") if name in hints}
        known = {field.name for field in dataclasses.fields(CaptionConfig)}  # "base" may also say where the base was read from
        of_base = {name: value for name, value in (found.config.base or {}).items() if name in known}
        base_config = CaptionConfig(**of_base) if of_base else of_both
        found.base = recognise(stripped, path, base_config, gpt2_type, "original_model.")
        prompt = found.config.prompt if isinstance(config, CaptionConfig) else hints.get("prompt", PUBLISHED_PROMPT)
        base = found.config.base or dataclasses.asdict(found.base.config)
        found.config = dataclasses.replace(found.config, base=base, prompt=prompt)
    return found


def _rename(names, path):
    """Bring every published spelling to the project's.

    → dict of the project's name → the file's name; pairs of prefixes (the project's, the file's); names of the vision tower.
    """
    prefixes, vision = [], []
    if any(name.startswith(("mp.", "td.model.")) for name in names):
        prefixes = [("clip_project.", "mp."), ("gpt.", "td.model.")]
        vision = [name for name in names if name.startswith("ie.")]
    elif any(name.startswith("base_model.model.") for name in names):  # peft around the whole captioner
        prefixes = [("", "base_model.model.")]
    elif any(name.startswith("gpt.base_model.model.") for name in names):  # peft around the language model
        prefixes = [("gpt.", "gpt.base_model.model.")]
    renamed = {}
    for theirs in sorted(names - set(vision)):
        name = theirs
        for ours, prefix in prefixes:
            if name.startswith(prefix):
                name = ours + name[len(prefix) :]
                break
        if len(prefixes) < 2:  # peft puts the layer it adapts one level deeper
            name = name.replace(".base_layer.", ".")
        if name in renamed:
            raise UserError(f"{path} holds {renamed[name]} and {theirs}, which are the same parameter. Take one of them out.")
        renamed[name] = theirs
    return renamed, tuple(prefixes), vision


def _pair_adapters(state, names, path):
    """LoRA's pairs of matrices → dict of module name under `gpt.` → (A [r, in], B [out, r])."""
    found = {}
    for name, tensor in state.items():
        match = ADAPTER.fullmatch(name)
        if match:
            module, side, label = match.groups()
            found.setdefault(module, {}).setdefault(label, {})[side] = (name, tensor)
    pairs = {}
    for module, by_label in found.items():
        if len(by_label) > 1:
            raise UserError(f"{path} holds several adapters for {module} ({', '.join(by_label)}); expected one. Merge them with peft.")
        (label, sides), theirs = next(iter(by_label.items())), names
        for side, other in (("A", "B"), ("B", "A")):
            if side not in sides:
                lacking = theirs[sides[other][0]].replace(f".lora_{other}.{label}.", f".lora_{side}.{label}.")
                raise UserError(f"{path} does not fit the model: missing {lacking}. Take the whole file.")
        a, b = sides["A"][1], sides["B"][1]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not module.startswith("gpt."):
            shapes = ", ".join(f"{theirs[name]} {tuple(tensor.shape)}" for name, tensor in sides.values())
            raise UserError(f"{path} holds adapters that do not fit: {shapes}; expected gpt.* with [rank, in] and [out, rank].")
        pairs[module.removeprefix("gpt.")] = (a, b)
    return pairs


def _describe_kind(found, clipxgpt, prompted):
    """One line on what a published file is."""
    if clipxgpt:
        return f"CLIPxGPT {'L' if found.config.clip_width == 1024 else 'S'}{'' if found.vision else ', without its vision tower'}"
    mapper = {"mlp": "MLP", "linear": "one-Linear", "transformer": "transformer", "encoder": "encoder"}[found.config.mapping_type]
    parts = ["ClipCap for Instagram, prompted" if prompted else "ClipCap", f"{mapper} mapper"]
    if found.adapters:
        parts.append(f"LoRA adapters of rank {len(next(iter(found.adapters.values()))[0])}")
    if found.config.normalize_prefix:
        parts.append("on normalised embeddings, as the published one this wide")
    return ", ".join(parts)


def open_vision(path):
    """The vision tower inside a CLIPxGPT file → its tensors under transformers' names. Raises UserError when there is none."""
    from models.tensors import read_tensors

    state = plain_state(read_tensors(path), path)
    vision = {name.removeprefix("ie.model."): tensor for name, tensor in state.items() if name.startswith("ie.")}
    if not vision:
        raise UserError(f"{path} holds no vision tower (ie.model.*); expected a CLIPxGPT file. Give --clip_model_type instead.")
    return vision
