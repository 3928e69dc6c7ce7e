"""Plots of a run: loss and learning rate, pictures with their captions, scores, and what the words of a caption attend to."""

import math
import tempfile
import textwrap
from pathlib import Path

from common import replace_file

# Validation curves that have their own panel: name in the log, label, color.
PANELS = (("val_cider", "CIDEr x 100\n(sample)", "tab:purple"), ("val_gap", "grounding gap\n(nats per token)", "tab:red"))


def _figure(**kwargs):
    """Make a matplotlib figure that needs no display and leaves the user's pyplot alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path, dpi):
    suffix = str(path).rpartition(".")[2].lower()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=suffix if suffix in ("png", "jpg", "jpeg", "pdf", "svg") else "png")


def plot_training(lines, title, path):
    """Draw loss and learning rate over optimizer steps and, below, CIDEr and grounding gap where they were measured.

    Args:
        lines: list of dicts with step, loss and lr, or with step, val_loss and, where measured, val_cider and val_gap.
        title: heading of the plot.
        path: where it goes.
    """
    panels = [(name, label, color) for name, label, color in PANELS if any(name in line for line in lines)]
    figure = _figure(figsize=(8, 4.5 + 2 * len(panels)))
    axes, *more = figure.subplots(1 + len(panels), sharex=True, squeeze=False, height_ratios=[4.5, *[2] * len(panels)])[:, 0]
    curves = _draw_curve(axes, lines, "loss", color="tab:blue", label="loss")
    curves += _draw_curve(axes, lines, "val_loss", color="tab:green", label="validation loss")
    rate_axes = axes.twinx()
    curves += _draw_curve(rate_axes, lines, "lr", color="tab:orange", linestyle="--", label="learning rate", marker=None)
    axes.set(ylabel="loss (nats per token)", title=title.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    rate_axes.set_ylabel("learning rate")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.legend(handles=curves, loc="upper right")
    for below, (name, label, color) in zip(more, panels):
        _draw_curve(below, lines, name, color=color)
        below.set_ylabel(label)
        below.set_ylim(bottom=min(0, below.get_ylim()[0]))
        below.grid(alpha=0.3)
    figure.axes[len(panels)].set_xlabel("optimizer step")
    _save(figure, path, dpi=120)


def _draw_curve(axes, lines, name, **style):
    """Draw one value of the log over steps. Returns the curves drawn: a list of one, or of none where no line has the value."""
    scale = 100 if name == "val_cider" else 1
    points = [(line["step"], scale * line[name]) for line in lines if name in line]
    if not points:
        return []
    mark = {"marker": "o", "markersize": 3} if len(points) < 30 or name.startswith("val_") else {}
    return axes.plot(*zip(*points), **{**mark, **style})


def plot_captions(images, captions, path, columns=4):
    """Draw a grid of pictures, each with its captions below.

    Args:
        images: list of PIL images.
        captions: list of lists of str, in the same order.
        path: where the grid goes.
        columns: pictures per row.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    texts = ["\n".join(textwrap.fill(" ".join(caption.split()).replace("$", r"\$"), 34) for caption in several) for several in captions]
    lines = max(text.count("\n") + 1 for text in texts)
    figure = _figure(figsize=(3.2 * columns, (3.2 + 0.2 * lines) * rows))
    for axes, image, text in zip(figure.subplots(rows, columns, squeeze=False).flat, images, texts):
        axes.imshow(image, interpolation="nearest" if max(image.size) < 160 else "antialiased")
        axes.set_xlabel(text, fontsize=10)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _save(figure, path, dpi=110)


def show_captions(images, captions, columns=4):
    """Draw the grid of plot_captions for a notebook. Returns an IPython.display.Image, shown where it is the last line of a cell."""
    from IPython.display import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.png"
        plot_captions(images, captions, path, columns)
        return Image(data=path.read_bytes(), format="png")


def plot_histogram(values, title, label, path):
    """Draw how often each score occurs, with the mean marked.

    Args:
        values: list of float, one per caption.
        title: heading of the plot.
        label: what the values are.
        path: where the plot goes.
    """
    mean = sum(values) / len(values)
    figure = _figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.hist(values, bins=40, color="tab:blue", alpha=0.8)
    axes.axvline(mean, color="tab:orange", linestyle="--", label=f"mean {mean:.1f}")
    axes.set(xlabel=label, ylabel="captions", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path, dpi=120)


def plot_explanation(words, attention, nearest, title, path):
    """Draw the attention of a caption's words to the prefix vectors, each labelled with the words nearest to it.

    Args:
        words: T str.
        attention: [T, P] array, each row sums to 1.
        nearest: P lists of (word, cosine).
        title: heading of the plot.
        path: where the plot goes.
    """
    count, length = attention.shape
    figure = _figure(figsize=(3 + 0.45 * length, 2.6 + 0.3 * count))
    axes = figure.subplots()
    shown = axes.imshow(attention, cmap="viridis", aspect="auto", vmin=0)
    labels = [f"{place}: " + "  ".join(f"{word or '␣'} {value:.2f}" for word, value in several) for place, several in enumerate(nearest)]
    axes.set_xticks(range(length), [label.replace("$", r"\$") for label in labels], rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(count), [(word or "␣").replace("$", r"\$") for word in words], fontsize=9)
    axes.set(xlabel="prefix vector and the words nearest to it (cosine)", ylabel="word of the caption")
    axes.set_title(textwrap.fill(title.replace("$", r"\$"), 60), fontsize=10)
    figure.colorbar(shown, ax=axes, label="share of attention to the prefix")
    _save(figure, path, dpi=120)


def plot_titled(image, title, path):
    """Draw one PIL image with its caption above."""
    figure = _figure(figsize=(6, 6 * image.height / image.width + 0.8) if image.height < 3 * image.width else (6, 18))
    axes = figure.subplots()
    axes.imshow(image)
    axes.set_title(textwrap.fill(title.replace("$", r"\$"), 60))
    axes.set_axis_off()
    _save(figure, path, dpi=110)
