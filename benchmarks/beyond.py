"""Train the demo's captioner on texts alone, and with retrieved captions, and judge its captions of held-out pictures.

    make demo                                        first: the world, its tiny models and its features
    python -m benchmarks.beyond texts                pictures with captions, against captions alone
    python -m benchmarks.beyond retrieval            a colour that no training caption names, and the datastore does

texts: share_true (the share of true captions on held-out pictures) of a captioner trained on pictures, and of captioners trained on the
same captions alone, without noise and with it; these also with the difference of means subtracted, and with the memory of all training
texts. retrieval: the share of held-out pictures with a purple object whose caption says "purple". No training caption has the word; once
the datastore is that of the training, once it is that of all pictures. Each with several seeds; the result is a table and a line of JSON.
"""

import json
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
# Positions beyond those that the tiny GPT-2 has seen are no use: three captions fit.
TRAIN_OPTIONS = options_of("--epochs 1", demo.TRAIN_OPTIONS)
PROMPT, RETRIEVED = "{retrieved} ", 3
TOGETHER = 100  # pictures decoded together
OUTPUTS = ("--save_every", "100", "--prefix", "demo", "--tracker", "none")


def train(folder, out, data, options, *more):
    """Train into `out` on a feature file by train.py. Returns the checkpoint."""
    words = ["train.py", "--data", str(data), "--out_dir", str(out), "--gpt2_type", str(tiny_models.gpt2_path(folder)), *OUTPUTS]
    demo.run_script([*words, *options.split(), *more])
    return next(Path(out).glob("demo-*.pt"))


def caption(model, features):
    """Caption each image of Features by beam search. Returns dict of image_id to caption."""
    from features.datastore import ids_by_row
    from models.decoding import generate

    ids, captions = ids_by_row(features), []
    for start in range(0, len(ids), TOGETHER):
        rows = slice(start, start + TOGETHER)
        captions += generate(model, features.clip_embedding[rows].float(), image_ids=ids[rows], entry_length=30)
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
    from features.store import Features, load_features

    everything, scenes = load_features(folder / "train.pkl"), world.read_scenes(folder, "train")
    kept = [one for one in everything.captions if one["clip_embedding"] < count]
    ids = dict.fromkeys(int(one["image_id"]) for one in kept)
    return Features(everything.clip_embedding[:count], kept, everything.meta), {image_id: scenes[image_id] for image_id in ids}


def compare_datastores(folder, out, seed, options):
    """Train with retrieval and without COLOUR. Returns dict of row to the share of COLOUR's pictures whose caption names it."""
    from features.datastore import Datastore
    from features.store import load_features, save_features

    everything, heldout = load_features(folder / "train.pkl"), load_features(folder / "heldout.pkl")
    truth = world.read_scenes(folder, "heldout")
    kept = [one for one in everything.captions if COLOUR not in one["caption"]]
    rows = {row: place for place, row in enumerate(dict.fromkeys(one["clip_embedding"] for one in kept))}
    kept = [{**one, "clip_embedding": rows[one["clip_embedding"]]} for one in kept]
    without = out / f"without {COLOUR}.pkl"
    save_features(without, everything.clip_embedding[list(rows)], kept, everything.meta)
    of_colour = [image_id for image_id, scene in truth.items() if COLOUR in (scene.first.colour, scene.second.colour)]
    more = ("--prompt", PROMPT, "--retrieved_captions", str(RETRIEVED))
    model, found = load(train(folder, out / f"retrieval {seed}", without, f"{options} --seed {seed}", *more)), {}
    for row, store in {f"datastore without {COLOUR}": load_features(without), f"datastore with {COLOUR}": everything}.items():
        model.datastore = Datastore(store, row, RETRIEVED)
        predicted = caption(model, heldout)
        found[row] = sum(COLOUR in predicted[image_id] for image_id in of_colour) / len(of_colour)
        found[f"{row}, share_true"] = world.share_true([predicted[image_id] for image_id in truth], list(truth.values()))
    return found


COMPARISONS = {"texts": compare_texts, "retrieval": compare_datastores}


@one_line_errors
def main(argv=None):
    parser = Parser(prog="benchmarks.beyond", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--folder", type=Path, default=Path("data/demo"), help="folder that make demo wrote (default data/demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training (default 0 1 2)")
    parser.add_argument("--train_options", default=TRAIN_OPTIONS, help="options for train.py (default %(default)s)")
    options = parser.parse_args(argv)
    if not (options.folder / "heldout.pkl").is_file():
        raise UserError(f"{options.folder} holds no demo; expected train.pkl, heldout.pkl and weights in it. Run make demo first.")
    runs = []
    with tempfile.TemporaryDirectory(prefix="beyond.") as out:
        for seed in options.seeds:
            runs.append(COMPARISONS[options.comparison](options.folder, Path(out), seed, options.train_options))
            print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    print(f"\n{'':36} mean  spread (standard deviation over {len(runs)} seeds)")
    for row in runs[0]:
        values = [run[row] for run in runs]
        print(f"{row:36} {statistics.mean(values):.3f}  {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
    print(json.dumps({"train_options": options.train_options, "seeds": options.seeds, "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
