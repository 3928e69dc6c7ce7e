"""Caption pictures or sounds, folders of them, or a feature file, with a trained captioner.

  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photo.jpg
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photos/ --out captions.csv --plot captions.png
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt --data val.pkl --out results.json --batch_size 64
  python predict.py --checkpoint first.pt --checkpoint second.pt photo.jpg        # side by side
  python predict.py --checkpoint ./clotho_train/coco_prefix-009.pt rain.wav       # a checkpoint trained on sounds
  python predict.py -I photo.jpg                                                  # CLIPxGPT's published weights, size S

Encoder, architecture, lengths, normalisation and stop token come from the checkpoint. --out writes .csv, .jsonl (every caption with
its score) or .json (COCO's result format: the best caption of each image_id).
"""

import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors
from prediction.captions import add_decoding_options, caption_all, check_width
from prediction.clipxgpt import add_clipxgpt_options, find_checkpoints, show_generated
from prediction.inputs import audio_of, captioned_rows, check_names, encode_pictures, find_pictures, image_id_of
from prediction.outputs import print_captions, write_captions
from prediction.rerank import caption_and_rerank


def build_parser():
    """The parser of predict.py."""
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="PICTURE", help="pictures, or sounds, or folders of them")
    parser.add_argument("-I", "--image", "--img-path", action="append", default=[], help="a picture, as named without an option")
    parser.add_argument("--data", help="feature file to caption, in place of pictures")
    parser.add_argument(
        "-C", "--checkpoint", "--checkpoint-name", action="append", default=[],
        help="checkpoint: a path, or a name under data/weights/ or weights/small|large/; several give a column each",
    )  # fmt: skip
    parser.add_argument("--gpt2_type", help="language model to build on, where not the checkpoint's")
    parser.add_argument("--clip_model_type", help="image encoder, where not the checkpoint's")
    add_decoding_options(parser)
    group = parser.add_argument_group("choosing")
    group.add_argument("--rerank", choices=("clip",), help="take, of --beam_size captions, the one that CLIP finds nearest to the picture")
    add_clipxgpt_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="file for the captions: .csv, .json (COCO results) or .jsonl")
    group.add_argument("--explain", help="picture of what the words of the first caption attend to in the prefix")
    group.add_argument("--plot", help="picture of the images with their captions")
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default auto: the best there is)")
    group.add_argument("--batch_size", type=int, default=32, help="images a batch (default 32)")
    group.add_argument("--num_workers", type=int, metavar="N", help="processes that read pictures; 0: none (default: by cores on a GPU)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="of the language model (default no: fp32)")
    return parser


def check_options(parser, options):
    """Cross-check the options; a mistake ends in one line and exit code 2."""
    options.images = options.images + options.image
    if bool(options.images) == bool(options.data):
        parser.error("give pictures or folders, or --data with a feature file" + (", not both" if options.data else ""))
    if options.out and Path(options.out).suffix not in (".csv", ".json", ".jsonl"):
        parser.error(f"--out is {options.out}; expected a name ending in .csv, .json or .jsonl")
    if options.plot and options.data:
        parser.error("--plot needs pictures; a feature file holds none. Name the pictures in place of --data")
    if options.rerank and options.decoding == "greedy":
        parser.error("--rerank needs several captions an image to choose from; take --decoding beam or sample")
    if options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; expected at least 1")
    if options.num_workers is not None and options.num_workers < 0:
        parser.error(f"--num_workers is {options.num_workers}; expected 0 or more")


@one_line_errors
def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)

    import torch

    from features.audio import sound_encoder, spectrogram_picture
    from features.store import load_features
    from models.checkpoints import load_checkpoint
    from models.encoders import load_encoder, pick_device
    from models.operators import accelerate_model
    from models.published.recognise import OURS

    if options.out and options.out.endswith(".json") and len(options.checkpoint) > 1:
        parser.error("--out .json is COCO's result format, one caption an image: give one --checkpoint, or write .csv or .jsonl")
    options.checkpoint = find_checkpoints(options.checkpoint, options.size)
    check_names(options.images)
    device = pick_device(options.device)
    models = [accelerate_model(load_checkpoint(path, options.gpt2_type, device)) for path in options.checkpoint]
    for model, checkpoint in zip(models, options.checkpoint):
        if model.origin.kind != OURS:
            print(f"{checkpoint}: taken for {model.origin.kind}", file=sys.stderr)
    if options.mixed_precision != "no":
        for model in models:
            model.gpt.to({"bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision])

    audio = audio_of(models, options.checkpoint)
    pictures = find_pictures(options.images, sounds=any(audio))

    # Embeddings: from the feature file, or encoded once per encoder that the checkpoints name.
    skipped = {}
    if options.data:
        features = load_features(options.data)
        embedding, ids = captioned_rows(features)
        names = [str(image_id) for image_id in ids]
        embeddings = [embedding] * len(models)
    else:
        encoders = [options.clip_model_type or model.origin.encoder or model.config.encoder for model in models]
        if None in encoders:
            nameless = options.checkpoint[encoders.index(None)]
            raise UserError(f"{nameless} does not name its encoder. Give --clip_model_type, such as ViT-B/32.")
        settings = zip(encoders, audio, (model.config.pooling for model in models))
        wanted = [(name, of_sounds and of_sounds["spectrogram"], pooling) for name, of_sounds, pooling in settings]
        encoded = {}
        for key in dict.fromkeys(wanted):
            name, spectrogram, pooling = key
            encoder = load_encoder(name, device, pooling="pooled" if spectrogram else pooling)
            accelerate_model(encoder.module)
            encoder = sound_encoder(encoder, spectrogram, pooling) if spectrogram else encoder
            encoded[key], pictures = encode_pictures(pictures, encoder, options.batch_size, skipped, options.num_workers)
        for path, reason in skipped.items():
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if not pictures:
            raise UserError(f"none of the {len(skipped)} {'sounds' if any(audio) else 'pictures'} could be read.")
        embeddings = [encoded[key] for key in wanted]
        ids, names = [image_id_of(path) for path in pictures], [str(path) for path in pictures]

    captions = []
    for model, embedding, checkpoint in zip(models, embeddings, options.checkpoint):
        check_width(model, embedding.shape[-1], options.data or model.config.encoder, checkpoint)
        if options.rerank:
            encoder = options.clip_model_type or (features.meta.get("encoder") if options.data else None) or model.config.encoder
            captions.append(caption_and_rerank(model, embedding, options, encoder))
        else:
            captions.append(caption_all(model, embedding, options))
    columns = [Path(checkpoint).stem for checkpoint in options.checkpoint]
    columns = columns if len(set(columns)) == len(columns) else list(options.checkpoint)

    if len(models) == 1 and models[0].config.decoding_style == "clipxgpt" and pictures:
        show_generated(models[0], pictures, captions[0], options.res_path)
    else:
        print_captions(names, columns, captions, options.num_captions)
    if options.out:
        write_captions(options.out, ids, names, columns, captions)
        print(f"wrote {options.out}")
    if options.explain:
        from reports.explain import explain_caption
        from reports.plots import plot_explanation

        text = captions[0][0][0][0]
        if not text.strip():
            raise UserError(f"the caption of {names[0]} is empty: there is nothing to explain.")
        found = explain_caption(models[0], embeddings[0][:1], text)
        plot_explanation(found["words"], found["attention"], found["nearest"], f"{names[0]}: {text}", options.explain)
        print(f"wrote {options.explain}")
    if options.plot:
        from models.encoders.images import read_image
        from reports.plots import plot_captions

        texts = [[of_checkpoint[image][0][0] for of_checkpoint in captions] for image in range(len(names))]
        plot_captions([spectrogram_picture(path) if any(audio) else read_image(path) for path in pictures], texts, options.plot)
        print(f"wrote {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
