"""Sizes of published weights, read off the shapes of their tensors: the config that the files lack.

Letters: E width of the language model, D width of an embedding, P prefix_length, K clip_length.
"""

from collections import Counter

from common import UserError
from features.encoder_names import CLIPXGPT_ENCODERS, ENCODER_OF_WIDTH
from models.config import CaptionConfig
from models.mappers import MAPPERS
from models.mappers.encoder import HEADS as ENCODER_HEADS

# GPT-2's number of heads is not in its shapes. These widths settle it (distilgpt2 and gpt2, -medium, -large, -xl).
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
GPT2_NAMES = {(768, 6): "distilgpt2", (768, 12): "gpt2", (1024, 24): "gpt2-medium", (1280, 36): "gpt2-large", (1600, 48): "gpt2-xl"}
BLOCK_PARAMETERS = 12  # of one GPT-2 block
LAYER_PARAMETERS = 12  # of one layer of a mapper
CLIPXGPT_DROPOUT = {768: 0.1, 1024: 0.08}


def _same(size, width):
    return size


def _per_width(size, width):
    return size // width


def _twice_per_width(size, width):
    return 2 * size // width


# By mapping type: how the names of its tensors begin (after clip_project.), and for each field of CaptionConfig the tensors that show it,
# as (name, axis, function of the axis's size and E). A string stands for layers numbered under that name.
SIGNS = {
    "transformer": ("prefix_const", "linear.", "transformer."),
    "mlp": ("model.",),
    "encoder": ("transformer_encoder.", "mapper."),
    "linear": ("weight", "bias"),
}
FIELDS = {
    "transformer": {
        "clip_width": [("linear.weight", 1, _same)],
        "prefix_length": [("prefix_const", 0, _same)],
        "clip_length": [("linear.weight", 0, _per_width), ("linear.bias", 0, _per_width)],
        "num_layers": "transformer.layers.",
    },
    "mlp": {
        "clip_width": [("model.0.weight", 1, _same)],
        "prefix_length": [
            ("model.2.weight", 0, _per_width),
            ("model.2.bias", 0, _per_width),
            ("model.0.weight", 0, _twice_per_width),
            ("model.0.bias", 0, _twice_per_width),
        ],
    },
    "encoder": {
        "clip_width": [
            ("mapper.weight", 1, _same),
            ("transformer_encoder.layers.0.norm1.weight", 0, _same),
            ("transformer_encoder.layers.0.self_attn.out_proj.weight", 0, _same),
        ],
        "prefix_length": [("mapper.weight", 0, _per_width), ("mapper.bias", 0, _per_width)],
        "num_layers": "transformer_encoder.layers.",
    },
    "linear": {"clip_width": [("weight", 1, _same)], "prefix_length": [("weight", 0, _per_width), ("bias", 0, _per_width)]},
}
LABELS = {"clip_width": "embedding width", "prefix_length": "prefix length", "clip_length": "clip length"}


class Shapes:
    """Sizes read off several tensors at once, so that one reshaped tensor is outvoted and then named as the one that does not fit."""

    def __init__(self, found, path):
        self.found, self.path = found, path

    def vote(self, what, witnesses, width=0):
        """Return the value that most of the tensors agree on; None when none of them is there.

        Args:
            what: the value in words, for messages.
            witnesses: list of (name, axis, function of the axis's size and `width`).
            width: E.

        Raises:
            UserError: the tensors disagree, or the value is below 1.
        """
        values = {}
        for name, axis, value in witnesses:
            tensor = self.found.state.get(name)
            if tensor is not None and tensor.dim() > axis:
                values[name] = value(tensor.shape[axis], width)
        if not values:
            return None
        counts = Counter(values.values()).most_common()
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            shown = "; ".join(f"{self.found.name_in_file(name)} {tuple(self.found.state[name].shape)}" for name in values)
            raise UserError(f"{self.path} does not agree with itself about its {what}: {shown}. Download the file again.")
        if counts[0][0] < 1:
            self.refuse(next(iter(values)), what)
        return counts[0][0]

    def need(self, what, witnesses, width=0):
        """Vote as `vote` does; a value that no tensor shows is an error."""
        value = self.vote(what, witnesses, width)
        if value is None:
            self.refuse(witnesses[0][0], what)
        return value

    def refuse(self, name, what):
        """Raise a UserError about the tensor of that name."""
        tensor = self.found.state.get(name)
        shown = self.found.name_in_file(name)
        fault = f"missing {shown}" if tensor is None else f"{shown} is {tuple(tensor.shape)}"
        raise UserError(f"{self.path} does not fit a model: {fault}, which should show its {what}. Download the file again.")


def _count_layers(state, prefix, parameters):
    """Count the layers `{prefix}{i}.` that hold at least half of a layer's parameters: a stray tensor makes no layer."""
    counts = Counter(name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix))
    return sum(2 * count >= parameters for layer, count in counts.items() if layer.isdigit())


def infer_config(found, path, clipxgpt, hints, gpt2_type):
    """Infer the CaptionConfig of a published file from its names and shapes.

    Published ClipCap weights stop at "." and take features of ViT-B/32 (512 wide) or RN50x4 (640). The 640-wide transformer was trained
    on normalized ones. CLIPxGPT's stop at end-of-text and take a CLIP vision tower's features before the projection.

    Args:
        found: models.published.recognise.Recognised.
        path: the file, for messages.
        clipxgpt: whether it has CLIPxGPT's names.
        hints: dict of fields (and n_head) that override what is inferred.
        gpt2_type: as for recognise.

    Raises:
        UserError: names the keys that are missing or do not fit.
    """
    state, shapes = found.state, Shapes(found, path)
    if not any(name.startswith("gpt.transformer.") for name in state):
        raise UserError(
            f"{path} has no config beside it and no gpt.* weights to recognise it by (it holds "
            f"{', '.join(sorted(found.names.values())[:3])}, ...). Put the .json that train.py wrote beside it, or train with --save_full."
        )
    table, positions = "gpt.transformer.wte.weight", "gpt.transformer.wpe.weight"
    norms = [(f"gpt.transformer.ln_f.{name}", 0, _same) for name in ("weight", "bias")]
    width = shapes.need("language model's width", [(table, 1, _same), (positions, 1, _same), *norms])
    layers = _count_layers(state, "gpt.transformer.h.", BLOCK_PARAMETERS)
    gpt_config = {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": _head_count(width, hints, gpt2_type, path),
        "vocab_size": shapes.need("vocabulary", [(table, 0, _same), ("gpt.lm_head.weight", 0, _same)]),
        "n_positions": shapes.vote("positions", [(positions, 0, _same)]) or 1024,
    }
    mapper = _infer_mapper(found, shapes, width, path)
    fields = {
        "encoder": (CLIPXGPT_ENCODERS if clipxgpt else ENCODER_OF_WIDTH).get(mapper["clip_width"]),
        "gpt2_type": gpt2_type or GPT2_NAMES.get((width, layers), "gpt2"),
        "gpt_config": gpt_config,
        "stop_token": None if clipxgpt else ".",
        **mapper,
    }
    if clipxgpt:
        fields |= {"decoding_style": "clipxgpt", "mapper_dropout": CLIPXGPT_DROPOUT.get(mapper["clip_width"], 0.1)}
    fields["normalize_prefix"] = mapper["mapping_type"] == "transformer" and mapper["clip_width"] == 640
    try:
        return CaptionConfig(**{**fields, **{name: value for name, value in hints.items() if name != "n_head"}})
    except TypeError as error:
        raise UserError(f"{path}: the .json beside it does not fit ({error}). Take the fields of a config that train.py wrote.") from error


def _infer_mapper(found, shapes, width, path):
    """Infer the mapper's fields of the config."""
    at = "clip_project."
    own = [name.removeprefix(at) for name in found.state if name.startswith(at)]
    kind = next((kind for kind, signs in SIGNS.items() if any(name.startswith(signs) for name in own)), None)
    if kind is None:
        listed = ", ".join(sorted(name for name in found.names.values() if ".h." not in name)[:6])
        raise UserError(f"{path} has no mapper this version knows; found {listed}, ...; expected clip_project.* or mp.*.")
    fields = {"mapping_type": kind}
    for field in ("clip_width", *MAPPERS[kind].shaped_by):
        shown_by = FIELDS[kind][field]
        if isinstance(shown_by, str):
            fields[field] = _count_layers(found.state, at + shown_by, LAYER_PARAMETERS)
        else:
            fields[field] = shapes.need(LABELS[field], [(at + name, *rest) for name, *rest in shown_by], width)
    return fields | ({"mapper_heads": ENCODER_HEADS} if kind == "encoder" else {})


def find_differing(found, width):
    """Compare the config that came with weights to what their shapes show.

    Args:
        found: models.published.recognise.Recognised.
        width: E.

    Returns:
        Dict of field to (value in the config, value of the weights); fields that no shape shows are left out.
    """
    config = found.config
    try:
        shown = _infer_mapper(found, Shapes(found, found.path), width, found.path)
    except UserError:  # loading the weights says better what is wrong with them
        return {}
    shown.pop("mapper_heads", None)
    if config.embeddings_per_image > 1 and shown.pop("clip_length", 1) > 1:  # a mapper that expands one embedding
        shown["embeddings_per_image"] = 1
    differing = {field: (getattr(config, field), value) for field, value in shown.items() if getattr(config, field) != value}
    ranks = {tensor.shape[0] for name, tensor in found.state.items() if ".lora_A." in name}
    if config.lora and len(ranks) == 1 and config.lora["rank"] not in ranks:
        differing["lora rank"] = (config.lora["rank"], ranks.pop())
    return {"mapping_type": differing["mapping_type"]} if "mapping_type" in differing else differing


def _head_count(width, hints, gpt2_type, path):
    """Find the number of heads of a GPT-2: what the hints say, else by width, else what the language model of that name has."""
    heads = hints.get("n_head", GPT2_HEADS.get(width))
    if heads is None and gpt2_type is not None:
        from models.weights import load_language_model_config

        config = load_language_model_config(gpt2_type)
        heads = config.num_attention_heads if config.hidden_size == width else None
    if heads is None:
        raise UserError(
            f"{path} holds a GPT-2 {width} wide, whose number of heads cannot be known. Give --gpt2_type, a language model of that width, "
            f'or put {{"model": {{"n_head": N}}}} into a .json of the same name beside it.'
        )
    return heads
