"""Checkpoints that are ready to caption: each with its encoder, and with a text tower where its encoder has one."""

import dataclasses
from pathlib import Path

from common import UserError
from page.words import explain_words
from prediction.captions import caption_all
from prediction.datastores import attach_stores
from prediction.inputs import refuse_addresses
from prediction.loading import load_captioner, load_encoders
from prediction.reranking import BY_CLIP, choose_captions


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a captioner comes from."""

    checkpoint: str  # as prediction.loading.load_captioner takes it
    gpt2_type: str | None = None  # language model instead of the checkpoint's
    encoder: str | None = None  # encoder instead of the checkpoint's


@dataclasses.dataclass
class Captioner:
    """A loaded checkpoint.

    Attributes:
        name: what the page calls it.
        model: ClipCaptionModel.
        encoder: Encoder or SoundEncoder.
        hears: whether it captions sounds.
        tower: TextTower to rerank with, or None.
    """

    name: str
    model: object
    encoder: object
    hears: bool
    tower: object = None


@dataclasses.dataclass
class Outcome:
    """What a captioner says about an image or a sound.

    Attributes:
        name: the captioner's.
        captions: list of (text, score), best first.
        words: for each caption its words as page.words.explain_words gives them; empty where nobody asked.
        error: why there are no captions, or None.
    """

    name: str
    captions: list
    words: list
    error: str | None = None


def load_captioners(sources, device, mixed_precision="no", datastore=(), memory=()):
    """Load captioners; those of one encoder share it.

    Args:
        sources: list of Source.
        device: torch.device.
        mixed_precision: of the language models, "no", "bf16" or "fp16".
        datastore, memory: paths, as prediction.datastores.add_store_options reads them.

    Returns:
        List of Captioner, in the same order.

    Raises:
        UserError: one cannot be loaded.
    """
    checkpoints = [source.checkpoint for source in sources]
    refuse_addresses(*checkpoints, *datastore, *memory)
    models = [load_captioner(source.checkpoint, source.gpt2_type, device, mixed_precision) for source in sources]
    attach_stores(models, checkpoints, datastore, memory)
    audio = [model.config.audio for model in models]
    encoders = load_encoders(models, checkpoints, audio, [source.encoder for source in sources], device)
    towers = {id(encoder): _find_tower(model, encoder, device) for model, encoder in zip(models, encoders)}
    return [
        Captioner(name, model, encoder, bool(sounds), towers[id(encoder)])
        for name, model, encoder, sounds in zip(name_checkpoints(checkpoints), models, encoders, audio)
    ]


def name_checkpoints(checkpoints):
    """Name each checkpoint by its stem, or by as much of its path as tells it from the others."""
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _find_tower(model, encoder, device):
    """Load the text tower of an encoder; None where captions cannot be compared with its embeddings."""
    from models.encoders.text import load_text_tower

    if model.config.pooling != "pooled":
        return None
    try:
        tower = load_text_tower(encoder.name, device)
    except UserError:  # weights of the image tower alone
        return None
    return tower if tower is not None and (tower.modality == "audio") == (model.config.audio is not None) else None


def caption_embeddings(captioner, embeddings, settings):
    """Caption embeddings of one captioner with the same settings.

    Args:
        captioner: Captioner.
        embeddings: [N, D], or [N, L, D] with several vectors per image.
        settings: Settings.

    Returns:
        List of N lists of (text, score), best first.

    Raises:
        UserError: the settings do not fit this captioner.
    """
    if settings.rerank in BY_CLIP and captioner.tower is None:
        raise UserError(f"the encoder of {captioner.name} has no text tower to rerank with. Choose consensus or none.")
    several = max(settings.beam_size, settings.num_captions) if settings.rerank else settings.num_captions
    if settings.decoding == "sample":
        # The draws of an image depend on its place in a batch. Alone, equal requests get equal captions whoever else asks.
        captions = [caption_all(captioner.model, one[None], settings, several)[0] for one in embeddings]
    else:
        captions = caption_all(captioner.model, embeddings, settings, several)
    if settings.rerank is None:
        return captions
    # One image at a time, so that a caption does not depend on what else is asked for.
    pairs = zip(captions, embeddings)
    return [choose_captions([several], embedding[None], settings, captioner.tower)[0] for several, embedding in pairs]


def describe(captioner, embeddings, settings, explain):
    """Caption embeddings, and say what went wrong where something did.

    Args:
        captioner, embeddings, settings: as caption_embeddings takes them.
        explain: list of N bool, whether to measure what the words of the captions attend to.

    Returns:
        List of N Outcome.
    """
    try:
        captions = caption_embeddings(captioner, embeddings, settings)
    except UserError as error:
        if len(embeddings) == 1:
            return [Outcome(captioner.name, [], [], str(error))]
        # One image may be at fault: the others must not suffer for it.
        return [describe(captioner, embeddings[n : n + 1], settings, explain[n : n + 1])[0] for n in range(len(embeddings))]
    outcomes = []
    for one, embedding, wanted in zip(captions, embeddings, explain):
        words = [explain_words(captioner.model, embedding[None], text) for text, _ in one] if wanted else []
        outcomes.append(Outcome(captioner.name, one, words))
    return outcomes
