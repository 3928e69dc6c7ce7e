"""Published weights' sizes, read off the shapes of their tensors: the config that nobody wrote down.

E width of the language model, D width of an embedding, P prefix_length, K clip_length.
"""

from collections import Counter

from common import UserError
from features.encoder_names import CLIPXGPT_ENCODERS, ENCODER_OF_WIDTH
from models.config import CaptionConfig
from models.mappers.encoder import HEADS as ENCODER_HEADS

# GPT-2's number of heads is not in its shapes; these widths settle it (distilgpt2 and gpt2, -medium, -large, -xl).
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
GPT2_NAMES = {(768, 6): "distilgpt2", (768, 12): "gpt2", (1024, 24): "gpt2-medium", (1280, 36): "gpt2-large", (1600, 48): "gpt2-xl"}
BLOCK_PARAMETERS = 12  # of one GPT-2 block
CLIPXGPT_DROPOUT = {768: 0.1, 1024: 0.08}


class Shapes:
    """Sizes read off several tensors at once, so that one reshaped tensor is outvoted and then named as the one that does not fit."""

    def __init__(self, found, path):
        self.found, self.path = found, path

    def vote(self, what, *witnesses):
        """witnesses: (name, axis, function of the size). → the value that most present ones agree on; None when none is present."""
        values = {}
        for name, axis, value in witnesses:
            tensor = self.found.state.get(name)
            if tensor is not None and tensor.dim() > axis:
                values[name] = value(tensor.shape[axis])
        if not values:
            return None
        counts = Counter(values.values()).most_common()
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            told = "; ".join(f"{self.found.name_in_file(name)} {tuple(self.found.state[name].shape)}" for name in values)
            raise UserError(f"{self.path} does not agree with itself about its {what}: {told}. Download the file again.")
        if counts[0][0] < 1:
            self.refuse(next(iter(values)), what)
        return counts[0][0]

    def need(self, what, *witnesses):
        """As vote, but something must be there."""
        value = self.vote(what, *witnesses)
        if value is None:
            self.refuse(witnesses[0][0], what)
        return value

    def refuse(self, name, what):
        tensor = self.found.state.get(name)
        shown = self.found.name_in_file(name)
        fault = f"missing {shown}" if tensor is None else f"{shown} is {tuple(tensor.shape)}"
        raise UserError(f"{self.path} does not fit a model: {fault}, which should tell its {what}. Download the file again.")


def _same(size):
    return size


def _count_layers(state, prefix, least):
    """Layers `{prefix}{i}.` that hold at least `least` tensors: a stray one does not make a layer."""
    counts = Counter(name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix))
    return sum(count >= least for layer, count in counts.items() if layer.isdigit())


def infer_config(found, path, clipxgpt, hints, gpt2_type):
    """A published file's names and shapes → CaptionConfig.

    found: models.published.recognise.Recognised; clipxgpt: whether it has CLIPxGPT's names; hints, gpt2_type: as for recognise.
    Published ClipCap weights stop at "." and take ViT-B/32 (512 wide) or RN50x4 (640) features; the 640-wide transformer was trained
    on normalised ones. CLIPxGPT's stop at end-of-text and take a CLIP vision tower's features before the projection.
    """
    state, shapes = found.state, Shapes(found, path)
    if not any(name.startswith("gpt.transformer.") for name in state):
        raise UserError(
            f"{path} has no config beside it and no gpt.* weights to recognise it by (it holds "
            f"{', '.join(sorted(found.names.values())[:3])}, …). Put the .json that train.py wrote beside it, or train with --save_full."
        )
    tables = ("gpt.transformer.wte.weight", "gpt.transformer.wpe.weight")
    witnesses = [(name, 1, _same) for name in tables]
    witnesses += [(f"gpt.transformer.ln_f.{name}", 0, _same) for name in ("weight", "bias")]
    width = shapes.need("language model's width", *witnesses)
    vocabulary = shapes.need("vocabulary", (tables[0], 0, _same), ("gpt.lm_head.weight", 0, _same))
    layers = _count_layers(state, "gpt.transformer.h.", BLOCK_PARAMETERS // 2)
    gpt_config = {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": _head_count(width, hints, gpt2_type, path),
        "vocab_size": vocabulary,
        "n_positions": shapes.vote("positions", (tables[1], 0, _same)) or 1024,
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
    """The mapper's fields of the config."""
    state, at = found.state, "clip_project."

    def tokens(size):
        return size // width

    if any(name.startswith((at + "prefix_const", at + "linear.", at + "transformer.")) for name in state):
        return {
            "mapping_type": "transformer",
            "clip_width": shapes.need("embedding width", (at + "linear.weight", 1, _same)),
            "prefix_length": shapes.need("prefix length", (at + "prefix_const", 0, _same)),
            "clip_length": shapes.need("clip length", (at + "linear.weight", 0, tokens), (at + "linear.bias", 0, tokens)),
            "num_layers": _count_layers(state, at + "transformer.layers.", 6),
        }
    if any(name.startswith(at + "model.") for name in state):
        hidden = [(at + "model.0.weight", 0, lambda size: 2 * size // width), (at + "model.0.bias", 0, lambda size: 2 * size // width)]
        out = [(at + "model.2.weight", 0, tokens), (at + "model.2.bias", 0, tokens)]
        clip_width = shapes.need("embedding width", (at + "model.0.weight", 1, _same))
        return {"mapping_type": "mlp", "clip_width": clip_width, "prefix_length": shapes.need("prefix length", *out, *hidden)}
    if any(name.startswith((at + "transformer_encoder.", at + "mapper.")) for name in state):
        layer = at + "transformer_encoder.layers.0."
        witnesses = [(at + "mapper.weight", 1, _same), (layer + "norm1.weight", 0, _same), (layer + "self_attn.out_proj.weight", 0, _same)]
        clip_width = shapes.need("embedding width", *witnesses)
        prefix_length = shapes.need("prefix length", (at + "mapper.weight", 0, tokens), (at + "mapper.bias", 0, tokens))
        num_layers = _count_layers(state, at + "transformer_encoder.layers.", 6)
        return {"mapping_type": "encoder", "clip_width": clip_width, "prefix_length": prefix_length, "num_layers": num_layers,
                "mapper_heads": ENCODER_HEADS}  # fmt: skip
    if {at + "weight", at + "bias"} & set(state):
        clip_width = shapes.need("embedding width", (at + "weight", 1, _same))
        prefix_length = shapes.need("prefix length", (at + "weight", 0, tokens), (at + "bias", 0, tokens))
        return {"mapping_type": "linear", "clip_width": clip_width, "prefix_length": prefix_length}
    listed = ", ".join(sorted(name for name in found.names.values() if ".h." not in name)[:6])
    raise UserError(f"{path} has no mapper this version knows; found {listed}, …; expected clip_project.* or mp.*.")


def _head_count(width, hints, gpt2_type, path):
    """The number of heads of a GPT-2: what the hints say, else by width, else what the language model of that name has."""
    heads = hints.get("n_head", GPT2_HEADS.get(width))
    if heads is None and gpt2_type is not None:
        from models.weights import load_language_model_config

        config = load_language_model_config(gpt2_type)
        heads = config.num_attention_heads if config.hidden_size == width else None
    if heads is None:
        raise UserError(
            f"{path} holds a GPT-2 {width} wide, whose number of heads cannot be known. Give --gpt2_type, a language model of that width, "
            f'or put {{"model": {{"n_head": …}}}} into a .json of the same name beside it.'
        )
    return heads
