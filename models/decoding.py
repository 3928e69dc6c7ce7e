"""Captions out of embeddings: greedy, beam and sampling, batched over images, with a key-value cache.

B images, K beams (or samples) an image, P prefix_length, V vocabulary, T tokens so far.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common import UserError

from .captioner import stop_token_id
from .clipxgpt import decode_as_published
from .prompts import add_prompts

DECODINGS = ("beam", "greedy", "sample")


@torch.inference_mode()
def generate(
    model,
    clip_embedding,
    decoding="beam",
    beam_size=5,
    entry_length=67,
    temperature=1.0,
    top_p=1.0,
    stop_token=None,
    num_captions=1,
    seed=None,
):
    """Caption a batch of embeddings.

    model: ClipCaptionModel with its tokenizer; clip_embedding: [B, D].
    decoding: "beam" (the published search), "greedy" (the same with one beam), or "sample" (num_captions draws an image).
    entry_length: most tokens of a caption. temperature divides the logits; 0 or less means 1, as published.
    top_p: sampling keeps the likeliest tokens whose probabilities reach this sum.
    stop_token: text of one token, which overrides the checkpoint's. seed: of the draws; the same image in the same place of the
    batch then gets the same caption.
    → for each image, num_captions pairs (text, score), best first; score is the mean log-probability of a token, in nats.
    Where the config has a prompt, it stands between prefix and caption (models/prompts.py). Published CLIPxGPT weights decode by their own
    greedy loop, whatever `decoding` says but "sample" (models/clipxgpt.py).
    The model is left in eval mode. Raises UserError for arguments that do not fit.
    """
    if decoding not in DECODINGS:
        raise UserError(f"decoding is {decoding!r}; expected one of {', '.join(DECODINGS)}")
    beams = {"beam": beam_size, "greedy": 1, "sample": num_captions}[decoding]
    vocabulary = model.gpt.get_output_embeddings().weight.shape[0]
    if decoding == "beam" and not 1 <= beams <= vocabulary:
        raise UserError(f"beam_size is {beams}; expected 1 to {vocabulary} (the vocabulary)")
    if not 1 <= num_captions <= max(beams, 1):
        advice = "Take decoding='sample', or a larger beam_size." if decoding == "greedy" else "Take a larger beam_size."
        raise UserError(f"num_captions is {num_captions}; {decoding} decoding gives 1 to {beams}. {advice}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; expected more than 0 and at most 1")
    if model.config.decoding_style == "clipxgpt" and (decoding == "sample" or num_captions > 1):
        raise UserError("CLIPxGPT's published weights decode greedily, one caption an image. Ask for no sample and no more.")
    if entry_length < 1:
        raise UserError(f"entry_length is {entry_length}; expected at least 1 token")
    positions = getattr(model.gpt.config, "max_position_embeddings", None)
    if positions is not None:
        if model.config.prefix_length > positions:
            raise UserError(f"a prefix of {model.config.prefix_length} tokens does not fit the language model's {positions} positions")
    try:
        stop = model.stop_token_id if stop_token is None else stop_token_id(model.tokenizer, stop_token)
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(clip_embedding) == 0:
        return []

    model.eval()
    prefix = model.encode_prefix(clip_embedding.to(model.clip_device))  # [B, P, E]
    prefix = prefix.to(model.gpt.get_input_embeddings().weight.dtype)
    finite = torch.isfinite(prefix).flatten(1).all(1)
    if not finite.all():
        image = int((~finite).nonzero()[0])
        raise UserError(f"embedding {image} gives a prefix that is not finite: it holds NaN, or zeros only. Encode the image again.")
    temperature = temperature if temperature > 0 else 1.0
    if model.config.decoding_style == "clipxgpt":
        return [[caption] for caption in decode_as_published(model, prefix, entry_length, temperature, stop)]

    first_seed = torch.seed() % 2**40 if seed is None else seed
    captions = [None] * len(prefix)
    for images, start in add_prompts(model, clip_embedding, prefix):
        most_tokens = entry_length if positions is None else min(entry_length, positions - start.shape[1] + 1)  # the last is never read
        if most_tokens < 1:
            raise UserError(f"prefix and prompt, {start.shape[1]} tokens, do not fit the language model's {positions} positions")
        if decoding == "sample":
            seeds = [first_seed + image for image in images]
            tokens, lengths, scores = _sample(model.gpt, start, beams, most_tokens, temperature, top_p, stop, seeds)
        else:
            tokens, lengths, scores = _search_beams(model.gpt, start, beams, most_tokens, temperature, stop)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :num_captions]
        for row, image in enumerate(images):
            captions[image] = [
                (_text(model.tokenizer, tokens[row, beam, : lengths[row, beam]]), scores[row, beam].item()) for beam in order[row]
            ]
    return captions


def _text(tokenizer, ids):
    """The caption of a row of tokens: an end-of-text token is left out, any other stop token is part of the text."""
    ids = ids.tolist()
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return tokenizer.decode(ids)


class _Decoder:
    """The language model with its cache: rows in, logits of the next token out, divided by the temperature."""

    def __init__(self, gpt, temperature, most_tokens):
        """most_tokens: slots a row will need, prefix and caption."""
        self.gpt = gpt
        self.temperature = temperature
        self.cache = DynamicCache(config=gpt.config)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self.cache.layers = [_InPlaceLayer(most_tokens) for _ in self.cache.layers]

    def __call__(self, **inputs):
        """input_ids [rows, 1] or inputs_embeds [rows, P, E] → logits [rows, V], float32 or better."""
        logits = self.gpt(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits if self.temperature == 1 else logits / self.temperature

    def keep(self, rows):
        """Keep these rows of the cache, in this order, repeats allowed."""
        self.cache.batch_select_indices(rows)

    def reorder(self, rows, prefix_length):
        """Keep these rows, each in the place of one with the same prefix, so that only what follows the prefix has to move."""
        for layer in self.cache.layers:
            if isinstance(layer, _InPlaceLayer):
                layer.reorder(rows, prefix_length)
            else:
                layer.batch_select_indices(rows)


class _InPlaceLayer(DynamicLayer):
    """A layer of the cache that writes into room set aside at the start, where the library's copies all it has at every token."""

    def __init__(self, most_tokens):
        super().__init__()
        self.most_tokens = most_tokens
        self.store = None  # [2, rows, heads, most_tokens, head width]: keys and values
        self.length = 0

    def _show(self):
        self.keys, self.values = self.store[..., : self.length, :]
        return self.keys, self.values

    def update(self, key_states, value_states, *args, **kwargs):
        """Add keys and values [rows, heads, n, head width] → all so far."""
        if self.store is None:
            rows, heads, _, width = key_states.shape
            self.store = key_states.new_empty(2, rows, heads, self.most_tokens, width)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.length + key_states.shape[-2]
        self.store[0, ..., self.length : end, :] = key_states
        self.store[1, ..., self.length : end, :] = value_states
        self.length = end
        return self._show()

    def batch_select_indices(self, indices):
        """Keep these rows, in this order, repeats allowed."""
        kept = self.store.new_empty(2, len(indices), *self.store.shape[2:])
        kept[..., : self.length, :] = self.store[:, indices, :, : self.length]
        self.store = kept
        self._show()

    def reorder(self, indices, start):
        """Keep these rows from slot `start` on; what stands before stays."""
        self.store[..., start : self.length, :] = self.store[:, indices, :, start : self.length]


def _search_beams(gpt, prefix, beams, entry_length, temperature, stop):
    """The published beam search, over a batch of images at once.

    At every step the candidates of an image, its beams × V, are ranked by sum of log-probabilities / length. A stopped beam goes on
    only with token 0, at no cost and without growing, so that it competes with its score as it stands. An image whose beams have all
    stopped leaves the batch.
    prefix: [B, P, E] → tokens [B, K, T], lengths [B, K], scores [B, K] (sum / length).
    """
    device = prefix.device
    images = len(prefix)
    out_tokens = torch.zeros(images, beams, entry_length, dtype=torch.long, device=device)
    out_lengths = torch.ones(images, beams, dtype=torch.long, device=device)
    out_scores = torch.empty(images, beams, dtype=torch.get_default_dtype(), device=device)

    decoder = _Decoder(gpt, temperature, prefix.shape[1] + entry_length)
    scores, token = _likeliest(decoder(inputs_embeds=prefix), beams)  # [B, K]
    out_scores = out_scores.to(scores.dtype)
    decoder.keep(torch.arange(images, device=device).repeat_interleave(beams))
    running = torch.arange(images, device=device)  # which image each group of beams belongs to
    tokens = token[..., None]  # [B, K, T]
    lengths = torch.ones_like(token, dtype=scores.dtype)
    stopped = token == stop

    for step in range(1, entry_length + 1):
        done = stopped.all(dim=1)
        if step == entry_length:
            done = torch.ones_like(done)
        if done.any():
            finished = running[done]
            out_tokens[finished, :, : tokens.shape[-1]] = tokens[done]
            out_lengths[finished] = lengths[done].long()
            out_scores[finished] = scores[done] / lengths[done]
            if done.all():
                break
            left = ~done
            rows = torch.arange(len(running) * beams, device=device).view(-1, beams)[left].flatten()
            decoder.keep(rows)
            running, tokens, scores, lengths, stopped = (t[left] for t in (running, tokens, scores, lengths, stopped))

        # Within a beam candidates rank as their log-probabilities do, so that its `beams` likeliest are all that can survive.
        gained, token = _likeliest(decoder(input_ids=tokens[..., -1].reshape(-1, 1)), beams)  # [B · K, K]
        gained, token = gained.view(len(running), beams, beams), token.view(len(running), beams, beams)
        gained = gained.masked_fill(stopped[..., None], -torch.inf)
        gained[..., 0] = gained[..., 0].masked_fill(stopped, 0.0)
        token[..., 0] = token[..., 0].masked_fill(stopped, 0)
        lengths = lengths + (~stopped).to(lengths.dtype)
        means, place = ((scores[..., None] + gained) / lengths[..., None]).flatten(1).topk(beams, dim=-1)  # [B, K] of K · K
        source, token = place // beams, token.flatten(1).gather(1, place)
        lengths = lengths.gather(1, source)
        scores = means * lengths
        stopped = stopped.gather(1, source) | (token == stop)
        tokens = torch.cat([tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1])), token[..., None]], dim=-1)
        if beams > 1:
            decoder.reorder((source + torch.arange(len(running), device=device)[:, None] * beams).flatten(), prefix.shape[1])
    return out_tokens, out_lengths, out_scores


def _likeliest(logits, count):
    """The `count` likeliest tokens of each row: log-probabilities and ids, likeliest first. logits: [rows, V]."""
    top, token = logits.topk(count, dim=-1)
    return top - logits.logsumexp(-1, keepdim=True), token


def _sample(gpt, prefix, draws, entry_length, temperature, top_p, stop, seeds):
    """Draw `draws` captions an image from the distribution cut to its nucleus (arXiv:1904.09751).

    Scores count the model's own log-probabilities at this temperature, before the cut. Each image has its own generator, seeded
    by its place, so that a caption does not depend on what else is in the batch.
    prefix: [B, P, E] → tokens [B, K, T], lengths [B, K], scores [B, K].
    """
    device = prefix.device
    images = len(prefix)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = torch.zeros(images, draws, entry_length, dtype=torch.long, device=device)
    lengths = torch.zeros(images, draws, dtype=torch.long, device=device)
    stopped = torch.zeros(images, draws, dtype=torch.bool, device=device)

    decoder = _Decoder(gpt, temperature, prefix.shape[1] + entry_length)
    log_probs = decoder(inputs_embeds=prefix).log_softmax(-1).repeat_interleave(draws, dim=0)  # [B · K, V]
    decoder.keep(torch.arange(images, device=device).repeat_interleave(draws))
    scores = torch.zeros(images, draws, dtype=log_probs.dtype, device=device)
    for step in range(entry_length):
        uniform = torch.stack([torch.rand(draws, generator=g) for g in generators]).to(device)  # [B, K]
        token = _draw_from_nucleus(log_probs, top_p, uniform.view(-1)).view(images, draws)
        gained = log_probs.gather(1, token.view(-1, 1)).view(images, draws)
        scores = scores + gained.masked_fill(stopped, 0.0)
        tokens[..., step] = token.masked_fill(stopped, 0)
        lengths += ~stopped
        stopped |= token == stop
        if stopped.all() or step == entry_length - 1:
            break
        log_probs = decoder(input_ids=token.view(-1, 1)).log_softmax(-1)
    return tokens, lengths, scores / lengths


def _draw_from_nucleus(log_probs, top_p, uniform):
    """Draw one token a row from the smallest set of likeliest tokens whose probabilities reach top_p.

    log_probs: [rows, V]; uniform: [rows] in [0, 1) → [rows] token ids.
    """
    probs, order = log_probs.exp().sort(dim=-1, descending=True)
    before = probs.cumsum(-1) - probs  # what the likelier tokens have already
    probs = probs.masked_fill(before >= top_p, 0.0)
    probs[:, 0] = probs[:, 0].clamp_min(torch.finfo(probs.dtype).tiny)
    cumulative = probs.cumsum(-1)
    target = uniform.to(probs.dtype)[:, None] * cumulative[:, -1:]
    place = (cumulative <= target).sum(-1, keepdim=True)
    place = torch.minimum(place, (probs > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1)
