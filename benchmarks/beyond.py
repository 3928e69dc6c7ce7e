"""Train the demo's captioner on texts alone, with retrieved captions, and briefly, and judge its captions of held-out pictures.

    make demo                                        first: the world, its tiny models and its features
    python -m benchmarks.beyond texts                pictures with captions, against captions alone
    python -m benchmarks.beyond retrieval            a colour that no training caption names, and the datastore does
    python -m benchmarks.beyond choice               one caption of several, chosen in different ways

texts: share_true (the share of true captions on held-out pictures) of a captioner trained on pictures, and of captioners trained on the
same captions alone, without noise and with it; these also with the difference of means subtracted, and with the memory of all training
texts.

retrieval: the share of held-out pictures with a purple object whose caption says "purple". No training caption has the word, nor has the
datastore of the training; then come datastores that name the colour. Takes SmolLM2-135M (downloads 140 MB, once).

choice: share_true and CIDEr after 250 steps of training.

Each with several seeds; the result is a table and a line of JSON.
"""

import itertools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.demo_runs import options_of
from common import Parser, UserError, one_line_errors
from demo import run as demo
from demo import scenes as world
from demo import tiny_models

COLOUR = "purple"
NEW_NAME = "violet"  # what another datastore calls it
LEARNED = 80  # pictures that the retrieving captioner is trained on
SHOWN = 3  # captions printed of each kind
JUDGED = 30  # held-out pictures that it captions, of those with COLOUR and of the others
PROMPT, RETRIEVED = "Similar images show {retrieved} This image shows ", 3
CHOICES = {
    "one sample": "--decoding sample",
    "greedy": "--decoding greedy",
    "beam search, 5 beams": "--beam_size 5",
    "10 samples, clip": "--decoding sample --beam_size 10 --rerank clip",
    **{f"10 samples, clip+score, W {weight}": f"--decoding sample --beam_size 10 --rerank clip+score --rerank_weight {weight}"
       for weight in ("0.5", "1", "2")},
    "10 samples, consensus": "--decoding sample --beam_size 10 --rerank consensus",
}  # fmt: skip
TOGETHER = 100  # pictures decoded together
OUTPUTS = ("--save_every", "100", "--prefix", "demo", "--tracker", "none")


def train(folder, out, data, options, *more):
    """Train into `out` on a feature file by train.py. Returns the checkpoint."""
    words = ["train.py", "--data", str(data), "--out_dir", str(out), "--gpt2_type", str(tiny_models.gpt2_path(folder)), *OUTPUTS]
    demo.run_script([*words, *options.split(), *more])
    return next(Path(out).glob("demo-*.pt"))


def caption(model, features, **settings):
    """Caption each image of Features, by beam search unless the settings of generate say otherwise. Returns dict of image_id to caption."""
    from features.datastore import ids_by_row
    from models.decoding import generate

    ids, captions = ids_by_row(features), []
    for start in range(0, len(ids), TOGETHER):
        rows = slice(start, start + TOGETHER)
        captions += generate(model, features.clip_embedding[rows].float(), image_ids=ids[rows], entry_length=30, **settings)
    return {int(image_id): found[0][0] for image_id, found in zip(ids, captions)}


def load(checkpoint):
    """Load a checkpoint on the CPU, with the faster operators that predict.py has."""
    from models.checkpoints import load_checkpoint
    from models.operators import accelerate_model

    return accelerate_model(load_checkpoint(checkpoint))


def compare_texts(folder, out, seed, options):
    """Train on pictures and on texts with one seed. Returns dict of row to share_true."""
    from features.store import load_features
    from training.texts import measure_offset

    heldout, truth, texts = load_features(folder / "heldout.pkl"), world.read_scenes(folder, "heldout"), out / "texts.pkl"
    if not texts.is_file():
        words = ["parse_text.py", world.annotations_path(folder, "train"), "--clip_model_type", tiny_models.clip_path(folder)]
        demo.run_script([str(word) for word in (*words, "--out", texts)])
    memory, offset = load_features(texts), measure_offset(folder / "train.pkl", load_features(texts))

    # A memory holds no text on a pair of objects that training never showed: pictures of known pairs tell what it does otherwise.
    known, known_truth = first_images(folder, len(truth))

    def judge(model):
        return share_true(model, heldout, truth)

    seeded = f"{options} --seed {seed}"
    found = {"length of the difference of means": sum(one**2 for one in offset) ** 0.5}
    found |= {"pictures": judge(load(train(folder, out / f"pictures {seed}", folder / "train.pkl", seeded)))}
    for noise in ("0", "0.016"):
        name = f"texts, noise {noise}"
        model = load(train(folder, out / f"{name} {seed}", texts, seeded, "--noise_variance", noise))
        found[name] = judge(model)
        model.config.text_training["modality_offset"] = offset
        found[f"{name}, offset"] = judge(model)
        model.config.text_training["modality_offset"], model.memory = None, memory.clip_embedding
        found[f"{name}, memory"] = judge(model)
        found[f"{name}, memory, known pairs"] = share_true(model, known, known_truth)
    return found


def share_true(model, features, truth):
    """Caption Features; truth: dict of image_id to Scene. Returns the share of true captions."""
    predicted = caption(model, features)
    return world.share_true([predicted[image_id] for image_id in truth], list(truth.values()))


def first_images(folder, count):
    """Read the first training pictures: Features of `count` images, and dict of image_id to Scene."""
    from features.store import load_features

    truth = dict(itertools.islice(world.read_scenes(folder, "train").items(), count))
    return take_images(load_features(folder / "train.pkl"), truth), truth


def take_images(features, ids, rename=str):
    """Return Features of the images with these ids only; `rename` maps each caption to the one to keep."""
    from features.store import Features

    kept = [one for one in features.captions if int(one["image_id"]) in ids]
    rows = {row: place for place, row in enumerate(dict.fromkeys(one["clip_embedding"] for one in kept))}
    kept = [{**one, "caption": rename(one["caption"]), "clip_embedding": rows[one["clip_embedding"]]} for one in kept]
    return Features(features.clip_embedding[list(rows)], kept, features.meta)


def shows_colour(scene):
    """Whether an object of the scene has COLOUR."""
    return COLOUR in (scene.first.colour, scene.second.colour)


def write_sets(folder, out, seed):
    """Write feature files for retrieval without COLOUR in training: half of the pairs of objects to learn from, the others to retrieve.

    Returns:
        dict of name to path. learn: LEARNED pictures without COLOUR. without: pictures of the other pairs without COLOUR; with: with COLOUR
        too; renamed: the same, and the captions say NEW_NAME instead.
    """
    from features.store import load_features, save_features

    everything, scenes = load_features(folder / "train.pkl"), world.read_scenes(folder, "train")
    pairs = {image_id: frozenset((scene.first[1:], scene.second[1:])) for image_id, scene in scenes.items()}
    rng = random.Random(f"halves {seed}")
    distinct = sorted(set(pairs.values()), key=sorted)
    half = set(rng.sample(distinct, len(distinct) // 2))
    plain = [image_id for image_id, scene in scenes.items() if not shows_colour(scene)]
    learn = [image_id for image_id in plain if pairs[image_id] in half]
    ids = {"learn": rng.sample(learn, min(LEARNED, len(learn)))}
    ids |= {"without": [image_id for image_id in plain if pairs[image_id] not in half]}
    ids |= dict.fromkeys(("with", "renamed"), [image_id for image_id in scenes if pairs[image_id] not in half])
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.pkl" for name in ids}
    for name, path in files.items():
        named = NEW_NAME if name == "renamed" else COLOUR
        kept = take_images(everything, set(ids[name]), lambda text, named=named: text.replace(COLOUR, named))
        save_features(path, kept.clip_embedding, kept.captions, kept.meta)
    return files


def compare_datastores(folder, out, seed, options):
    """Train with retrieval and without COLOUR. Returns dict of row to the share of prompts and captions with the word, and share_true."""
    from demo.real import lay_out_parts
    from features.datastore import Datastore
    from features.store import load_features

    lay_out_parts(Path("data/weights"))
    files = write_sets(folder, out / f"sets {seed}", seed)
    more = ("--datastore", str(files["without"]), "--prompt", PROMPT, "--retrieved_captions", str(RETRIEVED))
    model = load(train(folder, out / f"retrieval {seed}", files["learn"], f"{options} --seed {seed}", *more))
    heldout, scenes, found = load_features(folder / "heldout.pkl"), world.read_scenes(folder, "heldout"), {}
    for name, word, wanted in (("with", COLOUR, True), ("without", COLOUR, True), ("renamed", NEW_NAME, True), ("with", COLOUR, False)):
        model.datastore = Datastore(load_features(files[name]), name, RETRIEVED)
        truth = dict([one for one in scenes.items() if shows_colour(one[1]) is wanted][:JUDGED])
        images = take_images(heldout, truth)
        predicted, prompts = caption(model, images, decoding="greedy"), model.datastore.retrieve(images.clip_embedding)
        row = f"{name}, pictures {'with' if wanted else 'without'} {COLOUR}"
        found[f"{row}: {word} in the prompt"] = sum(word in prompt for prompt in prompts) / len(truth)
        found[f"{row}: {word} in the caption"] = sum(word in text for text in predicted.values()) / len(truth)
        renamed = [predicted[image_id].replace(word, COLOUR) for image_id in truth]
        found[f"{row}: true"] = world.share_true(renamed, list(truth.values()))
        print(*(f"{text} | {scenes[image_id][:3]}" for image_id, text in itertools.islice(predicted.items(), SHOWN)), sep="\n", flush=True)
    return found


def compare_choices(folder, out, seed, options):
    """Train briefly and choose among captions in several ways. Returns dict of row to share_true, and to CIDEr with its 95 % interval."""
    trained = out / f"choice {seed}"
    checkpoint = train(folder, trained, folder / "train.pkl", f"{options} --seed {seed}")
    truth, found = world.read_scenes(folder, "heldout"), {}
    for name, more in CHOICES.items():
        scores = trained / "scores.json"
        words = ["evaluate.py", "--data", folder / "heldout.pkl", "--checkpoint", checkpoint, "--train_data", folder / "train.pkl"]
        words += ["--metrics", "cider", "--entry_length", "30", "--seed", seed, *more.split(), "--out", scores]
        demo.run_script([str(word) for word in words])
        rows = json.loads(scores.with_suffix(".predictions.json").read_text(encoding="utf-8"))
        predicted = {int(row["image_id"]): row["caption"] for row in rows}
        content = json.loads(scores.read_text(encoding="utf-8"))
        found[name] = world.share_true([predicted[image_id] for image_id in truth], list(truth.values()))
        found |= {f"{name}, CIDEr": content["scores"]["CIDEr"]}
        found |= {f"{name}, CIDEr {end}": value for end, value in zip(("from", "to"), content["intervals"]["CIDEr"])}
    return found


COMPARISONS = {  # function and its options for train.py
    "texts": (compare_texts, options_of("--epochs 1", demo.TRAIN_OPTIONS)),
    "retrieval": (compare_datastores, "--gpt2_type smollm2-135m --tune lora --lora_dropout 0 --lr 1e-3 --mapping_type linear "
                  "--mapper_lr 2e-3 --prefix_length 4 --bs 20 --epochs 1 --warmup_steps 3"),
    "choice": (compare_choices, options_of("--epochs 1", demo.TRAIN_OPTIONS) + " --max_steps 250"),
}  # fmt: skip


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.beyond", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="folder that make demo wrote (default data/demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training (default 0 1 2)")
    parser.add_argument("--train_options", help="options for train.py (default: those of the comparison)")
    options = parser.parse_args(argv)
    compare, train_options = COMPARISONS[options.comparison]
    train_options = options.train_options or train_options
    if not (options.folder / "heldout.pkl").is_file():
        raise UserError(f"{options.folder} holds no demo; expected train.pkl, heldout.pkl and weights in it. Run make demo first.")
    runs = []
    with tempfile.TemporaryDirectory(prefix="beyond.") as out:
        for seed in options.seeds:
            runs.append(compare(options.folder, Path(out), seed, train_options))
            print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    width = max(map(len, runs[0]))
    print(f"\n{'':{width}} mean  spread (standard deviation over {len(runs)} seeds)")
    for row in runs[0]:
        values = [run[row] for run in runs]
        print(f"{row:{width}} {statistics.mean(values):.3f}  {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
    print(json.dumps({"train_options": train_options, "seeds": options.seeds, "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
