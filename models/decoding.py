"""Captions out of embeddings: greedy, beam and sampling, batched over images, with a key-value cache.

B images, K beams (or samples) an image, P prefix_length, V vocabulary, T tokens so far.
"""

import math

import torch

from common import UserError
from models.captioner import position_count, stop_token_id
from models.constraints import Constraints
from models.kv_cache import Decoder
from models.prompts import add_prompts
from models.published.clipxgpt import decode_as_published

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
    no_repeat_ngram_size=0,
    length_penalty=1.0,
    min_length=0,
    text_prompt=None,
    return_ended=False,
):
    """Caption a batch of embeddings.

    model: ClipCaptionModel with its tokenizer; clip_embedding: [B, D].
    decoding: "beam" (the published search), "greedy" (the same with one beam), or "sample" (num_captions draws an image).
    entry_length: most tokens of a caption. temperature divides the logits; 0 or less means 1, as published.
    top_p: sampling keeps the likeliest tokens whose probabilities reach this sum.
    stop_token: text of one token, which overrides the checkpoint's. seed: of the draws; the same image in the same place of the
    batch then gets the same caption.
    no_repeat_ngram_size: no so many tokens in a row occur twice in a caption, prompt included; 0 allows all. min_length: the stop token
    is not taken before so many tokens. Where these leave nothing to take, the caption stops.
    length_penalty: captions are ranked by sum of log-probabilities / length ** length_penalty; 1 as published, more favours long ones.
    text_prompt: every caption begins with this text (spaces at its end left out); lengths and scores count what follows it alone.
    → for each image, num_captions pairs (text, score), best first; score is the mean log-probability of a token, in nats, as the
    model gives it before anything is forbidden. return_ended: triples, the third whether the caption ended by its stop token.
    Where the config has a prompt, it stands between prefix and caption (models/prompts.py). Published CLIPxGPT weights decode by their own
    greedy loop, whatever `decoding` says but "sample" (models/published/clipxgpt.py).
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
    if entry_length < 1:
        raise UserError(f"entry_length is {entry_length}; expected at least 1 token")
    if not math.isfinite(length_penalty):
        raise UserError(f"length_penalty is {length_penalty}; expected a number, such as 1")
    if model.config.decoding_style == "clipxgpt":
        changed = decoding == "sample" or num_captions > 1 or no_repeat_ngram_size or min_length or text_prompt or length_penalty != 1
        if changed:
            raise UserError("CLIPxGPT's published weights decode greedily, one caption an image. Ask for no sample, no more, and no rules.")
    prompt = _prompt_tokens(model.tokenizer, text_prompt)
    positions = position_count(model.gpt)
    if positions is not None:
        if model.config.prefix_length > positions:
            raise UserError(f"a prefix of {model.config.prefix_length} tokens does not fit the language model's {positions} positions")
        if model.config.prefix_length + len(prompt) > positions:
            raise UserError(f"a text_prompt of {len(prompt)} tokens does not fit the language model's {positions} positions")
        entry_length = min(entry_length, positions - model.config.prefix_length - len(prompt) + 1)  # the last token is never read
    try:
        stop = model.stop_token_id if stop_token is None else stop_token_id(model.tokenizer, stop_token)
    except ValueError as error:
        raise UserError(str(error)) from error
    rules = Constraints(no_repeat_ngram_size, min_length, stop, prompt)
    if min_length > entry_length or min_length and decoding == "beam" and beams == vocabulary:
        raise UserError(f"min_length is {min_length}; expected at most {entry_length} tokens (entry_length), and fewer beams than tokens")
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
        return [[caption] for caption in decode_as_published(model, prefix, entry_length, temperature, stop, return_ended)]

    first_seed = torch.seed() % 2**40 if seed is None else seed
    captions = [None] * len(prefix)
    for images, start in add_prompts(model, clip_embedding, prefix, prompt):
        most_tokens = entry_length if positions is None else min(entry_length, positions - start.shape[1] + 1)
        if most_tokens < 1:
            raise UserError(f"prefix and prompt, {start.shape[1]} tokens, do not fit the language model's {positions} positions")
        if decoding == "sample":
            seeds = [first_seed + image for image in images]
            tokens, lengths, scores = _sample(model.gpt, start, beams, most_tokens, temperature, top_p, stop, seeds, rules)
        else:
            tokens, lengths, scores = _search_beams(model.gpt, start, beams, most_tokens, temperature, stop, rules, length_penalty)
        ranks = scores if length_penalty == 1 else scores * lengths.to(scores.dtype) ** (1 - length_penalty)
        order = ranks.argsort(dim=1, descending=True, stable=True)[:, :num_captions]
        for row, image in enumerate(images):
            best = [(tokens[row, beam, : lengths[row, beam]].tolist(), scores[row, beam].item()) for beam in order[row]]
            captions[image] = [(_text(model, prompt + ids), score, *([ids[-1] == stop] if return_ended else [])) for ids, score in best]
    return captions


def _prompt_tokens(tokenizer, text):
    """The tokens of a text prompt: a list, empty for none."""
    return tokenizer.encode(text.rstrip(), add_special_tokens=False) if text and text.strip() else []


def _text(model, ids):
    """The caption of a row of tokens: an end-of-text token is left out, any other stop token is part of the text.

    Behind a prompt the caption's first word carries the space between the two, which is taken off.
    """
    if ids and ids[-1] == model.tokenizer.eos_token_id:
        ids = ids[:-1]
    text = model.tokenizer.decode(ids)
    return text.strip() if model.config.prompt else text


def _search_beams(gpt, prefix, beams, entry_length, temperature, stop, rules, length_penalty):
    """The published beam search, over a batch of images at once.

    At every step the candidates of an image, its beams × V, are ranked by sum of log-probabilities / length ** length_penalty. A
    stopped beam goes on only with token 0, at no cost and without growing, so that it competes with its score as it stands. An image
    whose beams have all stopped leaves the batch.
    prefix: [B, P, E] → tokens [B, K, T], lengths [B, K], scores [B, K] (sum / length).
    """
    device = prefix.device
    images = len(prefix)
    out_tokens = torch.zeros(images, beams, entry_length, dtype=torch.long, device=device)
    out_lengths = torch.ones(images, beams, dtype=torch.long, device=device)
    out_scores = torch.empty(images, beams, dtype=torch.get_default_dtype(), device=device)

    decoder = Decoder(gpt, temperature, prefix.shape[1] + entry_length)
    logits = decoder(inputs_embeds=prefix)
    scores, token = _likeliest(logits, beams, rules.forbidden(logits, None))  # [B, K]
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
        logits = decoder(input_ids=tokens[..., -1].reshape(-1, 1))
        gained, token = _likeliest(logits, beams, rules.forbidden(logits, tokens.flatten(0, 1)))  # [B · K, K]
        gained, token = gained.view(len(running), beams, beams), token.view(len(running), beams, beams)
        gained = gained.masked_fill(stopped[..., None], -torch.inf)
        gained[..., 0] = gained[..., 0].masked_fill(stopped, 0.0)
        token[..., 0] = token[..., 0].masked_fill(stopped, 0)
        lengths = lengths + (~stopped).to(lengths.dtype)
        divisors = lengths if length_penalty == 1 else lengths**length_penalty
        ranks, place = ((scores[..., None] + gained) / divisors[..., None]).flatten(1).topk(beams, dim=-1)  # [B, K] of K · K
        source, token = place // beams, token.flatten(1).gather(1, place)
        lengths = lengths.gather(1, source)
        scores = ranks * divisors.gather(1, source)
        stopped = stopped.gather(1, source) | (token == stop)
        tokens = torch.cat([tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1])), token[..., None]], dim=-1)
        if beams > 1:
            decoder.reorder((source + torch.arange(len(running), device=device)[:, None] * beams).flatten(), prefix.shape[1])
    return out_tokens, out_lengths, out_scores


def _likeliest(logits, count, forbidden=None):
    """The `count` likeliest tokens of each row: log-probabilities and ids, likeliest first; -inf for those forbidden.

    logits: [rows, V]; forbidden: None, or bool [rows, V].
    """
    top, token = (logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)).topk(count, dim=-1)
    return top - logits.logsumexp(-1, keepdim=True), token


def _sample(gpt, prefix, draws, entry_length, temperature, top_p, stop, seeds, rules):
    """Draw `draws` captions an image from the distribution cut to its nucleus (arXiv:1904.09751).

    Scores count the model's own log-probabilities at this temperature, before the cut and before anything is forbidden. Each image has
    its own generator, seeded by its place, so that a caption does not depend on what else is in the batch.
    prefix: [B, P, E] → tokens [B, K, T], lengths [B, K], scores [B, K].
    """
    device = prefix.device
    images = len(prefix)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = torch.zeros(images, draws, entry_length, dtype=torch.long, device=device)
    lengths = torch.zeros(images, draws, dtype=torch.long, device=device)
    stopped = torch.zeros(images, draws, dtype=torch.bool, device=device)

    decoder = Decoder(gpt, temperature, prefix.shape[1] + entry_length)
    log_probs = decoder(inputs_embeds=prefix).log_softmax(-1).repeat_interleave(draws, dim=0)  # [B · K, V]
    decoder.keep(torch.arange(images, device=device).repeat_interleave(draws))
    scores = torch.zeros(images, draws, dtype=log_probs.dtype, device=device)
    for step in range(entry_length):
        uniform = torch.stack([torch.rand(draws, generator=g) for g in generators]).to(device)  # [B, K]
        forbidden = rules.forbidden(log_probs, tokens[..., :step].flatten(0, 1) if step else None)
        allowed = log_probs if forbidden is None else log_probs.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        token = _draw_from_nucleus(allowed, top_p, uniform.view(-1)).view(images, draws)
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
