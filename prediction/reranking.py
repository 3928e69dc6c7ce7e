"""Choice among several captions of an image (--rerank). predict.py, evaluate.py and the page share this."""

import argparse
import dataclasses

from common import UserError
from prediction.captions import caption_all
from prediction.consensus import FEWEST_DOCUMENTS, rerank_by_agreement
from prediction.ngrams import MOST_COMPARED

RERANK_BLOCK = 4096  # embeddings projected together
RERANKERS = {
    "clip": "the one that CLIP finds nearest to the image",
    "clip+score": "the one with the highest cosine + W times mean log-probability, both in standard deviations over the image's captions",
    "consensus": "the one most similar to the others, without CLIP and also for sounds (minimum Bayes risk: mean CIDEr with the others, or "
    f"mean chrF for fewer than {FEWEST_DOCUMENTS} images)",
    "train": "the one most similar to the captions of --train_data's images, as far as ridge regression lets them count for the image",
}
WITHOUT_FILES = ("clip", "clip+score", "consensus")  # those that need nothing but captioner and encoder
BY_CLIP = ("clip", "clip+score")  # those that need the encoder's text tower
FOR_SAMPLES = ("clip", "train")  # those that judge a caption neither by its log-probability nor by the others
SAMPLING = {"decoding": "sample", "temperature": 0.6, "top_p": 0.95}  # of --rerank_samples; docs/small-captioner.md measures it


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
    group.add_argument(
        "--rerank_samples", type=int, default=0, metavar="N",
        help=f"captions that join the beams for --rerank {' and '.join(FOR_SAMPLES)}, drawn from the likeliest tokens, which have "
             f"{SAMPLING['top_p']} of the probability, at temperature {SAMPLING['temperature']} (default 0)")  # fmt: skip
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
    if options.rerank_samples < 0:
        parser.error(f"--rerank_samples is {options.rerank_samples}; expected 0 or more")
    if options.rerank_samples and (options.decoding != "beam" or options.rerank not in FOR_SAMPLES):
        rerankers = " and ".join(FOR_SAMPLES)
        parser.error(f"--rerank_samples adds samples to the beams of --decoding beam for --rerank {rerankers}; leave it out")
    several = max(options.beam_size, options.num_captions) + options.rerank_samples
    if options.rerank and several < 2:
        parser.error("--rerank needs several captions per image to choose from; give --beam_size 5, the number to decode")
    if options.rerank in ("consensus", "train") and several > MOST_COMPARED:
        limit = f"--rerank {options.rerank} compares at most {MOST_COMPARED} captions per image"
        parser.error(f"{limit}; --beam_size or --num_captions, and --rerank_samples, are {several}")


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


def caption_and_rerank(model, embeddings, options, encoder, learned=None, return_ended=False, image_ids=None):
    """Caption every embedding and put the caption first that --rerank finds best.

    Args:
        model: ClipCaptionModel.
        embeddings: [N, D], as the encoder gives them; for consensus and train also [N, L, D].
        options: as caption_all takes them. --beam_size captions per image are decoded, or --num_captions if that is more, and
            --rerank_samples drawn.
        encoder: its name, for clip and clip+score.
        learned: what learn_from_training_set returns; for consensus None will do.
        return_ended, image_ids: as caption_all takes them.

    Returns:
        What caption_all returns; the scores stay mean log-probabilities, those of a sample at its temperature.

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
    if options.rerank_samples:
        sampling = argparse.Namespace(**{**vars(options), **SAMPLING})
        samples = caption_all(model, embeddings, sampling, options.rerank_samples, return_ended, image_ids)
        captions = [beams + drawn for beams, drawn in zip(captions, samples)]
    return choose_captions(captions, embeddings, options, tower, learned, image_ids)


def choose_captions(captions, embeddings, options, tower=None, learned=None, image_ids=None):
    """Put the caption first that --rerank finds best, among those of each image.

    Args:
        captions: list of N lists of tuples that begin with the text and its score.
        embeddings: [N, D].
        options: rerank, rerank_weight and num_captions, as add_rerank_option and add_decoding_options read them.
        tower: models.encoders.text.TextTower, for clip and clip+score.
        learned, image_ids: as caption_and_rerank takes them.

    Returns:
        List of N lists of num_captions of the same tuples.
    """
    if options.rerank == "consensus":
        return rerank_by_agreement(captions, options.num_captions, learned)
    if options.rerank == "train":
        from prediction.training_votes import rerank_by_training_set

        return rerank_by_training_set(captions, options.num_captions, embeddings, image_ids, learned)
    weight = (1 if options.rerank_weight is None else options.rerank_weight) if options.rerank == "clip+score" else None
    return rerank_by_clip(captions, embeddings, tower, options.num_captions, weight)


def rerank_by_clip(captions, embeddings, tower, kept, weight=None):
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
