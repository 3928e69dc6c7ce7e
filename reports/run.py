"""Show a run on one page: settings, curves, scores, best and worst captions, samples during training, and how it was made.

  python -m reports.run ./coco_train/                                            # writes ./coco_train/coco_prefix_report.html
  python -m reports.run ./coco_train/ --images data/coco/val2014/ --out report.html
  python -m reports.run ./coco_train/ --scores ./elsewhere/scores.json

Scores are what evaluate.py --out wrote: every .json file in OUT_DIR that holds scores, or those given with --scores. Pictures are found in
--images by the names or ids of the images; for a sound, a picture of the same stem (its spectrogram). The page holds everything it shows:
it loads nothing from a network and runs no script.
"""

import json
import sys
import tempfile
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file
from reports import page
from reports.files import find_scores, read_checked, read_lines
from reports.pictures import PictureFolders, data_uri, picture_uri

SHOWN = 8  # best captions, and as many of the worst
METRICS = "_metrics.jsonl"
INTERVAL = "95 % interval"


def find_run(out_dir, prefix):
    """Find the stem of the run's files in a folder. Raises UserError when there is none, or several and no prefix."""
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise UserError(f"no folder {out_dir}; expected the --out_dir of train.py.")
    stems = sorted(path.name.removesuffix(METRICS) for path in out_dir.glob(f"*{METRICS}"))
    if prefix is not None:
        if prefix not in stems:
            raise UserError(f"{out_dir} has no run {prefix!r}; it has {', '.join(stems) or 'none'}. Give one of these as --prefix.")
        return prefix
    if not stems:
        raise UserError(f"{out_dir} holds no *{METRICS}; expected the --out_dir of train.py.")
    if len(stems) > 1:
        raise UserError(f"{out_dir} holds {len(stems)} runs: {', '.join(stems)}. Choose one with --prefix.")
    return stems[0]


def draw_curves(lines, title):
    """Draw the curves of a run as a picture in the page."""
    from reports.plots import plot_training

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.svg"
        plot_training(lines, title, path)
        return page.image(data_uri(path.read_bytes(), "image/svg+xml"), "loss, learning rate and validation over steps", "curves")


def show_settings(config):
    """Show what the model is, and the options of the command."""
    model, made_by = config.get("model", {}), config.get("made_by", {})
    plain = [[name, _plain(value)] for name, value in model.items() if value is not None and name not in ("gpt_config", "base")]
    arguments = [[f"--{name}", _plain(value)] for name, value in made_by.get("arguments", {}).items() if value not in (None, [], False)]
    return page.table(None, plain) + page.folded("every option", page.table(None, arguments))


def show_progress(lines):
    """Show the last loss and a table of the validations."""
    losses, validated = ([line for line in lines if name in line] for name in ("loss", "val_loss"))
    parts = []
    if losses:
        last = losses[-1]
        parts.append(page.paragraph(f"Step {last['step']:,}, epoch {last['epoch']}: loss {last['loss']:.4f} nats per token."))
    if validated:
        names = {"val_loss": "loss", "val_gap": "grounding gap", "val_cider": "CIDEr x 100 (sample)", "val_distinct": "distinct"}
        names["val_ended"] = "ended"
        shown = [line | ({"val_cider": 100 * line["val_cider"]} if line.get("val_cider") is not None else {}) for line in validated]
        rows = [[f"{line['step']:,}", line["epoch"], *(_figure(line.get(name)) for name in names)] for line in shown]
        parts.append(page.folded(f"{len(rows)} validations", page.table(["step", "epoch", *names.values()], rows)))
        if validated[-1].get("val_collapse"):
            parts.append(page.paragraph(f"The captions hardly depend on their images: {validated[-1]['val_collapse']}.", "warning"))
    return "".join(parts)


def show_scores(path, content, folders):
    """Show one score file: its table, and its best and worst captions."""
    intervals = content.get("intervals", {})
    between = {name: " to ".join(map(_percent, ends)) for name, ends in intervals.items()}
    rows = [[name, _percent(value), between.get(name, "")] for name, value in content["scores"].items()]
    variety = [[name.replace("_", " "), _figure(value)] for name, value in content.get("captions", {}).items()]
    about = f"{content.get('images', '?')} images, split {content.get('split') or 'not named'}, words by {content.get('tokeniser')}"
    parts = [page.paragraph(f"{about}; {content.get('predictions')} against {content.get('references')}.")]
    parts += [page.paragraph(note, "note") for note in content.get("notes", [])]
    parts += [page.table(["score x 100", "", INTERVAL], rows), page.folded("what the captions are like", page.table(None, variety))]
    for domain, values in content.get("domains", {}).items():
        parts.append(page.paragraph(f"{domain}: " + ", ".join(f"{name} {_figure(value)}" for name, value in values.items())))
    beside = path.with_name(Path(str(content["predictions_file"])).name)
    if beside.is_file():
        parts.append(show_extremes(read_checked(beside, "captions"), folders))
    else:
        parts.append(page.paragraph(f"{beside.name} is not beside {path.name}: its captions cannot be shown.", "note"))
    return page.section(f"Scores: {path.name}", *parts)


def show_extremes(rows, folders):
    """Show the best and the worst captions by CIDEr, or by the first score without it, with the pictures that are found."""
    rows = [row for row in rows if row["metrics"]]
    if not rows:
        return ""
    metric = "CIDEr" if "CIDEr" in rows[0]["metrics"] else next(iter(rows[0]["metrics"]))
    ordered = sorted(rows, key=lambda row: -(row["metrics"].get(metric) or 0))
    count = min(SHOWN, (len(ordered) + 1) // 2)
    parts, pictured = [], 0
    for title, some in (("Best", ordered[:count]), ("Worst", ordered[count:][-count:][::-1])):
        shown = []
        for row in some:
            where = folders.find(row["image_id"], row.get("file_name"))
            uri = picture_uri(where) if where else None
            pictured += uri is not None
            shown.append({**row, "uri": uri, "note": f"{metric} {_percent(row['metrics'].get(metric), 1)}"})
        parts += [f"<h3>{title} captions by {page.text(metric)}</h3>", page.cards(shown)] if shown else []
    if not pictured:
        parts.append(page.paragraph("No pictures: give the folder they are in with --images.", "note"))
    return "".join(parts)


def show_samples(samples, folders):
    """Show the sample captions of the last validation, and folded those of the earlier ones."""
    steps = sorted({row["step"] for row in samples})
    if not steps:
        return ""

    def rows_of(step):
        return [row for row in samples if row["step"] == step]

    last = []
    for row in rows_of(steps[-1]):
        where = folders.find(row["image_id"], row.get("file_name"))
        uri = picture_uri(where) if where else None
        last.append({**row, "references": [row["reference"]], "uri": uri, "note": f"CIDEr {_percent(row['cider'], 1)}"})
    headings = ["image", "reference", "caption"]
    earlier = [
        page.folded(f"step {step:,}", page.table(headings, [[row["image_id"], row["reference"], row["caption"]] for row in rows_of(step)]))
        for step in steps[:-1]
    ]
    return page.paragraph(f"After step {steps[-1]:,}, decoded greedily:") + page.cards(last) + page.folded("earlier ones", "".join(earlier))


def show_origin(config, scores):
    """Show commands, seeds, versions and digests of the run and of its scores."""
    made = [("train.py", config.get("made_by", {})), *((path.name, content.get("made_by", {})) for path, content in scores)]
    parts = []
    for title, one in made:
        rows = [["seed", one["seed"]]] if "seed" in one else []
        rows += [[name, _plain(value)] for name, value in one.get("versions", {}).items()]
        data = one.get("data", {})
        rows += [["data", ", ".join(map(str, data.get("files", []))) + f" (digest {data.get('digest')})"]] if data else []
        rows += [[f"SHA-256 of {name}", value] for name, value in one.get("sha256", {}).items()]
        if one:
            parts += [f"<h3>{page.text(title)}</h3>", page.code(one["command"]) if "command" in one else "", page.table(None, rows)]
    return "".join(parts)


def _plain(value):
    return value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


def _percent(value, decimals=2):
    return "" if value is None else f"{100 * value:.{decimals}f}"


def _figure(value):
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def build_report(out_dir, prefix=None, scores=(), images=()):
    """Make the report of a run. Arguments are the options of the same names.

    Returns:
        HTML, str.

    Raises:
        UserError: something is missing.
    """
    out_dir, stem, folders = Path(out_dir), find_run(out_dir, prefix), PictureFolders(images)
    found = find_scores(out_dir, scores)
    lines, samples = read_lines(out_dir / f"{stem}{METRICS}", "log"), read_lines(out_dir / f"{stem}_samples.jsonl", "samples")
    path = out_dir / f"{stem}.json"
    config = read_checked(path, "config") if path.is_file() else {}
    parts = [page.section("Training", draw_curves(lines, stem) if lines else page.paragraph("No step yet."), show_progress(lines))]
    parts += [show_scores(path, content, folders) for path, content in found]
    if not found:
        how = f"python evaluate.py --data val.pkl --checkpoint {out_dir / stem}_best.pt --out {out_dir / 'scores.json'}"
        parts.append(page.section("Scores", page.paragraph("None yet. This command computes them:"), page.code(how)))
    parts.append(page.section("Captions during training", show_samples(samples, folders)))
    parts.append(page.section("Settings", show_settings(config)))
    parts.append(page.section("How it was made", show_origin(config, found)))
    return page.page(f"{stem} in {out_dir}", parts)


@one_line_errors
def main(argv=None):
    """Read what a run left, make the page, write it."""
    parser = Parser(prog="python -m reports.run", description=__doc__)
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the --out_dir of train.py")
    parser.add_argument("--prefix", help="the --prefix of the run, where the folder holds several")
    parser.add_argument("--out", metavar="FILE", help="page to write (default {prefix}_report.html in OUT_DIR)")
    parser.add_argument("--scores", nargs="+", default=[], metavar="FILE", help="files of evaluate.py --out (default: all in OUT_DIR)")
    parser.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="folders of the pictures")
    options = parser.parse_args(argv)
    out = options.out or Path(options.out_dir) / f"{find_run(options.out_dir, options.prefix)}_report.html"
    content = build_report(options.out_dir, options.prefix, options.scores, options.images)
    with replace_file(out) as temporary:
        temporary.write_text(content, encoding="utf-8")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
