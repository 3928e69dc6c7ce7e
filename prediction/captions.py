"""Captions of many embeddings: decoded batch by batch, reranked, printed and written. predict.py and evaluate.py share this."""

import csv
import dataclasses
import json
import math

from common import UserError, replace_file, utf8_text
from features.processes import current
from prediction.consensus import FEWEST_DOCUMENTS, rerank_by_agreement
from prediction.ngrams import MOST_COMPARED

RERANK_BLOCK = 4096  # embeddings projected together
GATHERED = 16  # batches from which images with prompts of one length are gathered, to be decoded together
RERANKERS = {
    "clip": "the one that CLIP finds nearest to the image",
    "clip+score": "the one with the highest cosine + W times mean log-probability, both in standard deviations over the image's captions",
    "consensus": "the one most similar to the others, without CLIP and also for sounds (minimum Bayes risk: mean CIDEr with the others, or "
    f"mean chrF for fewer than {FEWEST_DOCUMENTS} images)",
    "train": "the one most similar to the captions of --train_data's images, as far as ridge regression lets them count for the image",
}
WITHOUT_FILES = ("clip", "clip+score", "consensus")  # those that need nothing but captioner and encoder
BY_CLIP = ("clip", "clip+score")  # those that need the encoder's text tower
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


def add_rerank_option(parser):
    """Add --rerank to a parser, in a group of its own; returns the group."""
    choices = "; ".join(f"{name}: {about}" for name, about in RERANKERS.items())
    group = parser.add_argument_group("choice among captions")
    group.add_argument("--rerank", choices=RERANKERS,
                       help="decode --beam_size captions per image, or --num_captions if that is more, and put the best first. "
                            f"{choices} (default: none, the likeliest first)")  # fmt: skip
    group.add_argument(
        "--rerank_weight", type=float, metavar="W", help="weight W of the log-probability for --rerank clip+score (default 1)"
    )
    return group


def check_rerank(parser, options):
    """Check that --rerank has several captions to choose from; a mistake ends in one line and exit code 2."""
    if options.rerank and options.decoding == "greedy":
        parser.error("--rerank needs several captions per image to choose from; use --decoding beam or sample")
    if options.rerank_weight is not None and options.rerank != "clip+score":
        parser.error("--rerank_weight weighs the log-probability for --rerank clip+score; give both, or leave it out")
    if options.rerank_weight is not None and options.rerank_weight < 0:
        parser.error(f"--rerank_weight is {options.rerank_weight}; expected 0 or more")
    if options.rerank == "train" and not options.train_data:
        parser.error("--rerank train compares with captions of the training set; give its feature file as --train_data")
    several = max(options.beam_size, options.num_captions)
    if options.rerank and several < 2:
        parser.error("--rerank needs several captions per image to choose from; give --beam_size 5, the number to decode")
    if options.rerank in ("consensus", "train") and several > MOST_COMPARED:
        limit = f"--rerank {options.rerank} compares at most {MOST_COMPARED} captions per image"
        parser.error(f"{limit}; --beam_size or --num_captions is {several}")


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


# -- Reranking -------------------------------------------------------------------------------------------------------------


def learn_from_training_set(train, options, kind, name):
    """Take from the training set what --rerank needs of it.

    Args:
        train: features.content.Features, or None.
        options: rerank and train_data.
        kind: features.content.EmbeddingKind of the images to caption.
        name: what these are called in an error.

    Returns:
        prediction.training_votes.TrainingVotes or prediction.ngrams.DocumentFrequencies, as --rerank needs it; or None.

    Raises:
        UserError: the training set's embeddings do not go together with `kind`, or it has no captions.
    """
    if train is None or options.rerank not in ("consensus", "train"):
        return None
    from features.content import check_compatible
    from prediction.training_votes import TrainingVotes, count_image_captions

    if options.rerank == "consensus":
        return count_image_captions(train)
    check_compatible(train.kind, dataclasses.replace(kind, normalized=None), options.train_data, name)
    return TrainingVotes(train, options.train_data)


def caption_and_rerank(model, embeddings, options, encoder, train=None, return_ended=False, image_ids=None):
    """Caption every embedding and put the caption first that --rerank finds best.

    Args:
        model: ClipCaptionModel.
        embeddings: [N, D], as the encoder gives them; for consensus and train also [N, L, D].
        options: as caption_all takes them. --beam_size captions per image are decoded, or --num_captions if that is more.
        encoder: its name, for clip and clip+score.
        train: what learn_from_training_set returns; for consensus None will do.
        return_ended, image_ids: as caption_all takes them.

    Returns:
        What caption_all returns; the scores stay mean log-probabilities.

    Raises:
        UserError: clip was asked for, and the encoder has no text tower or there are several embeddings per image.
    """
    tower = None
    if options.rerank in BY_CLIP:
        from models.encoders.text import require_text_tower

        if embeddings.ndim != 2:
            raise UserError(f"--rerank {options.rerank} needs one embedding per image; these images have several. Use --rerank consensus.")
        tower = require_text_tower(encoder, options.device, f"--rerank {options.rerank}")
    captions = caption_all(model, embeddings, options, max(options.beam_size, options.num_captions), return_ended, image_ids)
    return choose_captions(captions, embeddings, options, tower, train, image_ids)


def choose_captions(captions, embeddings, options, tower=None, train=None, image_ids=None):
    """Put the caption first that --rerank finds best, among those of each image.

    Args:
        captions: list of N lists of tuples that begin with the text and its score.
        embeddings: [N, D].
        options: rerank, rerank_weight and num_captions, as add_rerank_option and add_decoding_options read them.
        tower: models.encoders.text.TextTower, for clip and clip+score.
        train, image_ids: as caption_and_rerank takes them.

    Returns:
        List of N lists of num_captions of the same tuples.
    """
    if options.rerank == "consensus":
        return rerank_by_agreement(captions, options.num_captions, train)
    if options.rerank == "train":
        from prediction.training_votes import rerank_by_training_set

        return rerank_by_training_set(captions, options.num_captions, embeddings, image_ids, train)
    weight = (1 if options.rerank_weight is None else options.rerank_weight) if options.rerank == "clip+score" else None
    return rerank(captions, embeddings, tower, options.num_captions, weight)


def rerank(captions, embeddings, tower, kept, weight=None):
    """Order each image's captions by their cosine with the image, and by their log-probability too; equal ones keep their order.

    Args:
        captions: list of N lists of tuples that begin with the text and its score.
        embeddings: [N, D].
        tower: models.encoders.text.TextTower.
        kept: captions to keep per image.
        weight: order by cosine + weight * score, both in standard deviations over the image's captions; None: by cosine alone.

    Returns:
        List of N lists of the same tuples.
    """
    import torch

    from models.encoders.text import embed_captions

    texts = list(dict.fromkeys(text for several in captions for text, *_ in several))
    encoded = dict(zip(texts, embed_captions(tower, texts)))
    blocks = (embeddings[start : start + RERANK_BLOCK] for start in range(0, len(embeddings), RERANK_BLOCK))  # may be on disk
    images = torch.cat([tower.project(block.float()).cpu() for block in blocks])
    ordered = []
    for image, several in zip(images, captions):
        values = torch.stack([encoded[one[0]] for one in several]) @ image  # [M]
        if weight is not None:
            values = _standardize(values) + weight * _standardize(torch.tensor([one[1] for one in several]))
        ordered.append([several[place] for place in values.argsort(descending=True, stable=True)[:kept]])
    return ordered


def _standardize(values):
    """Count values [M] in standard deviations from their mean; equal ones become zeros."""
    values = values - values.mean()
    spread = values.square().mean().sqrt()
    return values / spread if spread > 1e-9 else 0 * values


# -- Output ----------------------------------------------------------------------------------------------------------------


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
            writer.writerow([image_id, name, rank + 1, *cells])


def print_captions(names, columns, captions, num_captions):
    """Print captions, with scores where there are several per image; arguments as for write_captions."""
    for image, name in enumerate(names):
        print(name)
        for column, of_checkpoint in zip(columns, captions):
            label = f"  {column}: " if len(columns) > 1 else "  "
            for text, score in of_checkpoint[image]:
                print(f"{label}{text}" + (f"  ({score:.3f})" if num_captions > 1 else ""))
