"""Score captions: a checkpoint on a feature file, or predictions against references.

  python evaluate.py --data val.pkl --checkpoint ./coco_train/coco_prefix-009.pt --out scores.json
  python evaluate.py --predictions results.json --references captions_val2017.json --metrics bleu meteor rouge cider
  python evaluate.py --predictions ours.json theirs.json --references captions_val2017.json       # side by side, with a paired test
  python evaluate.py --predictions results.json --data val.pkl --metrics clipscore                # with the encoder's own text tower

References: COCO or nocaps annotations (.json), Clotho's captions (.csv), or a feature file. Predictions: COCO results (.json), or what
predict.py writes. --out scores.json writes the scores, how they were made, and beside it scores.predictions.json, the captions with
their own scores. nocaps is scored by domain too. METEOR and SPICE need Java; CIDEr is pycocoevalcap's, which is CIDEr-D.
"""

import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from evaluation.metrics import CHOICES, usable_metrics
from evaluation.origin import describe_origin
from evaluation.references import pair_up, read_predictions
from evaluation.scores import print_comparison, print_scores, upload_rows, write_json, write_scores
from evaluation.scoring import HISTOGRAMS, best_of_captions, check_same_images, prepare_truth, score_system
from evaluation.statistics import compare
from evaluation.tokens import tokenize
from evaluation.truth import decode_pictures, embed_for_clipscore, load_pictures, load_references, load_tower
from prediction.captions import add_decoding_options

DEFAULT = ("bleu", "meteor", "rouge", "cider")


def build_parser():
    """The parser of evaluate.py."""
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--data", help="feature file: to caption with --checkpoint; its captions are the references, unless --references")
    parser.add_argument("-C", "--checkpoint", help="checkpoint that captions --data")
    parser.add_argument("--gpt2_type", help="language model to build on, where not the checkpoint's")
    parser.add_argument("--predictions", nargs="+", default=[], metavar="FILE", help="captions to score; two files are compared")
    parser.add_argument("--references", help="what is true: COCO or nocaps .json, Clotho .csv, or a feature file")
    group = parser.add_argument_group("scores")
    group.add_argument("--metrics", nargs="+", choices=CHOICES, default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    group.add_argument("--clip_model_type", help="encoder of clipscore, where not the feature file's")
    group.add_argument("--train_data", help="feature file of the training set: counts captions that are not in it")
    group.add_argument("--bootstrap", type=int, default=1000, help="draws of intervals and paired test (default 1000; 0: none)")
    add_decoding_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="file for the scores (.json); the captions go beside it")
    group.add_argument("--upload", help="file for nocaps' server: image_id and caption of each image (.json)")
    group.add_argument("--histogram", choices=HISTOGRAMS, help="picture of this score of each image's best caption, beside --out (.png)")
    group.add_argument("--plot", help="picture of some images with caption and reference; needs --images (.png)")
    group.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="where the pictures of --plot are")
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default auto: the best there is)")
    group.add_argument("--batch_size", type=int, default=32, help="images a batch (default 32)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="of the language model (default no: fp32)")
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
    for name in ("out", "upload"):
        if getattr(options, name) and not getattr(options, name).endswith(".json"):
            parser.error(f"--{name} is {getattr(options, name)}; expected a name ending in .json")
    if options.histogram and not options.out:
        parser.error("--histogram goes beside --out; give --out scores.json")
    if bool(options.plot) != bool(options.images):
        parser.error("--plot and --images go together: the picture to write, and the folder with the pictures in it")
    if options.upload and len(options.predictions) > 1:
        parser.error("--upload takes one set of captions; give one file of --predictions")
    if options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; expected at least 1")
    if options.bootstrap < 0:
        parser.error(f"--bootstrap is {options.bootstrap}; expected 0 or more draws")


@one_line_errors
def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    metrics = usable_metrics(options.metrics, lambda line: print(line, file=sys.stderr))

    # What is true, and of which images; the embeddings, where there are any.
    pictures = load_pictures(options.data) if options.data else None
    if options.references:
        references, embedded = load_references(options.references)
        pictures = pictures or embedded
    else:
        references = pictures.references
    tower = None
    if "clipscore" in metrics:
        if pictures is None:
            raise UserError("clipscore compares captions with embeddings of their images. Give the feature file of these images as --data.")
        tower, encoder = load_tower(pictures, options.clip_model_type, options.device)

    # The captions: decoded here, or read.
    if options.checkpoint:
        systems, sources = [decode_pictures(pictures, options)], [options.checkpoint]
    else:
        systems, sources = [read_predictions(path) for path in options.predictions], options.predictions
    for predictions, source in zip(systems, sources):
        keys = pair_up(predictions, references, source)
    check_same_images(systems, sources)
    keys = [key for key in references.captions if key in systems[0]]  # one order, whatever the files'
    upload = upload_rows(systems[0], keys) if options.upload else None

    # Scores.
    truth = prepare_truth(keys, references)
    train_words = None
    if options.train_data:
        training = load_pictures(options.train_data).references.captions.values()
        train_words = tokenize(list(dict.fromkeys(text for texts in training for text in texts)))
    more_metrics = None
    if tower is not None:
        from evaluation.clipscore import clip_scores

        def more_metrics(texts):
            return clip_scores(*embed_for_clipscore(tower, encoder, pictures, keys, texts, truth.texts))

    scored = [score_system(predictions, truth, metrics, options, more_metrics, train_words) for predictions in systems]
    comparison = None
    if len(scored) == 2 and options.bootstrap:
        comparison = compare(scored[0].metrics, scored[1].metrics, options.bootstrap, options.seed)

    # What is said and written.
    about = {
        "predictions": sources[0],
        "references": options.references or options.data,
        "split": references.split,
        **truth.describe(),
        "images_with_references": len(references.captions),
    }
    print_scores(about, scored, sources)
    if comparison:
        print_comparison(comparison)
    best = [best_of_captions(predictions, truth, options.histogram) for predictions in systems] if options.histogram else None
    if options.out:
        arguments = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        files = [options.data, options.references, options.checkpoint, *options.predictions, options.train_data]
        files = [path for path in files if path and Path(path).exists()]
        made_by = describe_origin("evaluate.py", arguments, options.seed, files)
        write_scores(options.out, about, scored, systems, keys, sources, comparison, made_by,
                     best and (options.histogram, best), references)  # fmt: skip
        print(f"wrote {options.out}")
    if options.histogram:
        from reports.plots import plot_histogram

        several = max(len(prediction.captions) for prediction in systems[0].values())
        title = f"{Path(sources[0]).name}, best of {several}" if several > 1 else Path(sources[0]).name
        path = Path(options.out).with_suffix(f".{options.histogram}.png")
        plot_histogram([100 * score for score in best[0]], title, f"{HISTOGRAMS[options.histogram]} of a caption (× 100)", path)
        print(f"wrote {path}")
    if options.plot:
        from reports.pictures import plot_scored

        plot_scored(keys, systems[0], references, options.images, options.plot)
        print(f"wrote {options.plot}")
    if options.upload:
        write_json(options.upload, upload)
        print(f"wrote {options.upload}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
