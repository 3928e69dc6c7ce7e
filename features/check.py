"""What may be wrong with feature files before a run is spent on them: numbers, captions, leaks between files, shifted captions.

A problem should be corrected before a run; a note is only information. The comparison of captions with their images needs a text
tower, which is handed in. Letters: N images, C captions, D width, J width of the space that images and texts share.
"""

import itertools
import re

import numpy as np

from common import UserError
from features.alignment import compare_pairs
from features.embeddings import blocks, finite_rows
from features.store import load_features

LONG_WORDS, LONG_LETTERS = 60, 500  # COCO's longest caption has 50 words
MANY = 0.01  # a share of the captions or images above which a note is a problem
SAME_PICTURE = 0.99  # cosine from which embeddings of one image_id in two files are of one picture
TERMINATORS = tuple(".!?…。！？\"'”’)")
SHOWN = 3  # examples of each finding
LIST_AS_TEXT = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?s>|<pad>|<unk>|\[(?:SEP|CLS|PAD)\]")


class Report:
    """Findings on one file, or on several together: facts, problems and notes."""

    def __init__(self, name):
        self.name, self.facts, self.problems, self.notes = name, {}, [], []

    def add(self, count, of, what, problem=True, examples=()):
        """Note that `count` of `of` are `what`, if any are."""
        if count:
            shown = "; ".join(str(one) for one in itertools.islice(examples, SHOWN))
            line = f"{count:,} of {of:,} {what}" + (f" ({shown}{', ...' if count > SHOWN else ''})" if shown else "")
            (self.problems if problem else self.notes).append(line)

    def as_dict(self):
        """Plain values, for JSON."""
        return {"file": self.name, **self.facts, "problems": self.problems, "notes": self.notes}


def check_files(paths, towers=None, sample=2000, seed=0, encoder=None):
    """Check feature files one by one and together.

    Args:
        paths: the files.
        towers: function from an encoder's name to its text tower or None; without it captions are not compared with images.
        sample: how many images that comparison draws.
        seed: of that sample.
        encoder: the name to use where a file does not name its own.

    Returns:
        List of Report, the last one on all files together where there are several. A file that cannot be read is a report too.

    Raises:
        UserError: there is no such file.
    """
    reports, several = [], []
    for path in paths:
        report, faults = Report(str(path)), []
        reports.append(report)
        try:
            features = load_features(path, faults)
        except UserError as error:
            if str(error).startswith("no feature file"):
                raise
            report.problems.append(str(error))
            continue
        report.problems += faults[:SHOWN] + ([f"{len(faults) - SHOWN:,} more captions that cannot be used"] if len(faults) > SHOWN else [])
        several.append(_Keys(report, features))
        _check_meta(report, features)
        _check_embeddings(report, features, several[-1])
        if len(features.captions):
            _check_captions(report, features)
            compare_pairs(report, features, several[-1].good, towers, sample, seed, encoder)
    if len(several) > 1:
        reports.append(_check_leaks(several))
    return reports


class _Keys:
    """What images are known by in the search for the same one twice: hashes of ids and of embeddings."""

    def __init__(self, report, features):
        self.report, self.features = report, features
        self.rows, first = np.unique(features.caption_rows, return_index=True)  # rows that have captions, and the first of each
        self.captions = first
        hashes = np.fromiter((hash(str(image_id)) for image_id in features.image_ids()), np.int64, len(features.captions))
        self.ids = hashes[first]  # int64, one a row that has captions
        self.embeddings = np.zeros(len(features.clip_embedding), np.uint64)
        self.good = np.ones(len(features.clip_embedding), bool)  # neither NaN nor zero nor constant

    def named(self, places):
        """Images by their ids, for a message; places: into self.rows."""
        return (repr(self.features.captions[int(self.captions[place])]["image_id"]) for place in places)


def _check_meta(report, features):
    """Say what is in the file, and whether it is what its meta says."""
    embedding, meta = features.clip_embedding, features.meta
    rows, counts = np.unique(features.caption_rows, return_counts=True)
    report.facts.update(
        images=len(embedding), captions=len(features.captions), width=features.width, embeddings_per_image=features.embeddings_per_image,
        dtype=str(embedding.dtype).removeprefix("torch."), encoder=meta.get("encoder"), split=meta.get("split"),
        captions_per_image=round(float(counts.mean()), 2) if len(rows) else 0,
    )  # fmt: skip
    for key in ("images", "captions", "width", "dtype", "embeddings_per_image"):
        if key in meta and meta[key] != report.facts[key]:
            report.problems.append(f"meta says {key} {meta[key]}, found {report.facts[key]}")
    report.add(len(embedding) - len(rows), len(embedding), "images have no caption", problem=False)


def _check_embeddings(report, features, keys):
    """Go through all embeddings once: those that are no number, zero, constant, or the same for different images."""
    embedding = features.clip_embedding
    faults = {"hold NaN or infinity": [], "are zero throughout": [], "hold one value throughout": []}
    norm_sum = norm_count = 0
    weights = np.random.default_rng(0).integers(1, 2**63, int(np.prod(embedding.shape[1:])), dtype=np.uint64) | np.uint64(1)
    for start, block in blocks(embedding):
        flat = block.reshape(len(block), -1)
        finite, zero = finite_rows(block), (flat == 0).all(1)
        constant = (flat == flat[:, :1]).all(1) & ~zero & (flat.shape[1] > 1)
        for name, bad in zip(faults, (~finite, zero, constant & finite)):
            rows = bad.nonzero()[:, 0].numpy() + start
            faults[name].append(rows)
            keys.good[rows] = False
        flat = flat.float()
        kept = finite & ~zero
        norm_sum += float(flat[kept].norm(dim=1).double().sum())
        norm_count += int(kept.sum())
        keys.embeddings[start : start + len(block)] = _hashes(flat.numpy(), weights)
    for name, rows in faults.items():
        rows = np.concatenate(rows) if rows else []
        report.add(len(rows), len(embedding), f"embeddings {name}", examples=(f"row {row}" for row in rows))
    report.facts["mean_norm"] = round(norm_sum / norm_count, 4) if norm_count else None

    # The same embedding under different ids: a placeholder in place of pictures, or the same picture under two names.
    good = np.flatnonzero(keys.good[keys.rows])
    hashes = keys.embeddings[keys.rows[good]]
    _, first, which, times = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    repeated = good[(times[which] > 1) & (keys.ids[good] != keys.ids[good[first[which]]])]
    report.facts["distinct_embeddings"] = len(times)
    problem = len(repeated) > MANY * len(embedding) and not features.kind.are_texts  # captions that say the same are no fault
    report.add(len(repeated), len(embedding), "images have the embedding of another image", problem, keys.named(repeated))


def _hashes(flat, weights):
    """Hash each row of float32 [n, D]. Returns uint64 [n]; equal rows have equal hashes."""
    hashes = np.zeros(len(flat), np.uint64)
    for start in range(0, len(flat), 1024):  # in the processor's cache
        bits = np.ascontiguousarray(flat[start : start + 1024]).view(np.uint32).astype(np.uint64)
        bits *= np.uint64(0x9E3779B97F4A7C15)  # an odd number from the golden ratio: spreads the few high bits that float16 leaves
        bits ^= bits >> np.uint64(32)
        bits *= weights
        hashes[start : start + 1024] = bits.sum(1, dtype=np.uint64)
    return hashes


def _check_captions(report, features):
    """Look at every caption's text."""
    found = {name: [] for name in ("blank", "long", "unterminated", "lists", "tokens", "replaced")}
    words = 0
    texts, rows = features.texts, features.caption_rows
    hashes = np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        stripped = text.strip()
        count = len(stripped.split())
        words += count
        hashes[number] = hash(stripped.lower()) if stripped else number  # blank ones are told of already
        if not stripped:
            found["blank"].append(number)
        elif count > LONG_WORDS or len(stripped) > LONG_LETTERS:
            found["long"].append(number)
        if stripped and not stripped.endswith(TERMINATORS):
            found["unterminated"].append(number)
        if "[" in text and LIST_AS_TEXT.fullmatch(text):
            found["lists"].append(number)
        if ("<" in text or "[" in text) and CONTROL_TOKEN.search(text):
            found["tokens"].append(number)
        if "\ufffd" in text:
            found["replaced"].append(number)
    total = len(texts)

    def shown(numbers):
        return (f"{number}: {texts[number].strip()[:40]!r}" for number in numbers)

    report.facts["words_per_caption"] = round(words / total, 1)
    report.add(len(found["blank"]), total, "captions are empty", examples=(f"caption {number}" for number in found["blank"]))
    what = f"captions are longer than {LONG_WORDS} words or {LONG_LETTERS} letters"
    report.add(len(found["long"]), total, what, len(found["long"]) > MANY * total, shown(found["long"]))
    report.add(len(found["unterminated"]), total, 'captions have no final period (it counts with --stop_token "." only)', False,
               shown(found["unterminated"]))  # fmt: skip
    for name, what in (
        ("lists", 'captions are lists written as text, such as ["a", "b"]: parse again'),
        ("tokens", "captions hold a control token, which may end or pad them in training"),
        ("replaced", "captions hold U+FFFD, the mark of a text read in a wrong encoding"),
    ):
        report.add(len(found[name]), total, what, examples=shown(found[name]))
    _, first, which, times = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    elsewhere = np.flatnonzero((times[which] > 1) & (rows != rows[first[which]]))
    on_several = np.isin(which, np.unique(which[elsewhere]))
    report.facts["duplicate_caption_share"] = round(float(on_several.mean()), 4)
    commonest = int(first[times == times.max()].min())
    example = [f"{times.max():,} times {texts[commonest].strip()[:40]!r}"]
    report.add(int(on_several.sum()), total, "captions stand at several images", False, example)


def _check_leaks(several):
    """Look for the same images in two files. Returns Report."""
    report = Report("all files together")
    report.facts["images"] = sum(len(keys.features.clip_embedding) for keys in several)
    for a, b in itertools.combinations(several, 2):
        names = f"{a.report.name} and {b.report.name}"
        _, in_a, in_b = np.intersect1d(a.ids, b.ids, return_indices=True)
        comparable = a.features.clip_embedding.shape[1:] == b.features.clip_embedding.shape[1:]
        comparable = comparable and a.features.meta.get("encoder") == b.features.meta.get("encoder")
        same = np.ones(len(in_a), bool)
        if comparable and len(in_a):
            same = np.concatenate([_similar(a, b, in_a[at : at + 4096], in_b[at : at + 4096]) for at in range(0, len(in_a), 4096)])
        smaller = min(len(a.rows), len(b.rows))
        report.add(int(same.sum()), smaller, f"images are in both {names}, by image_id", examples=a.named(in_a[same]))
        report.add(int((~same).sum()), smaller, f"image_ids of {names} are the same but the pictures are not", False, a.named(in_a[~same]))
        if comparable:
            good_a, good_b = (np.flatnonzero(keys.good[keys.rows]) for keys in (a, b))
            hashes = (keys.embeddings[keys.rows[good]] for keys, good in ((a, good_a), (b, good_b)))
            _, in_both, _ = np.intersect1d(*hashes, return_indices=True)
            found = np.setdiff1d(good_a[in_both], in_a[same])
            report.add(len(found), smaller, f"images are in both {names} under two image_ids, by embedding", examples=a.named(found))
    return report


def _similar(a, b, in_a, in_b):
    """Whether the embeddings of these images, paired, are of one picture: bool."""
    pairs = ((keys.features.clip_embedding, keys.rows[places]) for keys, places in ((a, in_a), (b, in_b)))
    one, other = (embedding[rows].float().reshape(len(rows), -1) for embedding, rows in pairs)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp(min=1e-12)
    return (cosine > SAME_PICTURE).numpy()


def add_options(parser):
    """Add the options of a check."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="feature files or directories")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    parser.add_argument(
        "--sample", type=int, default=2000, metavar="N", help="images to compare with their captions; 0 for none (default 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of --sample (default 0)")
    parser.add_argument("--clip_model_type", metavar="NAME", help="encoder of files that do not name theirs")


def run(options, towers):
    """Check what the command line names and print the findings. Returns the exit code: 0 clean, 1 with problems."""
    import json

    if options.sample < 0:
        raise UserError(f"--sample is {options.sample}; expected 0 (no comparison) or more.")
    reports = check_files(options.files, towers, options.sample, options.seed, options.clip_model_type)
    problems = sum(len(report.problems) for report in reports)
    if options.json:
        found = {"problems": problems, "files": [report.as_dict() for report in reports]}
        print(json.dumps(found, indent=2, default=str))
        return 1 if problems else 0
    for report in reports:
        print(report.name)
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.facts.items() if not isinstance(value, dict))
        for label, lines in (("", [facts] if facts else []), ("PROBLEM: ", report.problems), ("note: ", report.notes)):
            for line in lines:
                print(f"  {label}{line}")
    print(f"{problems} problem(s)" if problems else "no problem found")
    return 1 if problems else 0
