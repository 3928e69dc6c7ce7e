"""Which parts of a captioner are trained: everything, the mapper, the language model's ends, its output layer, or low-rank adapters.

The language model's parts are found by structure: its blocks are the module list as long as its config says, and the stack is the module
that holds them. So GPT-2, OPT, Llama and Qwen can all be tuned. A part without trained parameters stays in eval mode, without dropout, as
published for a frozen GPT-2.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """An entry of TUNINGS."""

    help: str  # completes the sentence "NAME trains ..." in --help
    prepare: object  # function(gpt, config): prepare a fresh language model; raises ValueError where that is impossible
    mark: object  # function(gpt): set requires_grad on its parameters, which are all frozen before
    wake: object  # function(gpt): put the trained parts into training mode; all are in eval mode before


GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]  # as published for Instagram: every matrix of a GPT-2 block
ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output layer


def find_blocks(gpt):
    """Find the stack of a language model and its blocks.

    Returns:
        the module with embeddings, blocks and final norm, and the nn.ModuleList of its blocks.

    Raises:
        ValueError: the language model has no such list.
    """
    from torch import nn

    count = getattr(gpt.config, "num_hidden_layers", None)
    for module in gpt.base_model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise ValueError(f"{type(gpt).__name__} has no list of {count} blocks: it can be tuned with full, mapper or lora only")


def output_names(gpt):
    """Return the names of the token table and of the output layer's weight in the language model's state dict."""
    layers = {id(module): name for name, module in gpt.named_modules()}
    return tuple(f"{layers[id(layer)]}.weight" for layer in (gpt.get_input_embeddings(), gpt.get_output_embeddings()))


def untie_output(gpt, weight=None):
    """Give the output layer a weight of its own: `weight`, or a copy of the token table it shares."""
    from torch import nn

    head = gpt.get_output_embeddings()
    gpt.config.tie_word_embeddings = False
    head.weight = nn.Parameter((head.weight if weight is None else weight).detach().clone(), head.weight.requires_grad)


def default_targets(gpt):
    """Return the layers that get adapters by default: GPT-2's, or every linear layer except the output in other models."""
    return list(GPT2_TARGETS) if gpt.config.model_type == "gpt2" else ALL_LINEAR


def add_adapters(gpt, lora):
    """Put low-rank adapters (arXiv:2106.09685) into a language model, in place, through peft.

    Args:
        gpt: the language model.
        lora: dict of rank, alpha, dropout and targets (a list of layer names, or "all-linear").

    Raises:
        ValueError: the language model has no layer of a target's name.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    targets = lora["targets"]
    if targets != ALL_LINEAR:
        matrices = {name for name, module in gpt.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        absent = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in matrices)]
        if absent:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise ValueError(f"no layer {', '.join(absent)} for an adapter (lora targets) in {type(gpt).__name__}; it has {known}")
    # GPT-2's matrices are stored transposed (Conv1D); peft has to know.
    transposed = any(isinstance(module, Conv1D) for module in gpt.modules())
    settings = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=targets, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(settings, gpt)


def _mark_ends(gpt):
    """Train the embeddings, the first and the last block, and the final norm."""
    stack, blocks = find_blocks(gpt)
    stack.requires_grad_(True)
    for block in blocks[1:-1]:
        block.requires_grad_(False)


def _wake_ends(gpt):
    gpt.train()
    for block in find_blocks(gpt)[1][1:-1]:
        block.eval()


def _mark_adapters(gpt):
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def _wake_adapters(gpt):
    for name, module in gpt.named_modules():
        if is_adapter(name):
            module.train()


def _nothing(*_):
    """Leave the language model as it is."""


TUNINGS = {
    "full": Tuning("the whole language model", _nothing, lambda gpt: gpt.requires_grad_(True), lambda gpt: gpt.train()),
    "mapper": Tuning("nothing of the language model, only the mapper", _nothing, _nothing, _nothing),
    "ends": Tuning("embeddings, first block, last block and final norm", lambda gpt, config: find_blocks(gpt), _mark_ends, _wake_ends),
    "head": Tuning(
        "the output layer, untied from the embeddings",
        lambda gpt, config: untie_output(gpt),
        lambda gpt: gpt.get_output_embeddings().requires_grad_(True),
        _nothing,
    ),
    "lora": Tuning("low-rank adapters", lambda gpt, config: add_adapters(gpt, config.lora), _mark_adapters, _wake_adapters),
}


def apply_tuning(model):
    """Prepare a fresh captioner as its config's tuning says (adapters, an untied output layer), and mark what is trained.

    Raises:
        ValueError: unknown tuning, or a language model that cannot be tuned this way.
    """
    config = model.config
    if config.tune not in TUNINGS:
        raise ValueError(f"tune is {config.tune!r}; expected one of {', '.join(TUNINGS)}")
    TUNINGS[config.tune].prepare(model.gpt, config)
    mark_trained(model)


def mark_trained(model):
    """Set requires_grad on every parameter as the config's tuning says."""
    model.clip_project.requires_grad_(not model.config.freeze_mapper)
    model.gpt.requires_grad_(False)
    TUNINGS[model.config.tune].mark(model.gpt)


def rest_untrained(model):
    """Put parts without trained parameters back into eval mode, so that their dropout stays off; call it after model.train()."""
    if model.config.freeze_mapper:
        model.clip_project.eval()
    model.gpt.eval()
    TUNINGS[model.config.tune].wake(model.gpt)


def checkpoint_blocks(gpt):
    """Keep no activations inside the blocks; the backward pass computes them again (gradient checkpointing, arXiv:1604.06174).

    The switch of transformers does nothing in eval mode, in which a frozen language model stays.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def recomputed(forward):
        def wrapped(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return wrapped

    for block in find_blocks(gpt)[1]:
        block.forward = recomputed(block.forward)


def is_adapter(name):
    """Tell whether a module or parameter of this name belongs to a low-rank adapter."""
    return ".lora_" in name


def kept_names(model):
    """Return the names of the state dict that a checkpoint must hold: the mapper's, and what is trained of the language model."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if model.config.tune == "full":
        return set(model.state_dict())
    return {name for name in model.state_dict() if name.startswith("clip_project.") or name in trained}


def merged_state(model):
    """Return the state dict with every adapter merged into its matrix, under the published names."""
    state = {}
    layers = {f"gpt.{name}": module for name, module in model.gpt.named_modules() if hasattr(module, "get_delta_weight")}
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        layer, _, part = name.rpartition(".base_layer.")
        if not layer:
            state[name] = tensor
        else:
            state[f"{layer}.{part}"] = tensor + layers[layer].get_delta_weight("default").to(tensor) if part == "weight" else tensor
    return state


def beneath_adapters(model, state):
    """Rename the plain names of a state dict to those of the matrices beneath the model's adapters, if it has any."""
    if model.config.tune != "lora":
        return state
    beneath = {name.replace(".base_layer.", "."): name for name in model.state_dict() if ".base_layer." in name}
    return {beneath.get(name, name): tensor for name, tensor in state.items()}


def parameter_table(model):
    """Count parameters part by part: list of (part, trained, all), without empty parts."""
    from torch import nn

    owners = {}
    try:
        stack, blocks = find_blocks(model.gpt)
        for number, block in enumerate(blocks):
            part = "first block" if number == 0 else "last block" if number == len(blocks) - 1 else "blocks between"
            owners |= {id(parameter): part for parameter in block.parameters()}
        embeddings = {id(p) for module in stack.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    except ValueError:
        embeddings = {id(parameter) for parameter in model.gpt.get_input_embeddings().parameters()}
    owners |= dict.fromkeys(embeddings, "embeddings")
    for parameter in model.gpt.get_output_embeddings().parameters():
        owners.setdefault(id(parameter), "output layer")
    table = {part: [0, 0] for part in ("mapper", "embeddings", "first block", "blocks between", "last block", "norm and others")}
    table |= {part: [0, 0] for part in ("output layer", "adapters")}
    for name, parameter in model.named_parameters():
        part = "mapper" if name.startswith("clip_project.") else owners.get(id(parameter), "norm and others")
        part = "adapters" if is_adapter(name) else part
        table[part][0] += parameter.numel() * parameter.requires_grad
        table[part][1] += parameter.numel()
    return [(part, trained, total) for part, (trained, total) in table.items() if total]
