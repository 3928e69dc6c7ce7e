"""CLIPxGPT's command line: its options, where its weights are looked for, what it prints and writes."""

import itertools
from pathlib import Path

from common import UserError
from features.image_ids import printable_name


def add_clipxgpt_options(parser):
    """Add CLIPxGPT's options to predict.py's; -I, -C and -T are shared with the rest."""
    group = parser.add_argument_group("CLIPxGPT's published weights")
    group.add_argument("-S", "--size", choices=("S", "L"), help="look in weights/small or weights/large for the checkpoint (default S)")
    group.add_argument("-R", "--res-path", default="./data/result/prediction", metavar="FOLDER",
                       help="folder for {picture}-R{S|L}.jpg, pictures with captions (default ./data/result/prediction)")  # fmt: skip


def find_checkpoints(names, size):
    """Find the checkpoints that --checkpoint names.

    A name that is nowhere else is looked for in weights/small|large/. Without any name, CLIPxGPT's published weights are meant.

    Args:
        names: list of str.
        size: "S", "L" or None.

    Returns:
        List of paths or names as load_checkpoint takes them.

    Raises:
        UserError: CLIPxGPT's weights are not here; the message says what to download.
    """
    from models.published.clipxgpt import find_clipxgpt
    from models.weights import find_weights

    if not names:
        return [str(find_clipxgpt(size))]
    found = []
    for name in names:
        if find_weights(name, f"{name}.pt") is None:
            try:
                name = str(find_clipxgpt(size, name))
            except UserError:
                if size:
                    raise
                # Without --size it may be another checkpoint: load_checkpoint says what is missing.
        found.append(name)
    return found


def write_titled(model, pictures, captions, folder):
    """Write {stem}-R{S|L}.jpg into `folder` for each picture: the picture under its caption. A stem that recurs is numbered."""
    from models.encoders.images import read_image
    from reports.plots import plot_titled

    letter, taken = "L" if model.config.clip_width >= 1024 else "S", set()
    for picture, ((text, _), *_) in zip(pictures, captions):
        stem = printable_name(Path(picture).stem)
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([stem], numbered) if name.lower() not in taken)
        taken.add(name.lower())
        plot_titled(read_image(picture), text, Path(folder) / f"{name}-R{letter}.jpg")


def print_generated(pictures, captions):
    """Print `Generated Caption: "..."` for each picture."""
    for picture, ((text, _), *_) in zip(pictures, captions):
        if len(pictures) > 1:
            print(printable_name(picture))
        print(f'Generated Caption: "{text}"')
