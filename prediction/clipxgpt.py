"""CLIPxGPT's command line: its options, where its weights are looked for, and what it says and writes."""

from pathlib import Path


def add_clipxgpt_options(parser):
    """Add CLIPxGPT's options to predict.py's; -I, -C and -T are shared with the rest."""
    group = parser.add_argument_group("CLIPxGPT's weights")
    group.add_argument("-S", "--size", choices=("S", "L"), help="where weights are looked for: weights/small or weights/large (default S)")
    group.add_argument("-R", "--res-path", default="./data/result/prediction", help="folder for {picture}-R{S|L}.jpg, with the caption")


def find_checkpoints(names, size):
    """What --checkpoint names → list of paths or names as load_checkpoint takes them.

    A name that is nowhere else is looked for in weights/small|large/. Without any, they are CLIPxGPT's published weights.
    Raises UserError saying what to download when these are not here.
    """
    from common import UserError
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
                # without --size it need not be CLIPxGPT's: load_checkpoint says what is missing
        found.append(name)
    return found


def show_generated(model, pictures, captions, folder):
    """Print `Generated Caption: "…"` for each picture, and write {stem}-R{S|L}.jpg, the picture under its caption, into `folder`."""
    from models.encoders.images import read_image
    from reports.plots import plot_titled

    letter = "L" if model.config.clip_width >= 1024 else "S"
    for picture, ((text, _), *_) in zip(pictures, captions):
        if len(pictures) > 1:
            print(picture)
        print(f'Generated Caption: "{text}"')
        plot_titled(read_image(picture), text, Path(folder) / f"{Path(picture).stem}-R{letter}.jpg")
    print(f"wrote {folder}")
