"""What evaluate.py compares: references from any file, captions decoded from a feature file, embeddings for CLIPScore."""

import dataclasses
from pathlib import Path

import numpy as np

from common import UserError
from evaluation.by_image import ByImage, ImageIndex, OfEveryImage
from evaluation.references import Prediction, References, list_some, match_references, name_domain, read_references
from features.embeddings import select_rows
from features.image_ids import plain_id
from prediction.captions import caption_all
from prediction.reranking import RERANK_BLOCK, caption_and_rerank

TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")


@dataclasses.dataclass
class Pictures:
    """The images of a feature file; of millions, nothing but an index is in memory."""

    references: References
    ids: ByImage  # key -> the image_id as it is in the file
    rows: ByImage  # key -> row of features.clip_embedding
    features: object  # features.store.Features


def load_pictures(path):
    """Read a feature file as Pictures. Raises UserError as load_features does."""
    from features.store import load_features

    features = load_features(path)
    captions, texts, caption_rows = features.captions, features.texts, features.caption_rows
    index = ImageIndex(features.image_ids())

    def last_of(name, understand):
        """Read what the last caption of an image that has it says under a name."""
        return lambda numbers: next(filter(None, (understand(captions[number].get(name)) for number in reversed(numbers))), None)

    references = References(
        OfEveryImage(index, lambda numbers: [texts[number] for number in numbers]),
        features.meta.get("split"),
        file_names=ByImage(index, last_of("file_name", lambda name: name if isinstance(name, str) else None)),
        domains=ByImage(index, last_of("domain", name_domain)),
    )
    ids = OfEveryImage(index, lambda numbers: plain_id(captions[numbers[0]]["image_id"]))
    rows = OfEveryImage(index, lambda numbers: int(caption_rows[numbers[0]]))
    return Pictures(references, ids, rows, features)


def load_truth(data, references):
    """Read the references, and the images where a file has embeddings.

    Args:
        data: feature file, or None.
        references: file with references, or None for those of `data`.

    Returns:
        References; Pictures or None.
    """
    pictures = load_pictures(data) if data else None
    if not references:
        return pictures.references, pictures
    if Path(references).suffix.lower() in TEXT_SUFFIXES:
        return read_references(references), pictures
    embedded = load_pictures(references)
    return embedded.references, pictures or embedded


def decode_pictures(model, pictures, options, learned=None):
    """Caption every image of a feature file, and choose among the captions where --rerank says so.

    Args:
        model: ClipCaptionModel.
        pictures: Pictures.
        options: as caption_all takes them, and of evaluate.py.
        learned: what prediction.reranking.learn_from_training_set returns.

    Returns:
        dict of key to Prediction.
    """
    rows = list(pictures.rows.values())
    embeddings = select_rows(pictures.features.clip_embedding, rows)
    ids = list(pictures.ids.values())
    if options.rerank:
        encoder = options.clip_model_type or pictures.features.meta.get("encoder") or model.config.encoder
        captions = caption_and_rerank(model, embeddings, options, encoder, learned, return_ended=True, image_ids=ids)
    else:
        captions = caption_all(model, embeddings, options, return_ended=True, image_ids=ids)
    predictions = {}
    for key, of_image in zip(pictures.rows, captions):
        texts, scores, ended = (list(column) for column in zip(*of_image))
        predictions[key] = Prediction(pictures.ids[key], texts, scores, ended, pictures.references.file_names.get(key))
    return predictions


def load_tower(pictures, encoder, device):
    """Load the text tower of a feature file's encoder, for CLIPScore.

    Args:
        pictures: Pictures, or None.
        encoder: its name, where the file does not say or says wrongly.
        device: name of the device.

    Returns:
        models.encoders.text.TextTower.

    Raises:
        UserError: there are no embeddings, several per image, or no text tower.
    """
    if pictures is None:
        raise UserError("clipscore compares captions with embeddings of their images. Give the feature file of these images as --data.")
    encoder = encoder or pictures.features.meta.get("encoder")
    if not encoder:
        raise UserError("the feature file does not name its encoder, whose text tower clipscore needs. Give --clip_model_type.")
    if pictures.features.clip_embedding.ndim != 2:
        raise UserError("clipscore needs one embedding per image; the feature file holds several. Extract pooled features.")
    from models.encoders.text import require_text_tower

    return require_text_tower(encoder, device, "clipscore")


def find_rows(pictures, references, keys):
    """Find the embeddings of some images.

    Args:
        pictures: Pictures.
        references: References.
        keys: N of the references' keys.

    Returns:
        N rows of pictures.features.clip_embedding.

    Raises:
        UserError: an image has no embedding.
    """
    if references is pictures.references:
        return [pictures.rows[key] for key in keys]
    found = match_references(pictures.rows, references)
    rows = {theirs: pictures.rows[ours] for ours, theirs in found.items()}
    absent = [key for key in keys if key not in rows]
    if absent:
        raise UserError(f"{len(absent):,} images have no embedding in the feature file: {list_some(absent)}. Give features of these.")
    return [rows[key] for key in keys]


def embed_for_clipscore(tower, clip_embedding, candidates, references):
    """Embed images and texts in the joint space.

    Args:
        tower: models.encoders.text.TextTower.
        clip_embedding: [N, D] tensor or MappedEmbeddings.
        candidates: list of N str.
        references: list of N lists of str.

    Returns:
        float32 arrays: images [N, J], candidates [N, J], list of N references [R, J].
    """
    from models.encoders.text import embed_captions

    texts = list(dict.fromkeys([*candidates, *(text for several in references for text in several)]))
    place = {text: number for number, text in enumerate(texts)}
    starts = range(0, len(clip_embedding), RERANK_BLOCK)  # rows may be on disk
    images = np.concatenate([tower.project(clip_embedding[start : start + RERANK_BLOCK].float()).cpu().numpy() for start in starts])
    encoded = embed_captions(tower, texts).numpy()
    return images, encoded[[place[text] for text in candidates]], [encoded[[place[text] for text in several]] for several in references]
