"""Score captions: a checkpoint on a feature file, or predictions against references.

  python evaluate.py --data val.pkl --checkpoint ./coco_train/coco_prefix-009.pt --out scores.json
  python evaluate.py --predictions results.json --references captions_val2017.json --metrics bleu meteor rouge cider
  python evaluate.py --predictions ours.json theirs.json --references captions_val2017.json       # side by side, with a paired test
  python evaluate.py --predictions results.json --data val.pkl --metrics clipscore                # with the encoder's own text tower
  python evaluate.py --data val.pkl --checkpoint FILE --train_data train.pkl --baseline nearest   # beside captions of similar images

Predictions are what predict.py --out writes, or COCO's result format. References are annotations of COCO, nocaps, VizWiz, Flickr or Clotho,
Karpathy's splits, lists of {image, caption}, or a feature file. Images are matched by id, else by file name. METEOR and SPICE need Java.
CIDEr is pycocoevalcap's, which is CIDEr-D. nocaps is also scored by domain.
"""

import sys
from pathlib import Path

from common import Parser, one_line_errors, resolve_output
from evaluation.baseline import NEIGHBOURS, open_training_images, score_baselines, take_captions
from evaluation.metrics import HISTOGRAMS, METRICS, usable_metrics
from evaluation.references import pair_up, read_predictions
from evaluation.scores import describe_origin, print_comparison, print_scores, upload_rows, write_json, write_scores
from evaluation.scoring import check_same_images, describe_oddities, prepare_truth, score_system
from evaluation.statistics import compare
from evaluation.tokens import tokenize
from evaluation.truth import decode_pictures, embed_for_clipscore, find_rows, load_tower, load_truth
from features.embeddings import select_rows
from features.processes import current, together
from features.store import load_features
from prediction.captions import add_decoding_options, add_running_options
from prediction.datastores import add_store_options, attach_stores
from prediction.inputs import refuse_addresses
from prediction.loading import load_captioner
from prediction.reranking import add_rerank_option, check_rerank, learn_from_training_set

MOST_DRAWS = 1_000_000


def build_parser():
    """Build the parser of evaluate.py."""
    parser = Parser(prog="evaluate.py", description=__doc__)
    group = parser.add_argument_group("what to score")
    group.add_argument("--data", metavar="FILE",
                       help="feature file to caption with --checkpoint; without --references its captions are the references")  # fmt: skip
    group.add_argument("-C", "--checkpoint", metavar="FILE", help="checkpoint that captions --data")
    group.add_argument("--predictions", nargs="+", default=[], metavar="FILE", help="file of captions to score; two files are compared")
    group.add_argument("--references", metavar="FILE",
                       help="ground truth: a feature file, or annotations (.json, .csv) of any data set that is parsed here")  # fmt: skip
    group = parser.add_argument_group("scores")
    default = [name for name, entry in METRICS.items() if entry.default]
    about = "; ".join(f"{name}: {entry.help}{', needs Java' if entry.needs_java else ''}" for name, entry in METRICS.items())
    group.add_argument("--metrics", nargs="+", metavar="METRIC", choices=METRICS, default=default,
                       help=f"{about} (default {' '.join(default)})")  # fmt: skip
    group.add_argument("--bootstrap", type=int, default=1000, metavar="N",
                       help="draws for the 95 %% intervals and the paired test; 0 leaves them out (default 1000)")  # fmt: skip
    group.add_argument("--train_data", metavar="FILE",
                       help="feature file of the training set: count the captions that are not in it; --rerank consensus weighs words "
                            "by their rarity there, and --rerank train chooses by it")  # fmt: skip
    group.add_argument("--baseline", choices=("nearest",),
                       help="also score captions copied from --train_data: the nearest image's, and the one that agrees most with "
                            f"the others among those of the {NEIGHBOURS} nearest (mean CIDEr); needs --data (default: none)")  # fmt: skip
    group.add_argument("--clip_model_type", metavar="NAME",
                       help="encoder of clipscore and --rerank clip (default: the feature file's)")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="FILE", help="write the scores (.json), and the captions beside it as {name}.predictions.json")
    group.add_argument("--histogram", choices=HISTOGRAMS, help="beside --out, draw this score of each image's best caption (.png)")
    group.add_argument("--plot", metavar="FILE", help="draw some images with caption and reference; needs --images (.png)")
    group.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="folders of the pictures for --plot")
    group.add_argument("--upload", metavar="FILE", help="write image_id and caption of each image for nocaps' server (.json)")
    add_decoding_options(parser)
    add_rerank_option(parser)
    add_store_options(parser)
    add_running_options(parser)
    return parser


def check_options(parser, options):
    """Cross-check the options; a mistake ends in one line and exit code 2."""
    if bool(options.checkpoint) == bool(options.predictions):
        parser.error("give --checkpoint with --data, or --predictions with --references" + (", not both" if options.checkpoint else ""))
    if options.checkpoint and not options.data:
        parser.error("--checkpoint needs --data, a feature file to caption, such as parse_coco.py makes")
    if options.predictions and not (options.references or options.data):
        parser.error("--predictions need --references, such as captions_val2017.json, or --data with a feature file")
    if len(options.predictions) > 2:
        parser.error(f"{len(options.predictions)} files of --predictions; expected one, or two to compare")
    for name, path in (("out", options.out), ("upload", options.upload)):
        if path and not path.endswith(".json"):
            parser.error(f"--{name} is {path}; expected a name ending in .json")
    if options.histogram and not options.out:
        parser.error("--histogram is drawn beside --out; give --out scores.json")
    if bool(options.plot) != bool(options.images):
        parser.error("--plot and --images go together: the picture to write, and the folder with the pictures in it")
    if options.upload and len(options.predictions) > 1:
        parser.error("--upload takes one set of captions; give one file of --predictions")
    if options.baseline and not (options.train_data and options.data):
        parser.error("--baseline needs the embeddings of both sets: --train_data with the training set, --data with the images to score")
    if options.baseline and len(options.predictions) > 1:
        parser.error("--baseline stands beside one set of captions; give one file of --predictions")
    if (options.datastore or options.memory) and options.predictions:
        parser.error("--datastore and --memory are read while captions are decoded; give --checkpoint and --data instead of --predictions")
    if options.rerank and options.predictions:
        parser.error("--rerank chooses while captions are decoded; give --checkpoint and --data instead of --predictions")
    check_rerank(parser, options)
    if options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; expected at least 1")
    if not 0 <= options.bootstrap <= MOST_DRAWS:
        parser.error(f"--bootstrap is {options.bootstrap}; expected 0 to {MOST_DRAWS:,} draws")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; expected 0 or more")


def caption_data(references, pictures, train, options):
    """Caption the feature file with the checkpoint. train: Features of the training set or None. Returns dict of key to Prediction."""
    from features.content import check_compatible, checkpoint_kind
    from models.encoders import pick_device

    if references is not pictures.references:
        pair_up(pictures.ids, references, options.data)  # before minutes of decoding
    model = load_captioner(options.checkpoint, options.gpt2_type, pick_device(options.device), options.mixed_precision)
    check_compatible(pictures.features.kind, checkpoint_kind(model.config, model.origin.encoder), options.data, options.checkpoint)
    attach_stores([model], [options.checkpoint], options.datastore, options.memory)
    return decode_pictures(model, pictures, options, learn_from_training_set(train, options, pictures.features.kind, options.data))


def get_systems(references, pictures, train, options):
    """Decode or read the captions to be scored. Returns list of dicts of the references' keys to Prediction, and their names."""
    sources = options.predictions or [options.checkpoint]
    systems = [read_predictions(path) for path in options.predictions] or [caption_data(references, pictures, train, options)]
    systems = [pair_up(predictions, references, source) for predictions, source in zip(systems, sources)]
    check_same_images(systems, sources)
    return systems, sources


def describe_run(options, argv):
    """Describe how the scores were made: command, seed, versions, digests of the files that were read."""
    files = [options.data, options.references, options.checkpoint, *options.predictions, options.train_data]
    files += [*options.datastore, *options.memory]
    files = [path for path in files if path and Path(path).exists()]
    return describe_origin("evaluate.py", [str(word) for word in argv], options.seed, files)


def draw_histogram(scored, options):
    """Draw the best score among each image's captions beside --out. Returns the picture's path."""
    from reports.plots import plot_histogram

    several = max(len(prediction.captions) for prediction in scored.predictions.values())
    name = Path(scored.source).name
    title = f"{name}, best of {several}" if several > 1 else name
    path = Path(options.out).with_suffix(f".{options.histogram}.png")
    plot_histogram([100 * score for score in scored.best], title, f"{HISTOGRAMS[options.histogram][1]} of a caption (x 100)", path)
    return path


def draw_examples(keys, predictions, references, options):
    """Draw some images with their caption and a reference."""
    from reports.pictures import plot_examples

    examples = [
        (predictions[key].image_id, references.file_names.get(key), predictions[key].captions[0], references.captions[key][0])
        for key in keys
    ]
    plot_examples(examples, options.images, options.plot)


@one_line_errors
@together
def main(argv=None):
    """Read the ground truth, get the captions, score them, write the files, print the scores."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    several = [*options.predictions, *options.images, *options.datastore, *options.memory]
    refuse_addresses(options.data, options.checkpoint, options.references, options.train_data, *several)
    for path in filter(None, (options.out, options.plot, options.upload)):
        resolve_output(path)  # a wrong place is reported before anything is decoded
    metrics = usable_metrics(options.metrics, say=lambda line: print(line, file=sys.stderr))

    references, pictures = load_truth(options.data, options.references)
    wants_tower = any(METRICS[name].needs_embeddings for name in metrics) and current().is_first
    tower = load_tower(pictures, options.clip_model_type, options.device) if wants_tower else None
    train = load_features(options.train_data) if options.train_data else None
    store = open_training_images(train, pictures, references, options.train_data, options.data) if options.baseline else None
    systems, sources = get_systems(references, pictures, train, options)
    if not current().is_first:
        return 0
    keys = [key for key in references.captions if key in systems[0]]  # one order, whatever the files'
    upload = upload_rows(systems[0], keys) if options.upload else None

    embeddings = select_rows(pictures.features.clip_embedding, find_rows(pictures, references, keys)) if wants_tower else None
    truth = prepare_truth(keys, references)

    def embed(candidates):
        return embed_for_clipscore(tower, embeddings, candidates, truth.texts)

    train_words = tokenize(list(dict.fromkeys(train.texts))) if train else None
    settings = {"histogram": options.histogram, "draws": options.bootstrap, "seed": options.seed}
    scored = [
        score_system(source, predictions, truth, metrics, embed, train_words, **settings) for source, predictions in zip(sources, systems)
    ]
    comparison = None
    if len(scored) == 2 and options.bootstrap:
        comparison = compare(scored[0].metrics, scored[1].metrics, options.bootstrap, options.seed)
    baselines = {}
    if store:
        taken = take_captions(store, pictures, references, systems[0], keys)
        baselines = score_baselines(taken, scored[0], truth, metrics, embed, train_words, **settings)

    about = {"predictions": sources[0], "references": options.references or options.data, "split": references.split_of(keys)}
    about |= {**truth.describe(), "images_with_references": len(references.captions)}
    notes = [line for one in [*scored, *(one.scored for one in baselines.values())] for line in describe_oddities(one)]
    notes += [*([store.describe(options.train_data)] if store else []), *(one.verdict for one in baselines.values() if one.verdict)]
    about |= {"notes": notes} if notes else {}
    written = [path for path in (options.out, options.plot, options.upload) if path]
    if options.out:
        made_by = describe_run(options, argv)
        write_scores(options.out, about, scored, keys, references, made_by, comparison, options.histogram, baselines)
    if options.histogram:
        written.insert(1, draw_histogram(scored[0], options))
    if options.plot:
        draw_examples(keys, systems[0], references, options)
    if options.upload:
        write_json(options.upload, upload)
    print_scores(about, [*scored, *(one.scored for one in baselines.values())])
    if comparison:
        print_comparison(comparison)
    for one in baselines.values():
        print_comparison(one.comparison, f"captioner - {one.scored.source}")
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
