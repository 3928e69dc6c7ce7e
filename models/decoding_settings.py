"""The arguments of `generate`, checked against the model before anything is computed."""

import dataclasses
import math

from common import UserError
from models.captioner import position_count, stop_token_id
from models.constraints import Constraints

DECODINGS = ("beam", "greedy", "sample")
TEMPERATURES = 1e-4, 1e4  # least and most: beyond them log-probabilities overflow, or are all alike in float32
MOST_PENALTY = 100.0  # of length_penalty, either way; ranks are computed as logarithms
MOST_BEAMS = 5_000  # beams or samples per image
MOST_TOKENS = 100_000  # of a caption, where the language model has no limit of its own
SEEDS = -(2**63), 2**63 - 1


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
    model, *, decoding, beam_size, entry_length, temperature, top_p, stop_token, num_captions, seed,
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
    if not (temperature <= 0 or TEMPERATURES[0] <= temperature <= TEMPERATURES[1]) or math.isinf(temperature):
        least, most = TEMPERATURES
        raise UserError(f"temperature is {temperature}; expected {least:g} to {most:g}, or a finite number of 0 or less, which means 1")
    if not abs(length_penalty) <= MOST_PENALTY:
        raise UserError(f"length_penalty is {length_penalty}; expected {-MOST_PENALTY:g} to {MOST_PENALTY:g}, such as 1")
    if seed is not None and not SEEDS[0] <= seed <= SEEDS[1]:
        raise UserError(f"seed is {seed}; expected a whole number of 64 bits")
    if entry_length < 1:
        raise UserError(f"entry_length is {entry_length}; expected at least 1 token")
    for name, text in (("stop_token", stop_token), ("text_prompt", text_prompt)):
        if text is not None and not is_text(text):
            raise UserError(f"{name} is {text!r}; expected text without halves of surrogate pairs")
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
    if entry_length > MOST_TOKENS:
        raise UserError(f"entry_length is {entry_length}; expected at most {MOST_TOKENS:,} tokens")
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
    if decoding == "beam" and not 1 <= beams <= min(vocabulary, MOST_BEAMS):
        raise UserError(f"beam_size is {beams}; expected 1 to {min(vocabulary, MOST_BEAMS)}")
    if decoding == "sample" and num_captions > MOST_BEAMS:
        raise UserError(f"num_captions is {num_captions}; expected 1 to {MOST_BEAMS} samples per image")
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


def is_text(value):
    """Tell whether a value is text that every tokenizer takes: no halves of surrogate pairs."""
    try:
        value.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        return False
    return True
