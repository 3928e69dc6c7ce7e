"""The published recipe (arXiv:2111.09734), written out plainly and slowly: what the project's fast code is held to.

Nothing here is shared with the project. Letters: B batch, D CLIP width, E language-model width, P prefix length,
K projected CLIP length, T caption tokens, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

# As published: AdamW without weight decay, and these constants.
BETAS, EPS = (0.9, 0.999), 1e-6
# As published: eight heads in every block of the transformer mapper, a hidden layer twice as wide, ReLU.
HEADS, RATIO = 8, 2
# As published: the padding value, and the target that the loss ignores. It is also the token "!".
PAD = 0


class PublishedMLP(nn.Module):
    """[B, D] → [B, P, E] by two linear layers with a tanh between them."""

    def __init__(self, clip_width, prefix_length, width):
        super().__init__()
        self.shape = (prefix_length, width)
        hidden = prefix_length * width // 2
        self.model = nn.Sequential(nn.Linear(clip_width, hidden), nn.Tanh(), nn.Linear(hidden, prefix_length * width))

    def forward(self, clip_embedding):
        return self.model(clip_embedding).view(-1, *self.shape)


class PublishedAttention(nn.Module):
    """Every vector attends to every vector; queries, keys and values without bias."""

    def __init__(self, width):
        super().__init__()
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x):
        size = x.shape[-1] // HEADS
        queries = self.to_queries(x)
        keys_values = self.to_keys_values(x)
        keys, values = keys_values[..., : x.shape[-1]], keys_values[..., x.shape[-1] :]
        heads = []
        for head in range(HEADS):
            columns = slice(head * size, (head + 1) * size)
            weights = queries[..., columns] @ keys[..., columns].transpose(1, 2) * size**-0.5  # [B, K+P, K+P]
            heads.append(weights.softmax(dim=-1) @ values[..., columns])
        return self.project(torch.cat(heads, dim=-1))


class PublishedBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PublishedAttention(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, RATIO * width), nn.Linear(RATIO * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(torch.relu(self.mlp.fc1(self.norm2(x))))


class PublishedTransformer(nn.Module):
    """[B, D] → [B, P, E]: K projected vectors and P learned ones through the blocks; the last P are the prefix."""

    def __init__(self, clip_width, prefix_length, clip_length, width, num_layers):
        super().__init__()
        self.clip_length, self.prefix_length = clip_length, prefix_length
        self.linear = nn.Linear(clip_width, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(PublishedBlock(width) for _ in range(num_layers))

    def forward(self, clip_embedding):
        batch = len(clip_embedding)
        projected = self.linear(clip_embedding).view(batch, self.clip_length, -1)
        x = torch.cat([projected, self.prefix_const.expand(batch, -1, -1)], dim=1)  # [B, K+P, E]
        for layer in self.transformer.layers:
            x = layer(x)
        return x[:, self.clip_length :]


class PublishedClipCap(nn.Module):
    """Mapper and GPT-2 under the published names; one row for each caption, the prefix before it."""

    def __init__(self, gpt, clip_width, prefix_length, clip_length=None, num_layers=None):
        super().__init__()
        self.gpt = gpt
        width = gpt.config.n_embd
        if num_layers is None:
            self.clip_project = PublishedMLP(clip_width, prefix_length, width)
        else:
            self.clip_project = PublishedTransformer(clip_width, prefix_length, clip_length, width, num_layers)

    def forward(self, clip_embedding, tokens, mask):
        """clip_embedding [B, D], tokens [B, T], mask [B, T] → logits [B, T, V] that predict the tokens."""
        return caption_logits(self.gpt, self.clip_project(clip_embedding), tokens, mask)


def caption_logits(gpt, prefix, tokens, mask):
    """Plain forward over padded rows: prefix [B, P, E], tokens [B, T], mask [B, T] bool → [B, T, V]."""
    length = prefix.shape[1]
    inputs = torch.cat([prefix, gpt.transformer.wte(tokens)], dim=1)
    mask = torch.cat([torch.ones(prefix.shape[:2], dtype=torch.bool), mask], dim=1)
    logits = gpt(inputs_embeds=inputs, attention_mask=mask.long()).logits
    return logits[:, length - 1 : -1]


def published_length(lengths):
    """The padded length as published: mean plus ten standard deviations, at most the longest."""
    lengths = torch.tensor(lengths, dtype=torch.float32)
    return min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))


def pad_captions(captions, length):
    """Lists of tokens → tokens [B, T], mask [B, T]; longer captions are cut, shorter ones padded with PAD."""
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


def train_published(model, embeddings, captions, rows, batches, lr, warmup, only_prefix):
    """The published loop: one step for each list of caption numbers in `batches`. → losses, learning rates."""
    length = published_length([len(caption) for caption in captions])
    model.train()
    if only_prefix:
        model.gpt.eval()
    trained = model.clip_project.parameters() if only_prefix else model.parameters()
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses, rates = [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, warmup, len(batches))
        rates.append(group["lr"])
        tokens, mask = pad_captions([captions[number] for number in batch], length)
        model.zero_grad()
        logits = model(embeddings[[rows[number] for number in batch]], tokens, mask)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=PAD)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, rates


@torch.no_grad()
def next_logits(gpt, prefix, sequences):
    """Logits [N, V] after prefix [1, P, E] and each of the N equally long token lists, in one full forward, no cache."""
    inputs = prefix.expand(len(sequences), -1, -1)
    if sequences[0]:
        inputs = torch.cat([inputs, gpt.transformer.wte(torch.tensor(sequences))], dim=1)
    return gpt(inputs_embeds=inputs, use_cache=False).logits[:, -1]


def beam_search(gpt, prefix, beam_size, entry_length, temperature, stop):
    """The published beam search for one picture: prefix [1, P, E] → [(tokens, mean log-probability)], best first."""
    temperature = temperature if temperature > 0 else 1.0
    beams = []  # of [tokens, sum, length, stopped]
    for step in range(entry_length):
        if not beams:
            costs = (next_logits(gpt, prefix, [[]]) / temperature).log_softmax(dim=-1)[0]
            sums, tokens = costs.topk(beam_size)
            beams = [[[int(token)], float(total), 1, False] for total, token in zip(sums, tokens)]
        else:
            costs = (next_logits(gpt, prefix, [beam[0] for beam in beams]) / temperature).log_softmax(dim=-1)
            candidates = []
            for (tokens, total, length, stopped), row in zip(beams, costs.tolist()):
                if stopped:
                    candidates.append((total / length, [*tokens, 0], total, length, True))
                    continue
                for token, cost in enumerate(row):
                    candidates.append(((total + cost) / (length + 1), [*tokens, token], total + cost, length + 1, False))
            candidates.sort(key=lambda candidate: -candidate[0])
            beams = [list(candidate[1:]) for candidate in candidates[:beam_size]]
        for beam in beams:
            beam[3] = beam[3] or beam[0][-1] == stop
        if all(beam[3] for beam in beams):
            break
    ranked = sorted(beams, key=lambda beam: -beam[1] / beam[2])
    return [(tokens[:length], total / length) for tokens, total, length, _ in ranked]


def greedy_search(gpt, prefix, entry_length, temperature, stop):
    """The likeliest token, again and again: prefix [1, P, E] → (tokens, mean log-probability)."""
    temperature = temperature if temperature > 0 else 1.0
    tokens, total = [], 0.0
    while len(tokens) < entry_length and (not tokens or tokens[-1] != stop):
        costs = (next_logits(gpt, prefix, [tokens]) / temperature).log_softmax(dim=-1)[0]
        tokens.append(int(costs.argmax()))
        total += float(costs.max())
    return tokens, total / len(tokens)
