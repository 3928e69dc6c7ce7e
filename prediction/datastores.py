"""The datastore of a captioner whose prompt shows captions of similar images: the one of its training, or another."""

import os

from common import UserError
from features.content import checkpoint_kind
from features.datastore import open_datastore


def add_datastore_option(parser):
    """Add --datastore to a parser, in a group of its own."""
    group = parser.add_argument_group("retrieval", "For checkpoints whose prompt shows captions of similar images; docs/beyond.md.")
    group.add_argument("--datastore", nargs="+", default=[], metavar="FILE",
                       help="feature files or folders of the checkpoint's encoder, of images or texts, to take these captions from "
                            "(default: those of its training)")  # fmt: skip


def attach_datastores(models, checkpoints, paths):
    """Give each model the datastore that its prompt needs.

    Args:
        models: ClipCaptionModels; their `datastore` is set.
        checkpoints: what each is called in an error.
        paths: feature files or folders of one datastore; empty for those of the training.

    Raises:
        UserError: no model takes a datastore, or one cannot be read, is of another encoder or width, or is too small.
    """
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
        kind = checkpoint_kind(model.config, model.origin.encoder)
        key = files, count, str(kind)
        if key not in opened:
            opened[key] = open_datastore(files, kind, count, checkpoint)
        model.datastore = opened[key]
