"""Captions for embeddings: greedy, beam and sampling, batched over images, with a key-value cache.

B images, K beams (or samples) per image, P prefix_length, E width of the language model, V vocabulary, T tokens so far.
"""

import torch

from common import UserError
from models.decoding_settings import settle
from models.kv_cache import Decoder
from models.nucleus import draw_from_nucleus
from models.prompts import add_prompts
from models.published.clipxgpt import decode_as_published
from models.texts import to_text_space

STOPPED_SHARE = 0.25  # of the rows: so many leave together, since what stays of the cache is copied


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
    image_ids=None,
    in_text_space=False,
):
    """Caption a batch of embeddings.

    The config's prompt, if any, stands between prefix and caption (models/prompts.py). Published CLIPxGPT weights always decode with their
    own greedy loop (models/published/clipxgpt.py). The model is left in eval mode.

    Args:
        model: ClipCaptionModel with its tokenizer.
        clip_embedding: [B, D], or [B, L, D] with several vectors per image; any device.
        decoding: "beam" (the published search), "greedy" (the same with one beam), or "sample" (num_captions draws per image).
        beam_size: beams per image.
        entry_length: most tokens of a caption.
        temperature: divides the logits; 0 or less means 1, as published.
        top_p: sampling keeps the likeliest tokens whose probabilities reach this sum.
        stop_token: text of one token, which overrides the checkpoint's.
        num_captions: captions per image.
        seed: of the draws. The same image in the same place of the batch then gets the same caption.
        no_repeat_ngram_size: forbid repeating any n-gram of this size in a caption, prompt included; 0 allows all.
        length_penalty: rank captions by sum of log-probabilities / length ** length_penalty. 1 as published; more favours long ones.
        min_length: tokens before the stop token may be taken. A caption stops early only where the rules forbid every other token.
        text_prompt: text that every caption begins with, without spaces at its end. Lengths and scores count what follows it.
        return_ended: add to each pair whether the caption ended with its stop token.
        in_text_space: whether embeddings for a captioner trained on texts have been through models.texts.to_text_space.
        image_ids: B ids of the images. Where the prompt shows captions of similar images, those of the image itself are left out.

    Returns:
        list of B lists of num_captions pairs (text, score), best first. The score is the mean log-probability of a token in nats, as the
        model gives it before anything is forbidden.

    Raises:
        UserError: an argument does not fit, or an embedding gives no finite prefix.
    """
    settings = settle(
        model, decoding=decoding, beam_size=beam_size, entry_length=entry_length, temperature=temperature, top_p=top_p, seed=seed,
        stop_token=stop_token, num_captions=num_captions, no_repeat_ngram_size=no_repeat_ngram_size, min_length=min_length,
        length_penalty=length_penalty, text_prompt=text_prompt,
    )  # fmt: skip
    if len(clip_embedding) == 0:
        return []
    model.eval()
    clip_embedding = clip_embedding.to(model.clip_device)
    clip_embedding = clip_embedding if in_text_space else to_text_space(model, clip_embedding)
    prefix = _finite_prefix(model, clip_embedding)  # [B, P, E]
    if model.config.decoding_style == "clipxgpt":
        captions = decode_as_published(model, prefix, settings.entry_length, settings.temperature, settings.stop, return_ended)
        return [[caption] for caption in captions]
    first_seed = torch.seed() % 2**40 if seed is None else seed
    captions = [None] * len(prefix)
    for images, start in add_prompts(model, clip_embedding, prefix, settings.prompt, image_ids):
        limit = settings.entry_length
        if settings.positions is not None:
            limit = min(limit, settings.positions - start.shape[1] + 1)
        if limit < 1:
            raise UserError(f"prefix and prompt, {start.shape[1]} tokens, do not fit the language model's {settings.positions} positions")
        if decoding == "sample":
            found = _sample(model.gpt, start, limit, settings, [first_seed + image for image in images])
        else:
            found = _search_beams(model.gpt, start, limit, settings)
        for image, of_image in zip(images, _best_captions(model, *found, settings, return_ended)):
            captions[image] = of_image
    return captions


def _finite_prefix(model, clip_embedding):
    """Prefixes in the language model's dtype, [B, P, E]; UserError where one is not finite."""
    prefix = model.encode_prefix(clip_embedding).to(model.gpt.get_input_embeddings().weight.dtype)
    finite = torch.isfinite(prefix).flatten(1).all(1)  # [B]
    if not finite.all():
        image = int((~finite).nonzero()[0])
        raise UserError(f"embedding {image} gives a prefix that is not finite: it holds NaN, or zeros only. Encode the image again.")
    return prefix


def _best_captions(model, tokens, lengths, scores, settings, return_ended):
    """Rank the captions of each image and turn the best into text.

    tokens: [B, K, T]; lengths: [B, K]; scores: [B, K], mean log-probabilities. Returns what generate returns.
    """
    lengths_float = lengths.to(scores.dtype)
    ranks = scores if settings.length_penalty == 1 else _rank(scores * lengths_float, lengths_float, settings.length_penalty)
    order = ranks.argsort(dim=1, descending=True, stable=True)[:, : settings.num_captions]
    captions = []
    for row, beams in enumerate(order.tolist()):
        captions.append([])
        for beam in beams:
            ids = tokens[row, beam, : lengths[row, beam]].tolist()
            ended = [ids[-1] == settings.stop] if return_ended else []
            captions[-1].append((_text(model, settings.prompt + ids), scores[row, beam].item(), *ended))
    return captions


def _text(model, ids):
    """The text of a caption: a final end-of-text token is left out, any other stop token is part of the text.

    Behind a prompt the first word carries the space between the two, which is removed.
    """
    if ids and ids[-1] == model.tokenizer.eos_token_id:
        ids = ids[:-1]
    text = model.tokenizer.decode(ids)
    return text.strip() if model.config.prompt else text


def _search_beams(gpt, prefix, entry_length, settings):
    """The published beam search, over a batch of images at once.

    At every step the K · V candidates of an image are ranked by sum of log-probabilities / length ** length_penalty. A stopped beam
    continues only with token 0, at no cost and without growing, so that it competes with its score as it stands. An image whose beams have
    all stopped leaves the batch.

    Args:
        gpt: the language model.
        prefix: [B, P, E].
        entry_length: most tokens.
        settings: Settings.

    Returns:
        tokens [B, K, T], lengths [B, K], scores [B, K] (sum / length).
    """
    device, images, beams, stop, rules = prefix.device, len(prefix), settings.beams, settings.stop, settings.rules
    out_tokens = torch.zeros(images, beams, entry_length, dtype=torch.long, device=device)
    out_lengths = torch.ones(images, beams, dtype=torch.long, device=device)

    decoder = Decoder(gpt, settings.temperature, prefix.shape[1] + entry_length)
    logits = decoder(inputs_embeds=prefix)  # [B, V]
    sums, token = _likeliest(logits, beams, rules.forbidden(logits, None))  # [B, K]
    out_scores = torch.empty_like(sums)
    decoder.keep(torch.arange(images, device=device).repeat_interleave(beams))
    running = torch.arange(images, device=device)  # [B], the image that each group of beams belongs to
    tokens = token[..., None]  # [B, K, T]
    lengths = torch.ones_like(sums)
    stopped = token == stop

    for step in range(1, entry_length + 1):
        done = stopped.all(dim=1) if step < entry_length else torch.ones_like(running, dtype=torch.bool)
        if done.any():
            finished = running[done]
            out_tokens[finished, :, : tokens.shape[-1]] = tokens[done]
            out_lengths[finished] = lengths[done].long()
            out_scores[finished] = sums[done] / lengths[done]
            if done.all():
                break
            left = ~done
            decoder.keep(torch.arange(len(running) * beams, device=device).view(-1, beams)[left].flatten())
            running, tokens, sums, lengths, stopped = (t[left] for t in (running, tokens, sums, lengths, stopped))

        logits = decoder(input_ids=tokens[..., -1].reshape(-1, 1))  # [B · K, V]
        forbidden = rules.forbidden(logits, tokens.flatten(0, 1))
        sums, lengths, source, token = _extend_beams(logits, forbidden, sums, lengths, stopped, settings.length_penalty)
        stopped = stopped.gather(1, source) | (token == stop)
        tokens = torch.cat([tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1])), token[..., None]], dim=-1)
        if beams > 1:
            decoder.reorder((source + torch.arange(len(running), device=device)[:, None] * beams).flatten(), prefix.shape[1])
    return out_tokens, out_lengths, out_scores


def _extend_beams(logits, forbidden, sums, lengths, stopped, length_penalty):
    """Choose the K best continuations of each image's beams.

    logits: [B · K, V]; forbidden: None or bool [B · K, V]; sums, lengths, stopped: [B, K].
    Returns sums, lengths, source beam and token of the chosen ones, each [B, K].
    """
    images, beams = sums.shape
    # Within a beam candidates rank as their log-probabilities do, so that only its K likeliest can survive.
    gained, token = _likeliest(logits, beams, forbidden)  # [B · K, K]
    gained, token = gained.view(images, beams, beams), token.view(images, beams, beams)  # [B, K, K]
    gained = gained.masked_fill(stopped[..., None], -torch.inf)
    gained[..., 0] = gained[..., 0].masked_fill(stopped, 0.0)
    token[..., 0] = token[..., 0].masked_fill(stopped, 0)
    lengths = lengths + (~stopped).to(lengths.dtype)
    sums = sums[..., None] + gained  # [B, K, K]
    ranks, place = _rank(sums, lengths[..., None], length_penalty).flatten(1).topk(beams, dim=-1)  # [B, K] of K · K
    source, token = place // beams, token.flatten(1).gather(1, place)  # [B, K]
    lengths = lengths.gather(1, source)
    sums = ranks * lengths if length_penalty == 1 else sums.flatten(1).gather(1, place)  # the product rounds as published
    return sums, lengths, source, token


def _rank(sums, lengths, length_penalty):
    """What candidates are ranked by: sum / length ** length_penalty, or a number that grows with it and does not overflow."""
    if length_penalty == 1:
        return sums / lengths
    return length_penalty * lengths.log() - (-sums).clamp_min(torch.finfo(sums.dtype).tiny).log()


def _likeliest(logits, count, forbidden=None):
    """Log-probabilities and ids of the `count` likeliest tokens of each row, likeliest first; -inf for forbidden ones.

    logits: [rows, V]; forbidden: None, or bool [rows, V].
    """
    top, token = (logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)).topk(count, dim=-1)
    return top - logits.logsumexp(-1, keepdim=True), token


def _sample(gpt, prefix, entry_length, settings, seeds):
    """Draw K captions per image from the distribution cut to its nucleus (arXiv:1904.09751).

    Scores count the model's own log-probabilities at this temperature, before the cut and before anything is forbidden. Each image has its
    own generator, so that a caption does not depend on what else is in the batch.

    Args:
        gpt: the language model.
        prefix: [B, P, E].
        entry_length: most tokens.
        settings: Settings.
        seeds: list of B int.

    Returns:
        tokens [B, K, T], lengths [B, K], scores [B, K].
    """
    device, images, draws, rules = prefix.device, len(prefix), settings.beams, settings.rules
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = torch.zeros(images * draws, entry_length, dtype=torch.long, device=device)
    lengths = torch.zeros(images * draws, dtype=torch.long, device=device)

    decoder = Decoder(gpt, settings.temperature, prefix.shape[1] + entry_length)
    log_probs = decoder(inputs_embeds=prefix).log_softmax(-1).repeat_interleave(draws, dim=0)  # [B · K, V]
    decoder.keep(torch.arange(images, device=device).repeat_interleave(draws))
    scores = torch.zeros(images * draws, dtype=log_probs.dtype, device=device)
    running = torch.arange(images * draws, device=device)  # [R], the draws that are still decoded
    stopped = torch.zeros_like(running, dtype=torch.bool)
    for step in range(entry_length):
        uniform = torch.cat([torch.rand(draws, generator=generator) for generator in generators]).to(device)  # [B · K]
        forbidden = rules.forbidden(log_probs, tokens[running, :step] if step else None)
        allowed = log_probs if forbidden is None else log_probs.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        token = draw_from_nucleus(allowed, settings.top_p, uniform[running])  # [R]
        scores[running] += log_probs.gather(1, token[:, None]).squeeze(1).masked_fill(stopped, 0.0)
        tokens[running, step] = token.masked_fill(stopped, 0)
        lengths[running] += ~stopped
        stopped |= token == settings.stop
        if stopped.all() or step == entry_length - 1:
            break
        if stopped.float().mean() > STOPPED_SHARE:
            left = ~stopped
            decoder.keep(left.nonzero().squeeze(1))
            running, token, stopped = running[left], token[left], stopped[left]
        log_probs = decoder(input_ids=token[:, None]).log_softmax(-1)  # [R, V]
    return tokens.view(images, draws, -1), lengths.view(images, draws), (scores / lengths).view(images, draws)
