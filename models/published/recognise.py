"""What a weight file is, found out from its names and shapes, under every name that it was published with.

    ClipCap     clip_project.* and gpt.*                          MLP, one Linear, or transformer before a GPT-2 of any size
    CLIPxGPT    mp.* and td.model.*, with ie.* its vision tower   bare, or as "model_state_dict" of a training file
    Instagram   ClipCap's names; prompted: the same again under original_model.*; LoRA: peft's names
    PrefixCap   ClipCap's names, with a config beside the file

Each may be wrapped by the program that saved it: in a dict with other entries, or with "module." (DistributedDataParallel), "_orig_mod."
(torch.compile) or "model." (Lightning) before its names.

Letters: E width of the language model, D width of an embedding, P prefix_length, K clip_length.
"""

import dataclasses
import re

import torch

from common import UserError
from models.config import CaptionConfig
from models.published.shapes import infer_config
from models.tensors import read_tensors

# Old versions of transformers wrote GPT-2's causal mask and CLIP's row numbers into state dicts.
OLD_BUFFERS = re.compile(r"(.*\.)?transformer\.h\.\d+\.attn\.(bias|masked_bias)|ie\.model\.embeddings\.position_ids")
CONTAINERS = ("model_state_dict", "state_dict", "model")  # keys under which training programs keep a state dict
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module)\.")  # what wrappers of torch put into names
LEAD = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|model)\.)+")  # what may precede every name
# The prompt of the Instagram captioner, as published. {base} is the caption of the model it started from.
PUBLISHED_PROMPT = " is a picture of {base} and a social media post would caption it "
PUBLISHED_ALPHA = 16  # of the published LoRA weights; the file does not hold it
OURS = "PrefixCap checkpoint, with its config"
BASE = "original_model."  # the published name of the model whose captions a prompted one quotes
ADAPTER = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")


@dataclasses.dataclass
class Recognised:
    """A weight file's content under the project's names, and what it is.

    Attributes:
        path: the file.
        kind: one line for the reader.
        config: CaptionConfig.
        state: tensors by name, clip_project.* and gpt.*.
        names: the project's name to the file's name, of every tensor in `state`.
        renames: pairs of prefixes (the project's, the file's): how the file would name what it lacks.
        adapters: module of gpt to its pair (lora_A [r, in], lora_B [out, r]).
        base: Recognised, the captioner whose captions the prompt quotes; None without one.
        vision: CLIPxGPT's vision tower under transformers' names; None without one.
    """

    path: object
    kind: str
    config: CaptionConfig
    state: dict
    names: dict
    renames: tuple = ()
    adapters: dict = dataclasses.field(default_factory=dict)
    base: "Recognised | None" = None
    vision: dict | None = None

    def name_in_file(self, name):
        """Return the name that the file has, or would have, for the project's `name`."""
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
    """Take the state dict out of what was read from a file, without wrappers and without the buffers of old transformers.

    Raises:
        UserError: there is none.
    """
    return _unwrap(content, path)[0]


def _unwrap(content, path):
    """Take a state dict out of its wrappers.

    Returns:
        dict of tensors; dict of their names to the file's names; the text that precedes every name in the file.
    """
    while isinstance(content, dict) and not all(isinstance(value, torch.Tensor) for value in content.values()):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), None)
    if not content or not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: expected a state dict of tensors (names clip_project.* and gpt.*).")
    for name, tensor in content.items():
        form = _odd_form(tensor)
        if form:
            raise UserError(f"{path} holds {name} as a {form} tensor; expected dense real numbers. Save it as tensor.to_dense().float().")
    names, wrapped = {}, all(LEAD.match(str(name)) for name in content)
    for theirs in map(str, content):
        name = WRAPPERS.sub("", LEAD.sub("", theirs) if wrapped else theirs)
        if name in names:
            raise UserError(f"{path} holds {names[name]} and {theirs}, which are the same parameter. Take one of them out.")
        names[name] = theirs
    names = {name: theirs for name, theirs in names.items() if not OLD_BUFFERS.fullmatch(name)}
    tensors = {str(theirs): tensor for theirs, tensor in content.items()}
    leads = {theirs.removesuffix(name) for name, theirs in names.items()}
    return {name: tensors[theirs] for name, theirs in names.items()}, names, leads.pop() if len(leads) == 1 else ""


def _odd_form(tensor):
    """Name what keeps a tensor from being copied into a weight; None where nothing does."""
    forms = {"meta": tensor.is_meta, "sparse": tensor.layout is not torch.strided, "quantized": tensor.is_quantized}
    return next((name for name, is_so in {**forms, "complex": tensor.is_complex()}.items() if is_so), None)


def recognise(content, path, config=None, gpt2_type=None, root=""):
    """Find out what a file holds.

    Args:
        content: what was read from the file.
        path: its name, for messages.
        config: the CaptionConfig beside the file, which decides; or a dict of fields (and n_head) that override what is recognised.
        gpt2_type: a language model that knows its number of heads, asked where the width does not settle it.
        root: what preceded every name in the file.

    Returns:
        Recognised.

    Raises:
        UserError: names the keys, when the content fits no form.
    """
    content, in_file, lead = _unwrap(content, path)
    base_content = {name: tensor for name, tensor in content.items() if name.startswith(BASE)}
    renamed, renames, vision = _rename(content.keys() - base_content.keys(), path)
    live = isinstance(config, CaptionConfig) and config.tune == "lora"  # ours, whose adapters stay adapters
    state = {ours: content[theirs] for ours, theirs in renamed.items() if live or not ADAPTER.fullmatch(ours)}
    # Adapters go by their names without peft's label in messages.
    names = {ours if ours in state else ADAPTER.sub(r"\1.lora_\2", ours): root + in_file[theirs] for ours, theirs in renamed.items()}
    adapters = {} if live else _pair_adapters({ours: content[theirs] for ours, theirs in renamed.items()}, renamed, path)
    vision = {name.removeprefix("ie.model."): content[name] for name in vision} or None
    clipxgpt = ("clip_project.", "mp.") in renames
    renames = tuple((ours, root + lead + theirs) for ours, theirs in renames or (("", ""),))
    found = Recognised(path, OURS, config, state, names, renames, adapters, vision=vision)
    if not isinstance(config, CaptionConfig):
        found.config = infer_config(found, path, clipxgpt, config or {}, gpt2_type)
        found.kind = _describe_kind(found, clipxgpt, bool(base_content))
    if base_content:
        _add_base(found, base_content, config or {}, gpt2_type, root + lead)
    return found


def _add_base(found, content, config, gpt2_type, root):
    """Add the captioner whose captions a prompted one quotes to what was recognised. `config` is as for recognise."""
    content = {name.removeprefix(BASE): tensor for name, tensor in content.items()}
    known = {field.name for field in dataclasses.fields(CaptionConfig)}  # "base" may also say where the base was read from
    fields = {name: value for name, value in (found.config.base or {}).items() if name in known}
    ours = isinstance(config, CaptionConfig)
    hints = {} if ours else {name: config[name] for name in ("n_head", "gpt2_type") if name in config}
    found.base = recognise(content, found.path, CaptionConfig(**fields) if fields else hints, gpt2_type, root + BASE)
    prompt = found.config.prompt if ours else config.get("prompt", PUBLISHED_PROMPT)
    found.config = dataclasses.replace(found.config, base=found.config.base or dataclasses.asdict(found.base.config), prompt=prompt)


def _rename(names, path):
    """Bring every published spelling to the project's.

    Returns:
        dict of the project's name to the file's name; pairs of prefixes (the project's, the file's); names of the vision tower.
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
    """Pair LoRA's matrices: dict of a module's name under `gpt.` to (A [r, in], B [out, r])."""
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
    """Describe a published file in one line."""
    if clipxgpt:
        return f"CLIPxGPT {'L' if found.config.clip_width == 1024 else 'S'}{'' if found.vision else ', without its vision tower'}"
    mapper = {"mlp": "MLP", "linear": "one-Linear", "transformer": "transformer", "encoder": "encoder"}[found.config.mapping_type]
    parts = ["ClipCap for Instagram, prompted" if prompted else "ClipCap", f"{mapper} mapper"]
    if found.adapters:
        parts.append(f"LoRA adapters of rank {len(next(iter(found.adapters.values()))[0])}")
    if found.config.normalize_prefix:
        parts.append("on normalized embeddings, as the published one this wide")
    return ", ".join(parts)


def open_vision(path):
    """Read the vision tower inside a CLIPxGPT file: tensors under transformers' names. Raises UserError when there is none."""
    state = plain_state(read_tensors(path), path)
    vision = {name.removeprefix("ie.model."): tensor for name, tensor in state.items() if name.startswith("ie.")}
    if not vision:
        raise UserError(f"{path} holds no vision tower (ie.model.*); expected a CLIPxGPT file. Give --clip_model_type instead.")
    return vision
