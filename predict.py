"""Caption pictures, folders of pictures, or a feature file, with a trained captioner.

  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photo.jpg
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt photos/ --out captions.csv --plot captions.png
  python predict.py --checkpoint ./coco_train/coco_prefix-009.pt --data val.pkl --out results.json --batch_size 64
  python predict.py --checkpoint first.pt --checkpoint second.pt photo.jpg        # side by side

Encoder, architecture, lengths, normalisation and stop token come from the checkpoint. --out writes .csv, .jsonl (every caption with
its score) or .json (COCO's result format: the best caption of each image_id).
"""

import re
import sys
from pathlib import Path

from common import Parser, UserError, one_line_errors, replace_file

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm"}


def build_parser():
    """The parser of predict.py."""
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="PICTURE", help="pictures, or folders of pictures")
    parser.add_argument("-I", "--image", action="append", default=[], help="a picture; the same as naming it without an option")
    parser.add_argument("--data", help="feature file to caption, in place of pictures")
    parser.add_argument("-C", "--checkpoint", action="append", default=[], help="checkpoint; several give one column each")
    parser.add_argument("--gpt2_type", help="language model to build on, where not the checkpoint's")
    parser.add_argument("--clip_model_type", help="image encoder, where not the checkpoint's")
    group = parser.add_argument_group("decoding")
    group.add_argument("--decoding", choices=("beam", "greedy", "sample"), default="beam")
    group.add_argument("--beam_size", type=int, default=5)
    group.add_argument("--entry_length", type=int, default=67, help="most tokens of a caption (default 67)")
    group.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 or less means 1")
    group.add_argument("--top_p", type=float, default=1.0, help="sampling: keep the likeliest tokens that add up to this (default 1: all)")
    group.add_argument("--stop_token", help="token that ends a caption, where not the checkpoint's")
    group.add_argument("--num_captions", type=int, default=1, help="captions an image, best first, with their scores")
    group.add_argument("--seed", type=int, default=0, help="of --decoding sample")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="file for the captions: .csv, .json (COCO results) or .jsonl")
    group.add_argument("--plot", help="picture of the images with their captions")
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default auto: the best there is)")
    group.add_argument("--batch_size", type=int, default=32, help="images a batch (default 32)")
    group.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="of the language model (default no: fp32)")
    return parser


def check_options(parser, options):
    """Cross-check the options; a mistake ends in one line and exit code 2."""
    options.images = options.images + options.image
    if not options.checkpoint:
        parser.error("no --checkpoint; give a .pt file, such as the one train.py names at its end")
    if bool(options.images) == bool(options.data):
        parser.error("give pictures or folders, or --data with a feature file" + (", not both" if options.data else ""))
    if options.out and Path(options.out).suffix not in (".csv", ".json", ".jsonl"):
        parser.error(f"--out is {options.out}; expected a name ending in .csv, .json or .jsonl")
    if options.plot and options.data:
        parser.error("--plot needs pictures; a feature file holds none. Name the pictures in place of --data")
    if options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; expected at least 1")


def find_pictures(names):
    """Expand files and folders → list of Path, a folder's pictures sorted by name. Raises UserError for a missing or empty one."""
    found = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(path for path in name.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise UserError(f"folder {name} holds no picture; expected files ending in {', '.join(sorted(PICTURE_SUFFIXES))}.")
            found += inside
        elif name.is_file():
            found.append(name)
        else:
            raise UserError(f"no picture or folder {name}. Check the path.")
    return found


def image_id_of(path):
    """The id of a picture: COCO's number where the name carries one (COCO_val2014_000000391895.jpg → 391895), else the stem."""
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    return int(number[1]) if number else path.stem


def encode_pictures(paths, encoder, batch_size, skipped):
    """Encode pictures → float32 [N, D] tensor and the paths that could be read; the others are added to `skipped` with the reason."""
    import torch
    from tqdm import tqdm

    embeddings, read = [], []
    for start in tqdm(range(0, len(paths), batch_size), desc="encode", unit="batch", disable=None, leave=False):
        batch = []
        for path in paths[start : start + batch_size]:
            try:
                batch.append(encoder.preprocess(path))
                read.append(path)
            except (ValueError, OSError) as error:
                skipped[path] = str(error)
        if batch:
            embeddings.append(encoder.encode(torch.stack(batch)).cpu())
    return torch.cat(embeddings) if embeddings else torch.empty(0, encoder.width), read


def caption_all(model, embeddings, options):
    """Caption every embedding, batch by batch → list (one an image) of lists of (text, score), best first."""
    from tqdm import tqdm

    from models.decoding import generate

    captions = []
    for start in tqdm(range(0, len(embeddings), options.batch_size), desc="caption", unit="batch", disable=None, leave=False):
        captions += generate(
            model,
            embeddings[start : start + options.batch_size].float(),
            decoding=options.decoding,
            beam_size=options.beam_size,
            entry_length=options.entry_length,
            temperature=options.temperature,
            top_p=options.top_p,
            stop_token=options.stop_token,
            num_captions=options.num_captions,
            seed=options.seed + start,
        )
    return captions


def check_width(model, width, source, checkpoint):
    """Raise UserError when embeddings of `source` do not fit the checkpoint."""
    config = model.config
    if width != config.clip_width:
        raise UserError(
            f"{source} gives {width}-wide embeddings; {checkpoint} wants {config.clip_width} ({config.encoder or 'encoder unknown'}). "
            f"Take features of that encoder, or a checkpoint trained on these."
        )


def write_captions(path, ids, names, columns, captions):
    """Write captions by the suffix of `path`.

    ids, names: one an image; columns: the checkpoints; captions: [checkpoint][image] → list of (text, score).
    """
    import json

    rows = [
        {"image_id": image_id, "file": name, "checkpoint": column, "rank": rank, "caption": text, "score": round(score, 6)}
        for image, (image_id, name) in enumerate(zip(ids, names))
        for column, of_checkpoint in zip(columns, captions)
        for rank, (text, score) in enumerate(of_checkpoint[image], start=1)
    ]
    with replace_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.endswith(".json"):
            results = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows if row["rank"] == 1]
            json.dump(results, file, ensure_ascii=False)
        else:
            import csv

            writer = csv.writer(file)
            # One line an image and rank, one column a checkpoint.
            scores = [f"score {column}" if len(columns) > 1 else "score" for column in columns]
            texts = list(columns) if len(columns) > 1 else ["caption"]
            writer.writerow(["image_id", "file", "rank", *(heading for pair in zip(texts, scores) for heading in pair)])
            for image, (image_id, name) in enumerate(zip(ids, names)):
                for rank in range(len(captions[0][image])):
                    cells = [cell for of_checkpoint in captions for cell in of_checkpoint[image][rank]]
                    writer.writerow([image_id, name, rank + 1, *cells])


def print_captions(names, columns, captions, num_captions):
    """Show captions on the screen, with scores when there are several an image."""
    for image, name in enumerate(names):
        print(name)
        for column, of_checkpoint in zip(columns, captions):
            label = f"  {column}: " if len(columns) > 1 else "  "
            for text, score in of_checkpoint[image]:
                print(f"{label}{text}" + (f"  ({score:.3f})" if num_captions > 1 else ""))


@one_line_errors
def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)

    import torch

    from features.store import load_features
    from models.checkpoints import load_checkpoint
    from models.encoders import load_encoder, pick_device

    if options.out and options.out.endswith(".json") and len(options.checkpoint) > 1:
        parser.error("--out .json is COCO's result format, one caption an image: give one --checkpoint, or write .csv or .jsonl")
    pictures = find_pictures(options.images)
    device = pick_device(options.device)
    models = [load_checkpoint(path, options.gpt2_type, device) for path in options.checkpoint]
    if options.mixed_precision != "no":
        for model in models:
            model.gpt.to({"bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision])

    # Embeddings: from the feature file, or encoded once per encoder that the checkpoints name.
    skipped = {}
    if options.data:
        features = load_features(options.data)
        first = {caption["clip_embedding"]: caption for caption in reversed(features.captions)}
        rows = sorted(first)
        ids = [first[row]["image_id"] for row in rows]
        names = [str(image_id) for image_id in ids]
        embeddings = [features.clip_embedding[rows]] * len(models)
    else:
        encoders = [options.clip_model_type or model.config.encoder for model in models]
        if None in encoders:
            nameless = options.checkpoint[encoders.index(None)]
            raise UserError(f"{nameless} does not name its encoder. Give --clip_model_type, such as ViT-B/32.")
        encoded = {}
        for name in dict.fromkeys(encoders):
            encoded[name], pictures = encode_pictures(pictures, load_encoder(name, device), options.batch_size, skipped)
        for path, reason in skipped.items():
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if not pictures:
            raise UserError(f"none of the {len(skipped)} pictures could be read.")
        embeddings = [encoded[name] for name in encoders]
        ids, names = [image_id_of(path) for path in pictures], [str(path) for path in pictures]

    captions = []
    for model, embedding, checkpoint in zip(models, embeddings, options.checkpoint):
        check_width(model, embedding.shape[1], options.data or model.config.encoder, checkpoint)
        captions.append(caption_all(model, embedding, options))
    columns = [Path(checkpoint).stem for checkpoint in options.checkpoint]
    columns = columns if len(set(columns)) == len(columns) else list(options.checkpoint)

    print_captions(names, columns, captions, options.num_captions)
    if options.out:
        write_captions(options.out, ids, names, columns, captions)
        print(f"wrote {options.out}")
    if options.plot:
        from models.images import read_image
        from reports.plots import plot_captions

        texts = [[of_checkpoint[image][0][0] for of_checkpoint in captions] for image in range(len(names))]
        plot_captions([read_image(path) for path in pictures], texts, options.plot)
        print(f"wrote {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
