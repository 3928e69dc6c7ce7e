"""What evaluate.py compares: references out of any file, captions decoded from a feature file, embeddings for CLIPScore."""

import dataclasses
from pathlib import Path

from common import UserError
from evaluation.clipscore import TEXT_PREFIX
from evaluation.references import Prediction, References, image_key, list_some, name_domain, read_references
from prediction.captions import caption_all, check_width

TEXT_SUFFIXES = (".json", ".csv")
# A sound is not depicted: CLAP reads the caption as it stands.
NO_TEXT_PREFIX = ("clap:",)
TEXT_BATCH = 256  # captions


@dataclasses.dataclass
class Pictures:
    """A feature file as evaluate.py wants it."""

    references: References
    ids: dict  # key → the image_id as it stood in the file
    rows: dict  # key → row of features.clip_embedding
    features: object  # features.store.Features


def is_text(path):
    """Whether references are read as text (COCO, nocaps, Clotho); anything else is a feature file."""
    return Path(path).suffix.lower() in TEXT_SUFFIXES


def load_pictures(path):
    """Read a feature file → Pictures. Raises UserError as load_features does."""
    from features.store import load_features

    features = load_features(path)
    references, ids, rows = References({}, features.meta.get("split")), {}, {}
    for caption in features.captions:
        key = image_key(caption["image_id"])
        references.captions.setdefault(key, []).append(caption["caption"])
        ids.setdefault(key, caption["image_id"])
        rows.setdefault(key, caption["clip_embedding"])
        if isinstance(caption.get("file_name"), str):
            references.file_names[key] = caption["file_name"]
        if name_domain(caption.get("domain")):
            references.domains[key] = name_domain(caption["domain"])
    return Pictures(references, ids, rows, features)


def load_references(path):
    """Read references of any kind → References, and Pictures where the file holds features (else None)."""
    if is_text(path):
        return read_references(path), None
    pictures = load_pictures(path)
    return pictures.references, pictures


def decode_pictures(pictures, options):
    """Caption every image of a feature file with options.checkpoint → dict of key → Prediction."""
    import torch

    from models.checkpoints import load_checkpoint
    from models.encoders import pick_device
    from models.operators import accelerate_model

    device = pick_device(options.device)
    model = accelerate_model(load_checkpoint(options.checkpoint, options.gpt2_type, device))
    if options.mixed_precision != "no":
        model.gpt.to({"bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision])
    check_width(model, pictures.features.clip_embedding.shape[-1], options.data, options.checkpoint)
    rows = list(pictures.rows.values())
    captions = caption_all(model, pictures.features.clip_embedding[rows], options, return_ended=True)
    predictions = {}
    for key, of_image in zip(pictures.rows, captions):
        texts, scores, ended = (list(column) for column in zip(*of_image))
        predictions[key] = Prediction(pictures.ids[key], texts, scores, ended)
    return predictions


def load_tower(pictures, name, device):
    """The text tower that goes with a feature file's encoder, and the encoder's name. Raises UserError where there is none.

    name: the encoder, where the file does not say or says wrongly.
    """
    name = name or pictures.features.meta.get("encoder")
    if not name:
        raise UserError("the feature file does not name its encoder, whose text tower clipscore wants. Give --clip_model_type.")
    if pictures.features.clip_embedding.ndim != 2:
        raise UserError("clipscore wants one embedding an image; the feature file holds several. Extract pooled features.")
    return find_tower(name, device, "clipscore"), name


def find_tower(name, device, wish):
    """The text tower of an encoder → TextTower. Raises UserError where it has none; wish: what wants it, for the error."""
    from models.encoders import pick_device
    from models.encoders.text import load_text_tower

    tower = load_text_tower(name, pick_device(device))
    if tower is None:
        raise UserError(f"{name} has no text tower, which {wish} wants. Take a CLIP's features and checkpoint, or leave it out.")
    return tower


def embed_texts(tower, name, texts):
    """Captions in the joint space, with the words that CLIPScore puts before them → float32 [N, J] tensor on the CPU.

    name: the encoder's.
    """
    import torch

    prefix = "" if name.startswith(NO_TEXT_PREFIX) else TEXT_PREFIX
    batches = [[prefix + text for text in texts[start : start + TEXT_BATCH]] for start in range(0, len(texts), TEXT_BATCH)]
    return torch.cat([tower.encode_text(batch).cpu().float() for batch in batches])


def embed_for_clipscore(tower, name, pictures, keys, candidates, references):
    """Image and text embeddings in the joint space → images [N, J], candidates [N, J], list of N references [R, J]; numpy float32.

    keys: list of N; candidates: list of str; references: list of lists of str.
    """
    absent = [key for key in keys if key not in pictures.rows]
    if absent:
        raise UserError(f"{len(absent):,} images have no embedding in the feature file: {list_some(absent)}. Give features of these.")
    embedding = pictures.features.clip_embedding[[pictures.rows[key] for key in keys]].float()
    texts = list(dict.fromkeys([*candidates, *(text for several in references for text in several)]))
    place = {text: number for number, text in enumerate(texts)}
    images = tower.project(embedding).cpu().numpy()
    encoded = embed_texts(tower, name, texts).numpy()
    return images, encoded[[place[text] for text in candidates]], [encoded[[place[text] for text in several]] for several in references]
