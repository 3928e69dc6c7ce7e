"""Weight files as they were published, made of random numbers under the published names, and what such a file says about an embedding.

Written from the published names and formulas alone: nothing here is shared with the project. Forward passes are plain and in float64.
Letters: B batch, D embedding width, E language-model width, P prefix length, K clip length, T tokens.
"""

import random
from types import SimpleNamespace

import torch
from torch.nn import functional as F

END = "<|endoftext|>"
MAPPER_HEADS, ENCODER_HEADS = 8, 16
ALPHA = 16
PROMPT = " is a picture of {base} and a social media post would caption it "


def draw_tensors(shapes, generator, scale=0.3):
    """dict of name → shape → dict of name → float32 tensor; norms around one, the rest around zero."""
    drawn = {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}
    return {name: t + 1 if "norm" in name.replace("ln_", "norm") and name.endswith("weight") else t for name, t in drawn.items()}


def linear(name, out, inside, bias=True):
    return {f"{name}.weight": (out, inside), **({f"{name}.bias": (out,)} if bias else {})}


def conv1d(name, inside, out):
    return {f"{name}.weight": (inside, out), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def gpt2_shapes(width, layers, vocabulary, positions):
    shapes = {"transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (positions, width)}
    for i in range(layers):
        at = f"transformer.h.{i}"
        shapes |= norm(f"{at}.ln_1", width) | conv1d(f"{at}.attn.c_attn", width, 3 * width) | conv1d(f"{at}.attn.c_proj", width, width)
        shapes |= norm(f"{at}.ln_2", width) | conv1d(f"{at}.mlp.c_fc", width, 4 * width) | conv1d(f"{at}.mlp.c_proj", 4 * width, width)
    return shapes | norm("transformer.ln_f", width)


def old_buffers(prefix, layers):
    """What transformers before 4.31 wrote into every GPT-2 state dict."""
    buffers = {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8) for i in range(layers)}
    return buffers | {f"{prefix}transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(layers)}


def mapper_shapes(kind, clip_width, width, length, clip_length=1, layers=1):
    if kind == "mlp":
        return linear("model.0", width * length // 2, clip_width) | linear("model.2", width * length, width * length // 2)
    if kind == "linear":
        return {"weight": (width * length, clip_width), "bias": (width * length,)}
    if kind == "transformer":
        shapes = linear("linear", clip_length * width, clip_width) | {"prefix_const": (length, width)}
        for i in range(layers):
            at = f"transformer.layers.{i}"
            shapes |= norm(f"{at}.norm1", width) | norm(f"{at}.norm2", width)
            shapes |= linear(f"{at}.attn.to_queries", width, width, bias=False)
            shapes |= linear(f"{at}.attn.to_keys_values", 2 * width, width, bias=False)
            shapes |= linear(f"{at}.attn.project", width, width)
            shapes |= linear(f"{at}.mlp.fc1", 2 * width, width) | linear(f"{at}.mlp.fc2", width, 2 * width)
        return shapes
    shapes = linear("mapper", width * length, clip_width)
    for i in range(layers):
        at = f"transformer_encoder.layers.{i}"
        shapes |= {f"{at}.self_attn.in_proj_weight": (3 * clip_width, clip_width), f"{at}.self_attn.in_proj_bias": (3 * clip_width,)}
        shapes |= linear(f"{at}.self_attn.out_proj", clip_width, clip_width)
        shapes |= linear(f"{at}.linear1", 4 * clip_width, clip_width) | linear(f"{at}.linear2", clip_width, 4 * clip_width)
        shapes |= norm(f"{at}.norm1", clip_width) | norm(f"{at}.norm2", clip_width)
    return shapes


def vision_shapes(width, layers, patch, side):
    shapes = {"embeddings.class_embedding": (width,), "embeddings.patch_embedding.weight": (width, 3, patch, patch)}
    shapes |= {"embeddings.position_embedding.weight": (side * side + 1, width)} | norm("pre_layrnorm", width)
    for i in range(layers):
        at = f"encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{at}.self_attn.{name}", width, width)
        shapes |= norm(f"{at}.layer_norm1", width) | norm(f"{at}.layer_norm2", width)
        shapes |= linear(f"{at}.mlp.fc1", 2 * width, width) | linear(f"{at}.mlp.fc2", width, 2 * width)
    return shapes | norm("post_layernorm", width)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def random_file(kind, seed, vocabulary, stop, widths=((32, 4), (64, 2))):
    """A published file of random weights.

    kind: mlp, linear, transformer, clipxgpt, prompted or lora; stop: a token made likely in some.
    → state (what the file holds), SimpleNamespace (width, heads, clip_width, length, clip_length, layers, gpt_layers)
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, heads = draw.choice(widths)
    facts = SimpleNamespace(width=width, heads=heads, length=draw.randint(1, 4), clip_length=draw.randint(1, 4), layers=draw.randint(1, 3))
    facts.clip_width = draw.choice((16, 32, 48) if kind == "clipxgpt" else (6, 10, 640 if kind == "transformer" else 12))
    facts.gpt_layers = draw.randint(1, 2)
    positions = 420 if kind == "prompted" else 64
    facts.gpt_layers = 1 if kind == "prompted" else facts.gpt_layers
    mapper = {"clipxgpt": "encoder", "prompted": "mlp", "lora": "mlp"}.get(kind, kind)

    def captioner(strengths=(0.0, 2.0, 4.0)):
        shapes = mapper_shapes(mapper, facts.clip_width, width, facts.length, facts.clip_length, facts.layers)
        gpt = draw_tensors(gpt2_shapes(width, facts.gpt_layers, vocabulary, positions), generator)
        row = gpt["transformer.wte.weight"][stop]
        gpt["transformer.ln_f.bias"] += draw.choice(strengths) * row / row.norm()
        gpt["lm_head.weight"] = gpt["transformer.wte.weight"]
        if draw.random() < 0.3:  # an output layer trained alone
            gpt["lm_head.weight"] = gpt["lm_head.weight"] + 0.1 * torch.randn(vocabulary, width, generator=generator)
        return draw_tensors(shapes, generator), gpt

    mapper_state, gpt_state = captioner()
    buffers = old_buffers("", facts.gpt_layers) if draw.random() < 0.5 else {}
    if kind == "clipxgpt":
        state = under("mp.", mapper_state) | under("td.model.", gpt_state | buffers)
        if seed % 5 == 0:
            state |= under("ie.model.", draw_tensors(vision_shapes(64, 2, 8, 3), generator))
            state["ie.model.embeddings.position_ids"] = torch.arange(10)[None]
        return state, facts
    if kind == "lora":
        whole = draw.random() < 0.5  # peft around the whole captioner, or around its language model
        rank, adapted = draw.choice([1, 2, 4]), {}
        for name, tensor in gpt_state.items():
            module, _, last = name.rpartition(".")
            if module.endswith(("c_attn", "c_proj", "c_fc")):
                adapted[f"{module}.base_layer.{last}"] = tensor
                if last == "weight":
                    adapted[f"{module}.lora_A.default.weight"] = torch.randn(rank, tensor.shape[0], generator=generator) * 0.2
                    adapted[f"{module}.lora_B.default.weight"] = torch.randn(tensor.shape[1], rank, generator=generator) * 0.2
            else:
                adapted[name] = tensor
        if whole:
            return under("base_model.model.", under("clip_project.", mapper_state) | under("gpt.", adapted)), facts
        return under("clip_project.", mapper_state) | under("gpt.base_model.model.", adapted), facts
    state = under("clip_project.", mapper_state) | under("gpt.", gpt_state | buffers)
    if kind == "prompted":
        base_mapper, base_gpt = captioner((3.0, 4.0))
        state |= under("original_model.", under("clip_project.", base_mapper) | under("gpt.", base_gpt))
    return state, facts


# -- forward passes ------------------------------------------------------------------------------------------------------


def part(state, prefix):
    """The tensors under `prefix`, float64, without it."""
    return {name[len(prefix) :]: tensor.double() for name, tensor in state.items() if name.startswith(prefix)}


def attend(queries, keys, values, heads, causal=False):
    """[..., T, E] three times → [..., T, E]."""
    size, mixed = queries.shape[-1] // heads, []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = queries[..., columns] @ keys[..., columns].transpose(-1, -2) / size**0.5
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        mixed.append(scores.softmax(-1) @ values[..., columns])
    return torch.cat(mixed, dim=-1)


def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


class PlainGPT2:
    """GPT-2 from a state dict without prefix; called as transformers' is, so that the plain decoders can use it."""

    def __init__(self, state, heads):
        self.state, self.heads = state, heads
        self.layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
        self.transformer = SimpleNamespace(wte=lambda tokens: state["transformer.wte.weight"][tokens])

    def conv1d(self, x, name):
        inner = f"{name}.base_layer" if f"{name}.base_layer.weight" in self.state else name
        out = x @ self.state[f"{inner}.weight"] + self.state[f"{inner}.bias"]
        if f"{name}.lora_A.default.weight" in self.state:
            a, b = self.state[f"{name}.lora_A.default.weight"], self.state[f"{name}.lora_B.default.weight"]
            out = out + ALPHA / len(a) * ((x @ a.T) @ b.T)
        return out

    def __call__(self, inputs_embeds, use_cache=False):
        x = inputs_embeds + self.state["transformer.wpe.weight"][: inputs_embeds.shape[-2]]
        for i in range(self.layers):
            at = f"transformer.h.{i}"
            mixed = self.conv1d(layer_norm(x, self.state, f"{at}.ln_1"), f"{at}.attn.c_attn")
            x = x + self.conv1d(attend(*mixed.chunk(3, -1), self.heads, causal=True), f"{at}.attn.c_proj")
            hidden = self.conv1d(layer_norm(x, self.state, f"{at}.ln_2"), f"{at}.mlp.c_fc")
            hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
            x = x + self.conv1d(hidden, f"{at}.mlp.c_proj")
        x = layer_norm(x, self.state, "transformer.ln_f")
        return SimpleNamespace(logits=x @ self.state["lm_head.weight"].T)


def map_prefix(kind, state, clip_embedding, facts):
    """clip_embedding [D] → prefix [1, P, E]."""

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    x = clip_embedding[None]
    if kind == "mlp":
        out = dense(torch.tanh(dense(x, "model.0")), "model.2")
    elif kind == "linear":
        out = x @ state["weight"].T + state["bias"]
    elif kind == "transformer":
        x = torch.cat([dense(x, "linear").view(facts.clip_length, facts.width), state["prefix_const"]])
        for i in range(facts.layers):
            at, inner = f"transformer.layers.{i}", layer_norm(x, state, f"transformer.layers.{i}.norm1")
            keys, values = dense(inner, f"{at}.attn.to_keys_values").chunk(2, -1)
            x = x + dense(attend(dense(inner, f"{at}.attn.to_queries"), keys, values, MAPPER_HEADS), f"{at}.attn.project")
            x = x + dense(torch.relu(dense(layer_norm(x, state, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        out = x[facts.clip_length :]
    else:
        for i in range(facts.layers):  # a sequence of one attends to itself alone
            at = f"transformer_encoder.layers.{i}"
            mixed = x @ state[f"{at}.self_attn.in_proj_weight"].T + state[f"{at}.self_attn.in_proj_bias"]
            x = layer_norm(x + dense(attend(*mixed.chunk(3, -1), ENCODER_HEADS), f"{at}.self_attn.out_proj"), state, f"{at}.norm1")
            x = layer_norm(x + dense(torch.relu(dense(x, f"{at}.linear1")), f"{at}.linear2"), state, f"{at}.norm2")
        out = dense(x, "mapper")
    return out.reshape(1, facts.length, facts.width)


def clipxgpt_caption(gpt, prefix, bos, eos, most=40):
    """The published loop for one picture, as it stands, in-place positions and all. prefix: [1, P, E] → tokens, mean log-probability."""
    start = torch.cat([gpt.state["transformer.wte.weight"][bos][None], prefix[0]])
    tokens, total = [], 0.0
    for _ in range(most):
        if tokens:
            embeds = torch.cat([start, gpt.state["transformer.wte.weight"][torch.tensor(tokens)]])
        else:
            embeds = start
        embeds += gpt.state["transformer.wpe.weight"][: len(embeds)]  # in place: the first time, `start` itself changes
        costs = gpt(embeds).logits[-1].log_softmax(-1)
        tokens.append(int(costs.argmax()))
        total += float(costs.max())
        if tokens[-1] == eos:
            break
    return tokens, total / len(tokens)
