"""The arguments of `generate`, checked against the model before anything is computed."""

import dataclasses
import math

from common import UserError
from models.captioner import position_count, stop_token_id
from models.constraints import Constraints

DECODINGS = ("beam", "greedy", "sample")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode, after all checks."""

    decoding: str  # one of DECODINGS
    beams: int  # K, beams or samples per image
    num_captions: int
    entry_length: int  # most tokens of a caption
    positions: int | None  # most tokens that the language model reads, None: no limit
    temperature: float
    top_p: float
    length_penalty: float
    stop: int  # token id
    prompt: list  # token ids of the text prompt
    rules: Constraints


def settle(
    model, *, decoding, beam_size, entry_length, temperature, top_p, stop_token, num_captions,
    no_repeat_ngram_size, length_penalty, min_length, text_prompt,
):  # fmt: skip
    """Check the arguments of models.decoding.generate, which describes them.

    Returns:
        Settings.

    Raises:
        UserError: an argument is out of its range, or does not fit the model.
    """
    if decoding not in DECODINGS:
        raise UserError(f"decoding is {decoding!r}; expected one of {', '.join(DECODINGS)}")
    beams = _count_beams(model, decoding, beam_size, num_captions)
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; expected more than 0 and at most 1")
    if entry_length < 1:
        raise UserError(f"entry_length is {entry_length}; expected at least 1 token")
    if not math.isfinite(length_penalty):
        raise UserError(f"length_penalty is {length_penalty}; expected a number, such as 1")
    if model.config.decoding_style == "clipxgpt":
        rules = no_repeat_ngram_size or min_length or text_prompt or length_penalty != 1
        if rules or decoding == "sample" or num_captions > 1:
            raise UserError(
                "CLIPxGPT's published weights decode greedily, one caption per image. "
                "Leave out sampling, num_captions, length_penalty, text_prompt and the rules."
            )
    prompt = model.tokenizer.encode(text_prompt.rstrip(), add_special_tokens=False) if text_prompt and text_prompt.strip() else []
    positions = position_count(model.gpt)
    if positions is not None:
        entry_length = min(entry_length, _room(model.config.prefix_length, len(prompt), positions))
    try:
        stop = model.stop_token_id if stop_token is None else stop_token_id(model.tokenizer, stop_token)
    except ValueError as error:
        raise UserError(str(error)) from error
    all_tokens = decoding == "beam" and beams == model.gpt.get_output_embeddings().weight.shape[0]
    if min_length > entry_length or min_length and all_tokens:
        raise UserError(f"min_length is {min_length}; expected at most {entry_length} tokens (entry_length), and fewer beams than tokens")
    return Settings(
        decoding, beams, num_captions, entry_length, positions, temperature if temperature > 0 else 1.0, top_p, length_penalty,
        stop, prompt, Constraints(no_repeat_ngram_size, min_length, stop, prompt),
    )  # fmt: skip


def _count_beams(model, decoding, beam_size, num_captions):
    """The number of beams or samples per image that a decoding needs."""
    beams = {"beam": beam_size, "greedy": 1, "sample": num_captions}[decoding]
    vocabulary = model.gpt.get_output_embeddings().weight.shape[0]
    if decoding == "beam" and not 1 <= beams <= vocabulary:
        raise UserError(f"beam_size is {beams}; expected 1 to {vocabulary} (the vocabulary)")
    if not 1 <= num_captions <= max(beams, 1):
        advice = "Take decoding='sample', or a larger beam_size." if decoding == "greedy" else "Take a larger beam_size."
        raise UserError(f"num_captions is {num_captions}; {decoding} decoding gives 1 to {beams}. {advice}")
    return beams


def _room(prefix_length, prompt_length, positions):
    """The most tokens of a caption behind prefix and prompt; the last token of a caption is never read, so it needs no position."""
    if prefix_length > positions:
        raise UserError(f"a prefix of {prefix_length} tokens does not fit the language model's {positions} positions")
    if prefix_length + prompt_length > positions:
        raise UserError(f"a text_prompt of {prompt_length} tokens does not fit the language model's {positions} positions")
    return positions - prefix_length - prompt_length + 1
