"""What a caller of the page may ask for, checked before anything is computed."""

import dataclasses
import math

from common import UserError
from prediction.reranking import WITHOUT_FILES

DECODINGS = ("beam", "greedy", "sample")
RERANKINGS = ("none", *WITHOUT_FILES)
MOST_BEAMS, MOST_CAPTIONS, MOST_PROMPT = 20, 10, 200  # beams or samples, captions per image, characters
TEMPERATURES = 0.1, 3.0
TOP_PS = 0.05, 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to caption: what prediction.captions.caption_all reads. Equal settings are decoded together."""

    decoding: str = "beam"
    beam_size: int = 5
    num_captions: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    text_prompt: str | None = None
    rerank: str | None = None
    # What the page does not ask for, as in add_decoding_options and add_rerank_option of prediction.
    rerank_weight: float | None = None
    rerank_samples: int = 0
    entry_length: int = 67
    seed: int = 0
    stop_token: str | None = None
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    batch_size: int = 32


def check_settings(decoding, beam_size, num_captions, temperature, top_p, prompt, rerank):
    """Check the values of the page's controls, which a caller over HTTP may set to anything.

    Returns:
        Settings. Greedy decoding gives one caption, so the controls of the others do not count for it.

    Raises:
        UserError: a value is out of its range.
    """
    if decoding not in DECODINGS:
        raise UserError(f"decoding is {_short(decoding)}; expected one of {', '.join(DECODINGS)}.")
    rerank = "none" if rerank is None else rerank
    if rerank not in RERANKINGS:
        raise UserError(f"rerank is {_short(rerank)}; expected one of {', '.join(RERANKINGS)}.")
    beam_size = _number("beam_size", beam_size, 1, MOST_BEAMS, whole=True)
    num_captions = _number("num_captions", num_captions, 1, MOST_CAPTIONS, whole=True)
    temperature = _number("temperature", temperature, *TEMPERATURES)
    top_p = _number("top_p", top_p, *TOP_PS)
    prompt = _check_prompt(prompt)
    if decoding == "greedy":
        return Settings("greedy", 1, 1, temperature, 1.0, prompt)
    if decoding == "beam":
        beam_size, top_p = max(beam_size, num_captions), 1.0
    several = max(beam_size, num_captions)
    return Settings(decoding, beam_size, num_captions, temperature, top_p, prompt, rerank if rerank != "none" and several > 1 else None)


def _check_prompt(prompt):
    """Return a prompt without spaces around it, None for an empty one."""
    if not isinstance(prompt, (str, type(None))):
        raise UserError(f"prompt is {_short(prompt)}; expected text.")
    prompt = (prompt or "").strip()
    if len(prompt) > MOST_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters; expected at most {MOST_PROMPT}.")
    if "\0" in prompt or prompt.encode("utf-8", "replace").decode() != prompt:
        raise UserError("the prompt holds characters that are no text; expected valid Unicode.")
    return prompt or None


def _number(name, value, least, most, whole=False):
    """Return a number between two others."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
    if not fits or whole and value != int(value):
        raise UserError(f"{name} is {_short(value)}; expected {'a whole number' if whole else 'a number'} from {least} to {most}.")
    return int(value) if whole else float(value)


def _short(value):
    """Write any value in a few characters."""
    return repr(value)[:40]
