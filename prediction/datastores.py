"""The texts that a captioner consults: the datastore of its prompt (retrieval), or the memory of one that was trained on texts."""

import functools
import os

from common import UserError
from features.content import check_compatible, checkpoint_kind, join_features, text_kind
from features.datastore import open_datastore
from features.store import load_features


def add_store_options(parser):
    """Add --datastore and --memory to a parser, in a group of their own."""
    group = parser.add_argument_group("retrieval and training on texts", "For checkpoints that were trained so; see docs/beyond.md.")
    group.add_argument("--datastore", action="append", default=[], metavar="FILE",
                       help="feature file or folder of the checkpoint's encoder, of images or texts, to take captions of similar images "
                            "from; repeat it for several (default: those of its training)")  # fmt: skip
    group.add_argument("--memory", action="append", default=[], metavar="FILE",
                       help="features of texts, such as the training texts: a checkpoint trained on texts sees each picture as a mean of "
                            "those nearest to it, as in DeCap; repeat it for several (default: none)")  # fmt: skip


def attach_stores(models, checkpoints, datastore=(), memory=()):
    """Give each model the datastore that its prompt needs, and the memory that the user wants.

    Args:
        models: ClipCaptionModels; their `datastore` and `memory` are set.
        checkpoints: what each is called in an error.
        datastore, memory: paths, as add_store_options reads them.

    Raises:
        UserError: no model takes one, or a file cannot be read, is of another encoder or width, is too small, or is not of texts.
    """
    _attach_datastores(models, checkpoints, datastore)
    trained_on_texts = [(model, checkpoint) for model, checkpoint in zip(models, checkpoints) if model.config.text_training]
    if memory and not trained_on_texts:
        raise UserError(f"--memory is for captioners trained on texts, and {checkpoints[0]} was trained on images. Leave it out.")
    texts = load_memory(memory) if memory else None
    for model, checkpoint in trained_on_texts if memory else ():
        check_compatible(texts.kind, text_kind(model.config), memory[0], checkpoint)
        model.memory = texts.clip_embedding


def load_memory(paths):
    """Read a memory of texts.

    Args:
        paths: feature files or folders of texts of one encoder.

    Returns:
        features.content.Features, embeddings float32 [M, J] in memory.

    Raises:
        UserError: a file cannot be read, is not of texts, or is not normalised.
    """
    from models.texts import unnormalized_row

    features = join_features([load_features(path) for path in paths], paths)
    features.clip_embedding = features.clip_embedding[:].float()
    row = unnormalized_row(features.clip_embedding) if features.kind.are_texts else None
    if row is not None:
        raise UserError(f"{paths[0]} holds a text embedding {row} that is not normalised. Make the file again with parse_text.py.")
    return features


def _attach_datastores(models, checkpoints, paths):
    """Give each model whose prompt needs it the datastore in `paths`, or without any that of its training."""
    from models.encoders.text import load_projection

    retrieving = [(model, checkpoint) for model, checkpoint in zip(models, checkpoints) if model.config.retrieval]
    if paths and not retrieving:
        raise UserError(f"--datastore, but the prompt of {checkpoints[0]} shows no captions of similar images. Leave it out.")
    opened = {}
    for model, checkpoint in retrieving:
        recorded = model.config.retrieval
        files, count = tuple(paths or recorded["datastore"]), recorded["captions"]
        missing = next((path for path in files if not os.path.exists(path)), None)
        if missing and not paths:
            raise UserError(f"{checkpoint} shows captions of {missing}, which is not here. Give it, or another one, as --datastore.")
        kind = text_kind(model.config) if model.config.text_training else checkpoint_kind(model.config, model.origin.encoder)
        key = files, count, str(kind)
        if key not in opened:
            opened[key] = open_datastore(files, kind, count, checkpoint, functools.partial(load_projection, device=model.clip_device))
        model.datastore = opened[key]
