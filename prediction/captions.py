"""Captions of many embeddings: decoded batch by batch, printed and written. predict.py and evaluate.py share this."""

import csv
import json
import math

from common import UserError, replace_file, utf8_text
from features.processes import current

GATHERED = 16  # batches from which images with prompts of one length are gathered, to be decoded together
SUFFIXES = (".csv", ".jsonl", ".json")  # of write_captions


def add_decoding_options(parser):
    """Add the options of decoding to a parser."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--decoding", choices=("beam", "greedy", "sample"), default="beam", help="how to decode (default beam)")
    group.add_argument("--beam_size", type=int, default=5, metavar="N", help="number of beams (default 5)")
    group.add_argument("--entry_length", type=int, default=67, metavar="N", help="longest caption, in tokens (default 67)")
    group.add_argument("--num_captions", type=int, default=1, metavar="N", help="captions per image, best first (default 1)")
    group.add_argument("-T", "--temperature", type=float, default=1.0, help="divide the logits by this; 0 or less means 1 (default 1)")
    group.add_argument("--top_p", type=float, default=1.0, metavar="P",
                       help="sampling: keep the likeliest tokens whose probabilities add up to this (default 1: all)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    group.add_argument("--text_prompt", metavar="TEXT", type=utf8_text, help="text that every caption begins with (default none)")
    group.add_argument("--stop_token", metavar="TEXT", type=utf8_text,
                       help="token that ends a caption, such as . (default: the checkpoint's)")  # fmt: skip
    group.add_argument("--min_length", type=int, default=0, metavar="N", help="shortest caption, in tokens (default 0)")
    group.add_argument("--no_repeat_ngram_size", type=int, default=0, metavar="N",
                       help="forbid repeating any n-gram of this many tokens (default 0: allowed)")  # fmt: skip
    group.add_argument("--length_penalty", type=float, default=1.0, metavar="X",
                       help="rank beams by log-probability / length ** X; above 1 favours longer captions (default 1)")  # fmt: skip


def add_running_options(parser):
    """Add the options of how a script runs to a parser; returns their group."""
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto, the best that is available (default auto)")
    group.add_argument("--batch_size", type=int, default=32, metavar="N", help="images decoded together (default 32)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no",
                       help="precision of the language model; no means float32 (default no)")  # fmt: skip
    group.add_argument("--gpt2_type", metavar="NAME", help="language model to use instead of the checkpoint's")
    return group


def caption_all(model, embeddings, options, num_captions=None, return_ended=False, image_ids=None):
    """Caption every embedding, batch by batch. The processes of a launcher share the batches; each gets all captions.

    Args:
        model: ClipCaptionModel.
        embeddings: [N, D] or [N, L, D] tensor or MappedEmbeddings.
        options: what add_decoding_options and add_running_options read.
        num_captions: captions per image, if not the option's.
        return_ended: add to each caption whether it ended with the stop token.
        image_ids: N ids, as models.decoding.generate takes them.

    Returns:
        List of N lists of (text, score), best first; with return_ended, (text, score, ended).

    Raises:
        UserError: a score is not a finite number.
    """
    from tqdm import tqdm

    from models.decoding import generate

    captions, step = [], options.batch_size * (GATHERED if model.datastore is not None else 1)
    for start in tqdm(current().share(range(0, len(embeddings), step)), desc="caption", unit="batch", disable=None, leave=False):
        decoded = generate(
            model,
            embeddings[start : start + step].float(),
            decoding=options.decoding,
            beam_size=options.beam_size,
            entry_length=options.entry_length,
            temperature=options.temperature,
            top_p=options.top_p,
            stop_token=options.stop_token,
            num_captions=num_captions or options.num_captions,
            seed=options.seed + start,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            length_penalty=options.length_penalty,
            min_length=options.min_length,
            text_prompt=options.text_prompt,
            return_ended=return_ended,
            image_ids=image_ids and image_ids[start : start + step],
        )
        broken = next((one[1] for of_image in decoded for one in of_image if not math.isfinite(one[1])), None)
        if broken is not None:
            advice = "Give a --temperature and a --length_penalty nearer to 1, or --mixed_precision no."
            raise UserError(f"captions have the score {broken}; expected a finite number. {advice}")
        captions += decoded
    return [[tuple(one) for one in of_image] for of_process in current().gather(captions) for of_image in of_process]


def write_captions(path, ids, names, columns, captions):
    """Write captions in the format that the suffix of `path` names.

    Args:
        path: name of a .csv, .jsonl or .json file.
        ids: image_id of each image.
        names: file name of each image.
        columns: name of each checkpoint.
        captions: [checkpoint][image] -> list of (text, score).
    """
    rows = [
        {"image_id": image_id, "file": name, "checkpoint": column, "rank": rank, "caption": text, "score": round(score, 6)}
        for image, (image_id, name) in enumerate(zip(ids, names))
        for column, of_checkpoint in zip(columns, captions)
        for rank, (text, score) in enumerate(of_checkpoint[image], start=1)
    ]
    # A lone surrogate, which UTF-8 lacks, becomes the escape that JSON has for it.
    settings = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with replace_file(path) as temporary, open(temporary, "w", **settings) as file:
        if path.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.endswith(".json"):
            results = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows if row["rank"] == 1]
            json.dump(results, file, ensure_ascii=False)
        else:
            _write_csv(file, ids, names, columns, captions)


def _write_csv(file, ids, names, columns, captions):
    """Write one line per image and rank, with two columns for each checkpoint."""
    writer = csv.writer(file)
    texts, scores = (["caption"], ["score"]) if len(columns) == 1 else (columns, [f"score {column}" for column in columns])
    writer.writerow(["image_id", "file", "rank", *(heading for pair in zip(texts, scores) for heading in pair)])
    for image, (image_id, name) in enumerate(zip(ids, names)):
        for rank in range(len(captions[0][image])):
            cells = [cell for of_checkpoint in captions for cell in of_checkpoint[image][rank]]
            writer.writerow([_without_nul(cell) for cell in (image_id, name, rank + 1, *cells)])


def _without_nul(cell):
    """Replace NUL characters, which GPT-2 has a token for and readers of CSV refuse, by U+FFFD in a cell that is text."""
    return cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell


def print_captions(names, columns, captions, num_captions):
    """Print captions, with scores where there are several per image; arguments as for write_captions."""
    for image, name in enumerate(names):
        print(name)
        for column, of_checkpoint in zip(columns, captions):
            label = f"  {column}: " if len(columns) > 1 else "  "
            for text, score in of_checkpoint[image]:
                print(f"{label}{text}" + (f"  ({score:.3f})" if num_captions > 1 else ""))
