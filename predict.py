"""Caption pictures, sounds or a feature file with a trained captioner.

  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photo.jpg
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photos/ --out captions.csv --plot captions.png
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt --data val.pkl --out results.json
  python predict.py --checkpoint first.pt --checkpoint second.pt photo.jpg        # two captioners side by side
  python predict.py --checkpoint ./clotho_train/coco_prefix-009.pt rain.wav       # a checkpoint trained on sounds
  python predict.py -I photo.jpg                                                  # CLIPxGPT's published weights

The checkpoint says which encoder, architecture, prefix length, normalization and stop token to use.
"""

import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors, resolve_output
from features.processes import current, together
from prediction.captions import SUFFIXES, add_decoding_options, add_running_options, caption_all, print_captions, write_captions
from prediction.clipxgpt import add_clipxgpt_options, find_checkpoints, print_generated, write_titled
from prediction.datastores import add_store_options
from prediction.inputs import audio_of, encode_files, expand_names, find_files, read_features, refuse_addresses
from prediction.loading import load_encoders, load_models
from prediction.reranking import add_rerank_option, caption_and_rerank, check_rerank, learn_from_training_set


def build_parser():
    """Build the parser of predict.py."""
    parser = Parser(prog="predict.py", description=__doc__)
    group = parser.add_argument_group("what to caption, and with what")
    group.add_argument("images", nargs="*", metavar="PICTURE", help="pictures or sounds, or folders or patterns of them")
    group.add_argument("-I", "--image", "--img-path", action="append", default=[], metavar="PICTURE",
                       help="one more picture or sound")  # fmt: skip
    group.add_argument("--data", metavar="FILE", help="caption this feature file instead of pictures")
    group.add_argument("-C", "--checkpoint", "--checkpoint-name", action="append", default=[], metavar="FILE",
                       help="checkpoint: a path, or a name in data/weights/ or weights/small|large/; repeat it to compare several "
                            "(default: CLIPxGPT's published weights)")  # fmt: skip
    group.add_argument("--clip_model_type", metavar="NAME", help="encoder to use instead of the checkpoint's")
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="FILE", help="write the captions: .csv or .jsonl with scores, or .json in COCO's result format")
    group.add_argument("--plot", metavar="FILE", help="draw the pictures with their captions (.png)")
    group.add_argument("--explain", metavar="FILE", help="draw what each word of the first caption attends to in the prefix (.png)")
    add_decoding_options(parser)
    group = add_rerank_option(parser)
    group.add_argument("--train_data", metavar="FILE",
                       help="feature file of the training set: --rerank consensus weighs words by their rarity there, and --rerank "
                            "train chooses by it")  # fmt: skip
    add_store_options(parser)
    group = add_running_options(parser)
    group.add_argument("--num_workers", type=int, metavar="N",
                       help="processes that read pictures (default: one per core for many pictures on a GPU, else 0)")  # fmt: skip
    add_clipxgpt_options(parser)
    return parser


def check_options(parser, options):
    """Cross-check the options; a mistake ends in one line and exit code 2."""
    if bool(options.images or options.image) == bool(options.data):
        parser.error("give pictures or folders, or --data with a feature file" + (", not both" if options.data else ""))
    if options.out and Path(options.out).suffix not in SUFFIXES:
        parser.error(f"--out is {options.out}; expected a name ending in .csv, .json or .jsonl")
    if options.out and options.out.endswith(".json") and len(options.checkpoint) > 1:
        parser.error("--out .json is COCO's result format, one caption per image: give one --checkpoint, or write .csv or .jsonl")
    if options.plot and options.data:
        parser.error("--plot needs pictures, and a feature file holds none. Give the pictures instead of --data")
    check_rerank(parser, options)
    if options.train_data and options.rerank not in ("consensus", "train"):
        parser.error("--train_data is for --rerank consensus and --rerank train; give one of them, or leave it out")
    if options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; expected at least 1")
    if options.num_workers is not None and options.num_workers < 0:
        parser.error(f"--num_workers is {options.num_workers}; expected 0 or more")


def say(line):
    """Print a line on stderr."""
    print(line, file=sys.stderr)


def encode_inputs(names, models, checkpoints, options, device):
    """Find the pictures or sounds and encode them with every model's encoder. Returns prediction.inputs.Inputs."""
    audio = audio_of(models, checkpoints)
    paths, folders = find_files(names, sounds=any(audio))
    encoders = load_encoders(models, checkpoints, audio, [options.clip_model_type] * len(models), device)
    return encode_files(paths, folders, encoders, any(audio), say, batch_size=options.batch_size, num_workers=options.num_workers)


def caption_inputs(inputs, models, checkpoints, options):
    """Caption the inputs with every model. Returns [checkpoint][image] -> list of (text, score)."""
    from features.content import checkpoint_kind
    from features.store import load_features

    captions = []
    train = load_features(options.train_data) if options.train_data else None
    for model, checkpoint, embedding in zip(models, checkpoints, inputs.embeddings):
        if options.rerank:
            encoder = options.clip_model_type or inputs.encoder or model.config.encoder
            learned = learn_from_training_set(train, options, checkpoint_kind(model.config, encoder), checkpoint)
            captions.append(caption_and_rerank(model, embedding, options, encoder, learned, image_ids=inputs.ids))
        else:
            captions.append(caption_all(model, embedding, options, image_ids=inputs.ids))
    return captions


def draw_explanation(model, embedding, name, text, path):
    """Draw what the words of a caption attend to. embedding: [1, D]."""
    from models.texts import to_text_space
    from reports.explain import explain_caption
    from reports.plots import plot_explanation

    if not text.strip():
        raise UserError(f"the caption of {name} is empty: there is nothing to explain.")
    found = explain_caption(model, to_text_space(model, embedding), text)
    plot_explanation(found["words"], found["attention"], found["nearest"], f"{name}: {text}", path)


def draw_captions(inputs, captions, path):
    """Draw the pictures, or the spectrograms of sounds, with the best caption of every checkpoint."""
    from features.audio import spectrogram_picture
    from models.encoders.images import read_image
    from reports.plots import plot_captions

    texts = [[of_checkpoint[image][0][0] for of_checkpoint in captions] for image in range(len(inputs.names))]
    plot_captions([spectrogram_picture(file) if inputs.are_sounds else read_image(file) for file in inputs.paths], texts, path)


@one_line_errors
@together
def main(argv=None):
    """Load the captioners, encode the pictures, caption them, write the files, print the captions."""
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    names = [*options.images, *options.image]
    refuse_addresses(options.data, options.train_data, *options.checkpoint, *options.datastore, *options.memory)
    expand_names(names)  # wrong names and places are reported before anything is loaded
    for path in filter(None, (options.out, options.explain, options.plot)):
        resolve_output(path)

    from models.encoders import pick_device

    checkpoints = find_checkpoints(options.checkpoint, options.size)
    device = pick_device(options.device)
    models = load_models(checkpoints, options, device, say)
    if options.data:
        inputs = read_features(options.data, models, checkpoints)
    else:
        inputs = encode_inputs(names, models, checkpoints, options, device)
    captions = caption_inputs(inputs, models, checkpoints, options)
    if not current().is_first:
        return 0
    columns = [Path(checkpoint).stem for checkpoint in checkpoints]
    columns = columns if len(set(columns)) == len(columns) else checkpoints

    # Files come before anything is printed: a terminal that cannot be written to must not cost them.
    if options.out:
        write_captions(options.out, inputs.ids, inputs.names, columns, captions)
    if options.explain:
        draw_explanation(models[0], inputs.embeddings[0][:1], inputs.names[0], captions[0][0][0][0], options.explain)
    if options.plot:
        draw_captions(inputs, captions, options.plot)
    as_clipxgpt = len(models) == 1 and models[0].config.decoding_style == "clipxgpt" and bool(inputs.paths)
    if as_clipxgpt:
        write_titled(models[0], inputs.paths, captions[0], options.res_path)
        print_generated(inputs.paths, captions[0])
    else:
        print_captions(inputs.names, columns, captions, options.num_captions)
    for path in (options.res_path if as_clipxgpt else None, options.out, options.explain, options.plot):
        if path:
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
