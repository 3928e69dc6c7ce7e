"""What evaluate.py says and writes: tables on the screen, scores.json, the captions with their own scores, nocaps' upload file."""

import json
from pathlib import Path

from common import UserError, replace_file
from evaluation.references import list_some

ROUNDED = 6  # decimals of an image's own scores
VARIETY = {
    "distinct": "different captions",
    "distinct_share": "share of different captions",
    "novel_share": "share not in the training set",
    "vocabulary": "different words",
    "mean_length": "words a caption",
    "ended_share": "share that ended by themselves",
    "repeated_2grams": "share with 2 words in a row twice",
    "repeated_3grams": "share with 3 words in a row twice",
    "repeated_4grams": "share with 4 words in a row twice",
    "empty": "captions without a word",
}


def print_scores(about, scored, sources):
    """Print a table for one or two sets of captions.

    about: dict with references, split, images, references_per_image, tokeniser; scored: list of objects with metrics, intervals,
    captions and domains; sources: what to call them.
    """
    counts = about["references_per_image"]
    each = f"{counts['mean']:.1f} references each ({counts['fewest']} to {counts['most']})"
    unpredicted = about["images_with_references"] - about["images"]
    print(f"{' and '.join(map(str, sources))} against {about['references']}")
    print(f"{about['images']:,} images, {each}, split {about['split'] or 'not named'}, words by {about['tokeniser']}")
    if unpredicted:
        print(f"{unpredicted:,} images have references and no prediction: they are left out")
    heading = "".join(f"{_short(source):>28}" for source in sources)
    print(f"\n{'score × 100, 95 % interval':32}{heading}")
    for name in scored[0].metrics:
        print(f"{name:32}" + "".join(f"{_with_interval(one.metrics[name].value, one.intervals.get(name)):>28}" for one in scored))
    print()
    for name, label in VARIETY.items():
        if any(name in one.captions for one in scored):
            print(f"{label:32}" + "".join(f"{_plain(one.captions.get(name)):>28}" for one in scored))
    for one, source in zip(scored, sources):
        if one.domains:
            names = list(one.metrics)
            print(f"\n{_short(source):32}{'images':>10}" + "".join(f"{name:>14}" for name in names))
            for domain, values in one.domains.items():
                print(f"{domain:32}{values['images']:>10,}" + "".join(f"{100 * values[name]:>14.2f}" for name in names))


def print_comparison(comparison):
    """Print the paired test of two sets of captions: what evaluation.statistics.compare gave."""
    print(f"\n{'second - first, × 100':32}{'difference, 95 % interval':>28}{'p':>10}")
    for name, one in comparison.items():
        low, high = (100 * end for end in one["interval"])
        difference = f"{100 * one['difference']:+.2f} ({low:+.2f} … {high:+.2f})"
        print(f"{name:32}{difference:>28}{one['p_value']:>10.4f}")


def _short(source):
    name = Path(source).name
    return name if len(name) <= 26 else "…" + name[-25:]


def _with_interval(value, interval):
    return f"{100 * value:.2f}" + (f" ({100 * interval[0]:.2f} … {100 * interval[1]:.2f})" if interval else "")


def _plain(value):
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def write_scores(path, about, scored, systems, keys, sources, comparison, made_by, best=None, references=None):
    """Write scores.json and, beside it, {stem}.predictions.json; of a second set "other" and {stem}.predictions.2.json.

    about, scored, sources: as print_scores takes them; systems: list of dicts of key → Prediction; keys: the order of the images;
    comparison: what evaluation.statistics.compare gave, or None; made_by: what evaluation.origin.describe_origin gave;
    best: None, or (name, list of lists of float): each image's best score among its captions; references: References, or None.
    Predictions are in COCO's result format, with more keys: file_name, score and ended where known, captions where there are several,
    references, and the image's own scores under "metrics".
    """
    path = Path(path)
    blocks = []
    for number, (one, system) in enumerate(zip(scored, systems)):
        beside = path.with_suffix(".predictions.json" if number == 0 else f".predictions.{number + 1}.json")
        block = {
            "scores": {name: metric.value for name, metric in one.metrics.items()},
            "intervals": {name: list(interval) for name, interval in one.intervals.items()},
            "captions": one.captions,
            "predictions_file": beside.name,
        }
        if one.domains:
            block["domains"] = one.domains
        if best:
            block["best_of_captions"] = {"score": best[0], "mean": sum(best[1][number]) / len(keys)}
        blocks.append(block)
        rows = []
        for place, key in enumerate(keys):
            prediction = system[key]
            row = {"image_id": prediction.image_id, "caption": prediction.captions[0]}
            if prediction.scores:
                row |= {"score": round(prediction.scores[0], ROUNDED), "ended": prediction.ended[0]}
            if len(prediction.captions) > 1:
                row["captions"] = prediction.captions
            if references:
                row |= {"file_name": references.file_names[key]} if key in references.file_names else {}
                row["references"] = references.captions[key]
            row["metrics"] = {name: round(float(metric.per_image[place]), ROUNDED) for name, metric in one.metrics.items()}
            rows.append(row)
        write_json(beside, rows)
    content = {**about, **blocks[0]}
    if len(blocks) > 1:
        content["other"] = {"predictions": str(sources[1]), **blocks[1]}
    if comparison:
        content["comparison"] = comparison
    content["made_by"] = made_by
    write_json(path, content, indent=2)


def upload_rows(predictions, keys):
    """What nocaps' server takes: [{"image_id": int, "caption": str}]. Raises UserError when an id is not nocaps' number."""
    rows, odd = [], []
    for key in keys:
        prediction = predictions[key]
        if not str(prediction.image_id).isdigit():
            odd.append(prediction.image_id)
            continue
        rows.append({"image_id": int(prediction.image_id), "caption": prediction.captions[0]})
    if odd:
        raise UserError(f"{len(odd):,} image ids are not nocaps' numbers: {list_some(odd)}. Give predictions with the ids of nocaps' JSON.")
    return rows


def write_json(path, content, indent=None):
    """Write plain values as JSON, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
