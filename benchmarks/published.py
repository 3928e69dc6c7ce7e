"""The published recipe (arXiv:2111.09734 and its code), written plainly: what benchmarks/run.py measures ours against.

    features    each caption's picture read, preprocessed and encoded alone: five captions are five encodings
    training    one row a caption, each with its own prefix, padded to the corpus maximum; logits at every place; AdamW unfused, float32;
                the gradients of GPT-2 are computed even where only the mapper is trained; adapters are peft's, beside frozen weights
    decoding    one picture at a time; every step reads prefix and caption again from their beginning

B captions of a batch, D width of the embedding, P prefix_length, K clip_length, E language-model width, T tokens, V vocabulary.
Parameters carry the published names, so that a captioner's state dict fits both sides.
"""

import pickle

import torch
from torch import nn
from torch.nn import functional as F

PAD = 0  # as published: pads, and is left out of the loss; it is also the token "!"
HEADS = 8  # of the transformer mapper
LEARNING_RATE = 2e-5


# -- features ------------------------------------------------------------------------------------------------------------


def encode_captions(clip, preprocess, captions, out):
    """Encode the picture of every caption record, one at a time, and pickle the result → embeddings [number of captions, D].

    clip: openai's model in float32; captions: list of dicts with image (a path) and caption.
    """
    from PIL import Image
    from skimage import io

    device = next(clip.parameters()).device
    rows = []
    for caption in captions:
        picture = preprocess(Image.fromarray(io.imread(caption["image"]))).unsqueeze(0).to(device)  # [1, 3, H, W]
        with torch.no_grad():
            rows.append(clip.encode_image(picture).cpu())  # [1, D]
    rows = torch.cat(rows)
    with open(out, "wb") as file:
        pickle.dump({"clip_embedding": rows, "captions": captions}, file)
    return rows


# -- the model -----------------------------------------------------------------------------------------------------------


class MapperBlock(nn.Module):
    """A pre-norm block of the transformer mapper: [B, K + P, E] → the same."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.to_queries = nn.Linear(width, width, bias=False)
        self.attn.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.attn.project = nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        normed = self.norm1(x)
        queries = self.attn.to_queries(normed).view(batch, length, HEADS, -1)
        keys, values = self.attn.to_keys_values(normed).view(batch, length, 2, HEADS, -1).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * (width // HEADS) ** -0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), values)
        x = x + self.attn.project(mixed.reshape(batch, length, width))
        return x + self.mlp.fc2(torch.relu(self.mlp.fc1(self.norm2(x))))


class TransformerMapper(nn.Module):
    """[B, D] → [B, P, E]: K vectors from the embedding, P learned ones behind them, blocks; the last P come out."""

    def __init__(self, clip_width, width, prefix_length, clip_length, num_layers):
        super().__init__()
        self.clip_length = clip_length
        self.linear = nn.Linear(clip_width, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(MapperBlock(width) for _ in range(num_layers))

    def forward(self, clip_embedding):
        batch = len(clip_embedding)
        clip_vectors = self.linear(clip_embedding).view(batch, self.clip_length, -1)
        x = torch.cat([clip_vectors, self.prefix_const.expand(batch, -1, -1)], dim=1)  # [B, K + P, E]
        for layer in self.transformer.layers:
            x = layer(x)
        return x[:, self.clip_length :]


class MLPMapper(nn.Module):
    """[B, D] → [B, P, E]: Linear, tanh, Linear."""

    def __init__(self, clip_width, width, prefix_length):
        super().__init__()
        self.width = width
        hidden = prefix_length * width // 2
        self.model = nn.Sequential(nn.Linear(clip_width, hidden), nn.Tanh(), nn.Linear(hidden, prefix_length * width))

    def forward(self, clip_embedding):
        return self.model(clip_embedding).view(len(clip_embedding), -1, self.width)


class PublishedCaptioner(nn.Module):
    """Mapper and GPT-2. gpt: a transformers GPT2LMHeadModel; config: the models.captioner.CaptionConfig of the other side."""

    def __init__(self, gpt, config):
        super().__init__()
        self.gpt = gpt
        sizes = (config.clip_width, gpt.config.n_embd, config.prefix_length)
        if config.mapping_type == "mlp":
            self.clip_project = MLPMapper(*sizes)
        else:
            self.clip_project = TransformerMapper(*sizes, config.clip_length, config.num_layers)

    def forward(self, clip_embedding, tokens, mask):
        """clip_embedding [B, D], tokens [B, T], mask [B, P + T] → logits [B, P + T, V], all of them."""
        prefix = self.clip_project(clip_embedding)  # [B, P, E]
        inputs = torch.cat([prefix, self.gpt.transformer.wte(tokens)], dim=1)  # [B, P + T, E]
        return self.gpt(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits


# -- training ------------------------------------------------------------------------------------------------------------


def pad_captions(captions, length, prefix_length):
    """Lists of tokens → tokens [B, T], mask [B, P + T] of floats; T is `length`, where longer captions are cut."""
    tokens = torch.full((len(captions), length), PAD)
    mask = torch.zeros(len(captions), prefix_length + length)
    for row, caption in enumerate(captions):
        caption = caption[:length]
        tokens[row, : len(caption)] = torch.tensor(caption, dtype=torch.long)
        mask[row, : prefix_length + len(caption)] = 1
    return tokens, mask


def add_adapters(gpt, rank, alpha, dropout, targets):
    """Put peft's low-rank adapters beside these layers of GPT-2, and freeze everything else of it."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=True)
    inject_adapter_in_model(settings, gpt)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(".lora_" in name)


class PublishedTraining:
    """The published training step over a model; of a GPT-2 with adapters only they are trained, and the mapper.

    length: tokens to which every caption is padded; only_prefix: train the mapper only. GPT-2's gradients are then computed all the same,
    and pile up unused, since only the mapper's are cleared.
    """

    def __init__(self, model, prefix_length, length, only_prefix):
        self.model, self.prefix_length, self.length = model, prefix_length, length
        whole = model.clip_project if only_prefix else model
        self.trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, foreach=False, fused=False
        )
        self.only_prefix = only_prefix
        self.train()

    def train(self):
        """Dropout on in what is trained, adapters included; the weights of a GPT-2 that are not trained stay in eval mode."""
        self.model.train()
        if self.only_prefix or not all(parameter.requires_grad for parameter in self.model.gpt.parameters()):
            self.model.gpt.eval()
        for name, module in self.model.gpt.named_modules():
            if ".lora_" in name:
                module.train()

    def loss(self, clip_embedding, captions):
        """clip_embedding [B, D], one row a caption; captions: B lists of tokens → mean cross-entropy of a token, a scalar tensor."""
        device = clip_embedding.device
        tokens, mask = (tensor.to(device) for tensor in pad_captions(captions, self.length, self.prefix_length))
        logits = self.model(clip_embedding, tokens, mask)[:, self.prefix_length - 1 : -1]  # [B, T, V]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=PAD)

    def step(self, clip_embedding, captions):
        """One optimiser step → its loss."""
        loss = self.loss(clip_embedding, captions)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


# -- decoding ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(gpt, prefix, beam_size, entry_length, stop):
    """Beams for one picture, prefix [1, P, E] → lists of tokens, best first."""
    embeds, tokens = prefix, None
    lengths = torch.ones(beam_size, device=prefix.device)
    for _ in range(entry_length):
        log_probs = gpt(inputs_embeds=embeds, use_cache=False).logits[:, -1].log_softmax(-1)  # [beams, V]
        if tokens is None:
            sums, taken = log_probs[0].topk(beam_size)
            embeds = prefix.expand(beam_size, -1, -1)
            tokens = taken[:, None]
            stopped = taken == stop
        else:
            log_probs[stopped] = -torch.inf
            log_probs[stopped, 0] = 0
            sums = sums[:, None] + log_probs
            lengths[~stopped] += 1
            means, place = (sums / lengths[:, None]).flatten().topk(beam_size)
            source, taken = place // log_probs.shape[1], place % log_probs.shape[1]
            lengths = lengths[source]
            sums = means * lengths
            embeds = embeds[source]
            tokens = torch.cat([tokens[source], taken[:, None]], dim=1)
            stopped = stopped[source] | (taken == stop)
        embeds = torch.cat([embeds, gpt.transformer.wte(taken)[:, None]], dim=1)  # [beams, P + T, E]
        if stopped.all():
            break
    order = (sums / lengths).argsort(descending=True)
    return [tokens[beam, : int(lengths[beam])].tolist() for beam in order]


@torch.no_grad()
def greedy_search(gpt, prefix, entry_length, stop):
    """The likeliest token, again and again, for one picture: prefix [1, P, E] → a list of tokens."""
    embeds, tokens = prefix, []
    for _ in range(entry_length):
        taken = gpt(inputs_embeds=embeds, use_cache=False).logits[:, -1].argmax(-1)  # [1]
        tokens.append(int(taken))
        embeds = torch.cat([embeds, gpt.transformer.wte(taken)[:, None]], dim=1)
        if tokens[-1] == stop:
            break
    return tokens
