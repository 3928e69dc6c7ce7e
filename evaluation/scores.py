"""What evaluate.py prints and writes: tables, scores.json and how it was made, the captions with their own scores, nocaps' upload file."""

import hashlib
import json
import math
import platform
import shlex
import subprocess
from pathlib import Path

from common import UserError, replace_file
from evaluation.references import list_some
from evaluation.tokens import java_is_here

ROUNDED = 6  # decimals of an image's own scores
VARIETY = {
    "distinct": "different captions",
    "distinct_share": "share of different captions",
    "novel_share": "share not in the training set",
    "vocabulary": "different words",
    "mean_length": "words per caption",
    "ended_share": "share that ended with the stop token",
    "repeated_2grams": "share that repeats a 2-gram",
    "repeated_3grams": "share that repeats a 3-gram",
    "repeated_4grams": "share that repeats a 4-gram",
    "empty": "captions without a word",
}
PACKAGES = ("torch", "transformers", "numpy", "pycocoevalcap")  # whose versions scores.json names


def print_scores(about, scored):
    """Print a table for one or two sets of captions.

    Args:
        about: dict with references, split, images, images_with_references, references_per_image and tokeniser.
        scored: list of evaluation.scoring.Scored.
    """
    counts = about["references_per_image"]
    per_image = f"{counts['mean']:.1f} references per image ({counts['fewest']} to {counts['most']})"
    unpredicted = about["images_with_references"] - about["images"]
    print(f"{' and '.join(str(one.source) for one in scored)} against {about['references']}")
    print(f"{about['images']:,} images, {per_image}, split {about['split'] or 'not named'}, words by {about['tokeniser']}")
    if unpredicted:
        print(f"{unpredicted:,} images have references but no prediction: they are left out")
    heading = "".join(f"{_short(one.source):>28}" for one in scored)
    print(f"\n{'score x 100, 95 % interval':32}{heading}")
    for name in scored[0].metrics:
        print(f"{name:32}" + "".join(f"{_with_interval(one.metrics[name].value, one.intervals.get(name)):>28}" for one in scored))
    print("\n".join(["", *about.get("notes", [])]))
    for name, label in VARIETY.items():
        if any(name in one.variety for one in scored):
            print(f"{label:36}" + "".join(f"{_plain(one.variety.get(name)):>24}" for one in scored))
    for one in scored:
        if one.domains:
            print(f"\n{_short(one.source):32}{'images':>10}" + "".join(f"{name:>14}" for name in one.metrics))
            for domain, values in one.domains.items():
                print(f"{domain:32}{values['images']:>10,}" + "".join(f"{100 * values[name]:>14.2f}" for name in one.metrics))


def print_comparison(comparison, heading="second - first"):
    """Print the paired test of two sets of captions, as evaluation.statistics.compare returns it; nothing where it is empty."""
    if not comparison:
        return
    print(f"\n{heading + ', x 100':45}{'difference, 95 % interval':>28}{'p':>10}")
    for name, one in comparison.items():
        low, high = (100 * end for end in one["interval"])
        difference = f"{100 * one['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        print(f"{name:45}{difference:>28}{one['p_value']:>10.4f}")


def _short(source):
    name = Path(source).name
    return name if len(name) <= 26 else "..." + name[-23:]


def _with_interval(value, interval):
    return f"{100 * value:.2f}" + (f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else "")


def _plain(value):
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def write_scores(path, about, scored, keys, references, made_by, comparison=None, histogram=None, baselines=None):
    """Write scores.json and, beside it, the captions as {stem}.predictions.json.

    Of a second set of captions, the scores are under "other" and the captions in {stem}.predictions.2.json. Of a baseline, they are under
    "baselines" and in {stem}.predictions.{name}.json.

    Args:
        path: where scores.json goes.
        about: dict of plain values that come first.
        scored: list of evaluation.scoring.Scored.
        keys: the images in their order.
        references: evaluation.references.References.
        made_by: what describe_origin returns.
        comparison: what evaluation.statistics.compare returns, or None.
        histogram: the choice of --histogram, or None.
        baselines: dict of name to evaluation.baseline.Baseline, or None.
    """
    path = Path(path)

    def write_block(one, suffix):
        beside = path.with_suffix(f".predictions{suffix}.json")
        write_json(beside, [_prediction_row(one, place, key, references) for place, key in enumerate(keys)])
        return _describe_scored(one, beside.name, histogram)

    content = {**about, **write_block(scored[0], "")}
    if len(scored) > 1:
        content["other"] = {"predictions": str(scored[1].source), **write_block(scored[1], ".2")}
    if comparison:
        content["comparison"] = comparison
    if baselines:
        content["baselines"] = {
            name: {"predictions": one.scored.source, **write_block(one.scored, f".{name}"), "comparison": one.comparison}
            for name, one in baselines.items()
        }
    write_json(path, {**content, "made_by": made_by}, indent=2)


def _describe_scored(scored, file_name, histogram):
    """Describe the scores of one set of captions as scores.json holds them. file_name: of its captions."""
    block = {
        "scores": {name: metric.value for name, metric in scored.metrics.items()},
        "intervals": {name: list(interval) for name, interval in scored.intervals.items()},
        "captions": scored.variety,
        "predictions_file": file_name,
    }
    if scored.domains:
        block["domains"] = scored.domains
    if histogram:
        block["best_of_captions"] = {"score": histogram, "mean": sum(scored.best) / len(scored.best)}
    return block


def _prediction_row(scored, place, key, references):
    """Describe one image in COCO's result format, with more keys: what is known of its caption, references, the image's own scores."""
    prediction = scored.predictions[key]
    row = {"image_id": prediction.image_id, "caption": prediction.captions[0]}
    if prediction.scores:
        row |= {"score": round(prediction.scores[0], ROUNDED), "ended": prediction.ended[0]}
    if len(prediction.captions) > 1:
        row["captions"] = prediction.captions
    if key in references.file_names:
        row["file_name"] = references.file_names[key]
    row["references"] = references.captions[key]
    row["metrics"] = {name: round(float(metric.per_image[place]), ROUNDED) for name, metric in scored.metrics.items()}
    return row


def upload_rows(predictions, keys):
    """Make what nocaps' server takes.

    Args:
        predictions: dict of key to Prediction.
        keys: the references' keys in their order.

    Returns:
        List of {"image_id": int, "caption": str}.

    Raises:
        UserError: an id is not one of nocaps' numbers.
    """
    rows, odd = [], []
    for key in keys:
        if not key.isdecimal() or len(key) > 18:
            odd.append(key)
            continue
        rows.append({"image_id": int(key), "caption": predictions[key].captions[0]})
    if odd:
        raise UserError(f"{len(odd):,} image ids are not nocaps' numbers: {list_some(odd)}. Give predictions with the ids of nocaps' JSON.")
    return rows


def without_nan(content):
    """Replace numbers that JSON lacks, NaN and infinities, by None in a structure of lists, tuples and dicts."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path, content, indent=None):
    """Write plain values as JSON, whole or not at all; NaN and infinities become null."""
    text = json.dumps(without_nan(content), ensure_ascii=False, indent=indent, allow_nan=False)
    with replace_file(path) as temporary:
        # A lone surrogate, which UTF-8 lacks, becomes the escape that JSON has for it.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def describe_origin(script, arguments, seed, files):
    """Describe how a result was made.

    Args:
        script: "evaluate.py".
        arguments: list of str, its command line.
        seed: the seed it used.
        files: paths that it read.

    Returns:
        dict of plain values with command, seed, versions and sha256, the digest of each file. A folder's digest covers the names and
        bytes of its files.
    """
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "java": _java_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(["python", script, *arguments]),
        "seed": seed,
        "versions": versions,
        "sha256": {str(path): _file_digest(path) for path in dict.fromkeys(files)},
    }


def _file_digest(path):
    path = Path(path)
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(part.relative_to(path)).encode("utf-8", "surrogateescape"))
        if part.is_file():
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)
    return digest.hexdigest()


def _java_version():
    """Return the first line of `java -version` that names a version, or None without Java."""
    if not java_is_here():
        return None
    done = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)
    return next((line for line in done.stderr.splitlines() if "version" in line), None)
