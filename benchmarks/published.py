"""The published recipe (arXiv:2111.09734 and its code), written plainly: what benchmarks and tests hold the project to.

    features    the picture of each caption is read, preprocessed and encoded alone: five captions are five encodings
    training    one row per caption with its own prefix, padded to the corpus maximum; logits at every position; float32; plain AdamW;
                GPT-2's gradients are computed even where only the mapper is trained; adapters are peft's, beside frozen weights
    decoding    one picture at a time; every step reads prefix and caption again from the beginning

Nothing here is shared with the project. B captions of a batch, D width of the embedding, P prefix_length, K clip_length, E width of the
language model, T tokens, V vocabulary. Parameters carry the published names, so that one state dict fits both sides.
"""

import math
import pickle

import torch
from torch import nn
from torch.nn import functional as F

PAD = 0  # as published: the padding value, and the target that the loss ignores; it is also the token "!"
HEADS = 8  # of the transformer mapper, as published
BETAS, EPS = (0.9, 0.999), 1e-6  # of AdamW, as published; no weight decay
LEARNING_RATE = 2e-5


# -- features ------------------------------------------------------------------------------------------------------------


def encode_captions(clip, preprocess, captions, out):
    """Encode the picture of every caption, one at a time, and pickle the result.

    Args:
        clip: OpenAI's model in float32.
        preprocess: its preprocessing, from a PIL picture to [3, H, W].
        captions: dicts with image (a path) and caption.
        out: file to write.

    Returns:
        [number of captions, D] float32.
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
    """A pre-norm block of the transformer mapper, [B, K + P, E] to the same."""

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
    """[B, D] to [B, P, E]: K vectors from the embedding and P learned ones pass the blocks; the last P are the prefix."""

    def __init__(self, clip_width, width, prefix_length, clip_length, num_layers):
        super().__init__()
        self.clip_length = clip_length
        self.linear = nn.Linear(clip_width, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(MapperBlock(width) for _ in range(num_layers))

    def forward(self, clip_embedding):
        batch = len(clip_embedding)
        clip_vectors = self.linear(clip_embedding).view(batch, self.clip_length, -1)  # [B, K, E]
        x = torch.cat([clip_vectors, self.prefix_const.expand(batch, -1, -1)], dim=1)  # [B, K + P, E]
        for layer in self.transformer.layers:
            x = layer(x)
        return x[:, self.clip_length :]  # [B, P, E]


class MLPMapper(nn.Module):
    """[B, D] to [B, P, E] by two linear layers with a tanh between them."""

    def __init__(self, clip_width, width, prefix_length):
        super().__init__()
        self.width = width
        hidden = prefix_length * width // 2
        self.model = nn.Sequential(nn.Linear(clip_width, hidden), nn.Tanh(), nn.Linear(hidden, prefix_length * width))

    def forward(self, clip_embedding):
        return self.model(clip_embedding).view(len(clip_embedding), -1, self.width)


class PublishedClipCap(nn.Module):
    """Mapper and GPT-2 under the published names: the MLP, or the transformer where num_layers is given."""

    def __init__(self, gpt, clip_width, prefix_length, clip_length=None, num_layers=None):
        super().__init__()
        self.gpt = gpt
        if num_layers is None:
            self.clip_project = MLPMapper(clip_width, gpt.config.n_embd, prefix_length)
        else:
            self.clip_project = TransformerMapper(clip_width, gpt.config.n_embd, prefix_length, clip_length, num_layers)

    def forward(self, clip_embedding, tokens, mask):
        """Return the logits that predict the tokens: [B, D], [B, T] and [B, T] bool to [B, T, V]."""
        return caption_logits(self.gpt, self.clip_project(clip_embedding), tokens, mask)


def caption_logits(gpt, prefix, tokens, mask):
    """Run padded rows through GPT-2: prefix [B, P, E], tokens [B, T] and mask [B, T] bool to [B, T, V]."""
    inputs = torch.cat([prefix, gpt.transformer.wte(tokens)], dim=1)  # [B, P + T, E]
    mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)  # [B, P + T]
    logits = gpt(inputs_embeds=inputs, attention_mask=mask.float(), use_cache=False).logits  # [B, P + T, V], all of them
    return logits[:, prefix.shape[1] - 1 : -1]  # [B, T, V]


# -- training ------------------------------------------------------------------------------------------------------------


def published_length(lengths):
    """The length in tokens to which every caption is padded or cut: mean plus ten standard deviations, at most the longest."""
    lengths = torch.tensor(lengths, dtype=torch.float32)
    return min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))


def pad_captions(captions, length):
    """Pad or cut lists of tokens to one length: tokens [B, T] int64 and mask [B, T] bool."""
    tokens = torch.full((len(captions), length), PAD)
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for row, caption in enumerate(captions):
        caption = caption[:length]
        tokens[row, : len(caption)] = torch.tensor(caption, dtype=torch.long)
        mask[row, : len(caption)] = True
    return tokens, mask


def learning_rate(step, peak, warmup, total):
    """Linear from 0 up to `peak` in `warmup` steps, then linear down to 0 at `total`; `step` counts from 0."""
    if step < warmup:
        return peak * step / max(1, warmup)
    return peak * max(0.0, (total - step) / max(1, total - warmup))


def add_adapters(gpt, rank, alpha, dropout, targets):
    """Put peft's low-rank adapters beside these layers of GPT-2, and freeze everything else in it."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=True)
    inject_adapter_in_model(settings, gpt)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(".lora_" in name)


class PublishedTraining:
    """The published training step. Of a GPT-2 with adapters, only the adapters and the mapper are trained."""

    def __init__(self, model, length, only_prefix, lr=LEARNING_RATE):
        """Make the optimizer.

        Args:
            model: PublishedClipCap.
            length: tokens to which every caption is padded.
            only_prefix: train the mapper only. GPT-2's gradients are computed all the same and pile up unused, since only the mapper's
                are cleared.
            lr: learning rate.
        """
        self.model, self.length, self.only_prefix, self.steps = model, length, only_prefix, 0
        whole = model.clip_project if only_prefix else model
        self.trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, foreach=False, fused=False)
        self.train()

    def train(self):
        """Switch dropout on in what is trained, adapters included; a frozen GPT-2 stays in eval mode."""
        self.model.train()
        if self.only_prefix or not all(parameter.requires_grad for parameter in self.model.gpt.parameters()):
            self.model.gpt.eval()
        for name, module in self.model.gpt.named_modules():
            if ".lora_" in name:
                module.train()

    def loss(self, clip_embedding, captions):
        """Return the mean cross-entropy per token of B lists of tokens; clip_embedding [B, D] has one row per caption."""
        tokens, mask = (tensor.to(clip_embedding.device) for tensor in pad_captions(captions, self.length))
        logits = self.model(clip_embedding, tokens, mask)  # [B, T, V]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=PAD)

    def step(self, clip_embedding, captions):
        """Take one optimizer step and return its loss."""
        loss = self.loss(clip_embedding, captions)
        loss.backward()
        self.steps += 1
        for group in self.optimizer.param_groups:  # transformers' former AdamW adds EPS before the bias correction
            group["eps"] = EPS / math.sqrt(1 - BETAS[1] ** self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def train_published(model, embeddings, captions, rows, batches, lr, warmup, only_prefix):
    """Run the published loop, one step per list of caption numbers in `batches`. Returns losses and learning rates."""
    training = PublishedTraining(model, published_length([len(caption) for caption in captions]), only_prefix, lr)
    losses, rates = [], []
    for step, batch in enumerate(batches):
        rates.append(learning_rate(step, lr, warmup, len(batches)))
        for group in training.optimizer.param_groups:
            group["lr"] = rates[-1]
        losses.append(training.step(embeddings[[rows[number] for number in batch]], [captions[number] for number in batch]))
    return losses, rates


# -- decoding ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_logits(gpt, prefix, sequences):
    """Logits [N, V] after prefix [1, P, E] and each of N equally long lists of tokens, in one full pass without a cache."""
    inputs = prefix.expand(len(sequences), -1, -1)
    if sequences[0]:
        inputs = torch.cat([inputs, gpt.transformer.wte(torch.tensor(sequences, device=prefix.device))], dim=1)  # [N, P + T, E]
    return gpt(inputs_embeds=inputs, use_cache=False).logits[:, -1]


@torch.no_grad()
def beam_search(gpt, prefix, beam_size, entry_length, temperature, stop):
    """Search for one picture, prefix [1, P, E]. Returns (tokens, mean log-probability) of each beam, best first."""
    temperature = temperature if temperature > 0 else 1.0
    sequences = [[]]
    for step in range(entry_length):
        log_probs = (next_logits(gpt, prefix, sequences) / temperature).log_softmax(-1)  # [beams, V]
        if step == 0:
            sums, taken = log_probs[0].topk(beam_size)
            sequences = [[token] for token in taken.tolist()]
            lengths, stopped = torch.ones_like(sums), taken == stop
        else:
            log_probs[stopped] = -torch.inf
            log_probs[stopped, 0] = 0
            lengths[~stopped] += 1
            means, place = ((sums[:, None] + log_probs) / lengths[:, None]).flatten().topk(beam_size)
            source, taken = place // log_probs.shape[1], place % log_probs.shape[1]
            lengths = lengths[source]
            sums = means * lengths
            sequences = [[*sequences[beam], token] for beam, token in zip(source.tolist(), taken.tolist())]
            stopped = stopped[source] | (taken == stop)
        if stopped.all():
            break
    scores = sums / lengths
    return [(sequences[beam][: int(lengths[beam])], scores[beam].item()) for beam in scores.argsort(descending=True).tolist()]


@torch.no_grad()
def greedy_search(gpt, prefix, entry_length, temperature, stop):
    """Take the likeliest token again and again, for one picture. Returns tokens and their mean log-probability."""
    temperature = temperature if temperature > 0 else 1.0
    tokens, total = [], 0.0
    while len(tokens) < entry_length and (not tokens or tokens[-1] != stop):
        log_probs = (next_logits(gpt, prefix, [tokens]) / temperature).log_softmax(-1)[0]  # [V]
        tokens.append(int(log_probs.argmax()))
        total += float(log_probs.max())
    return tokens, total / len(tokens)
