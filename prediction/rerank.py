"""Choose among an image's captions by CLIP: the one whose text lies nearest to the image in the joint space (predict.py --rerank clip)."""

import argparse

from evaluation.truth import embed_texts, find_tower
from prediction.captions import caption_all

BLOCK = 4096  # embeddings that are projected together


def caption_and_rerank(model, embeddings, options, encoder):
    """Caption every embedding and order each image's captions by CLIP similarity → list of lists of (text, score), most similar first.

    embeddings: [N, D] as the encoder gives them; encoder: its name; options: as caption_all takes them, with device. --beam_size captions
    an image are decoded (or --num_captions, where that is more) and --num_captions kept; scores stay mean log-probabilities.
    Raises UserError where the encoder has no text tower.
    """
    tower = find_tower(encoder, options.device, "--rerank clip")
    wider = argparse.Namespace(**{**vars(options), "num_captions": max(options.beam_size, options.num_captions)})
    captions = caption_all(model, embeddings, wider)
    return rerank(captions, embeddings, tower, encoder, options.num_captions)


def rerank(captions, embeddings, tower, encoder, kept):
    """Order each image's captions by their cosine with the image → the first `kept` of each.

    captions: list of N lists of (text, score); embeddings: [N, D]; tower: a TextTower; encoder: its name. Of equally similar ones the
    likelier stays first.
    """
    import torch

    texts = list(dict.fromkeys(text for several in captions for text, _ in several))
    encoded = dict(zip(texts, embed_texts(tower, encoder, texts)))
    blocks = (embeddings[start : start + BLOCK] for start in range(0, len(embeddings), BLOCK))  # maybe still in their files
    images = torch.cat([tower.project(block.float()).cpu() for block in blocks])
    ordered = []
    for image, several in zip(images, captions):
        ordered.append(sorted(several, key=lambda one: -float(encoded[one[0]] @ image))[:kept])
    return ordered
