"""Captions of many embeddings, batch by batch, with the decoding that a command line asks for."""

from common import UserError


def add_decoding_options(parser):
    """Add the options of decoding, which predict.py and evaluate.py share."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--decoding", choices=("beam", "greedy", "sample"), default="beam")
    group.add_argument("--beam_size", type=int, default=5)
    group.add_argument("--entry_length", type=int, default=67, help="most tokens of a caption (default 67)")
    group.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 or less means 1")
    group.add_argument("--top_p", type=float, default=1.0, help="sampling: keep the likeliest tokens that add up to this (default 1: all)")
    group.add_argument("--stop_token", help="token that ends a caption, where not the checkpoint's")
    group.add_argument("--num_captions", type=int, default=1, help="captions an image, best first, with their scores")
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn at random")
    group.add_argument("--no_repeat_ngram_size", type=int, default=0, metavar="N", help="no N tokens in a row twice (default 0: allowed)")
    group.add_argument("--length_penalty", type=float, default=1.0, help="rank by sum / length ** this; above 1: longer (default 1)")
    group.add_argument("--min_length", type=int, default=0, help="tokens before a caption may stop (default 0)")
    group.add_argument("--text_prompt", metavar="TEXT", help="text that every caption begins with")


def caption_all(model, embeddings, options, return_ended=False):
    """Caption every embedding, batch by batch → list (one an image) of lists of (text, score), best first.

    return_ended: (text, score, whether it ended by its stop token) instead.
    """
    from tqdm import tqdm

    from models.decoding import generate

    captions = []
    for start in tqdm(range(0, len(embeddings), options.batch_size), desc="caption", unit="batch", disable=None, leave=False):
        captions += generate(
            model,
            embeddings[start : start + options.batch_size].float(),
            decoding=options.decoding,
            beam_size=options.beam_size,
            entry_length=options.entry_length,
            temperature=options.temperature,
            top_p=options.top_p,
            stop_token=options.stop_token,
            num_captions=options.num_captions,
            seed=options.seed + start,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            length_penalty=options.length_penalty,
            min_length=options.min_length,
            text_prompt=options.text_prompt,
            return_ended=return_ended,
        )
    return captions


def check_width(model, width, source, checkpoint):
    """Raise UserError when embeddings of `source` do not fit the checkpoint."""
    config = model.config
    if width != config.clip_width:
        raise UserError(
            f"{source} gives {width}-wide embeddings; {checkpoint} wants {config.clip_width} ({config.encoder or 'encoder unknown'}). "
            f"Take features of that encoder, or a checkpoint trained on these."
        )
