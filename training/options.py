"""The options of train.py: the published ones under their published names, and the field's words for the rest."""

import sys

from common import Parser

PUBLISHED = {
    "stop_token": ".",
    "sampling": "captions",
    "drop_last": True,
    "ignore_index": 0,
    "cut_captions": True,
    "mixed_precision": "no",
    "save_full": True,
}


def build_parser(description):
    """The parser of train.py → common.Parser."""
    parser = Parser(prog="train.py", description=description)
    group = parser.add_argument_group("data and output")
    group.add_argument("--data", nargs="+", default=["./data/coco/oscar_split_train.pkl"], help="feature file(s) from a parse script")
    group.add_argument("--val_data", nargs="+", help="feature file(s) to validate on after each epoch; {prefix}_best.pt is the best epoch")
    group.add_argument("--out_dir", default="./checkpoints", help="folder for everything this run writes")
    group.add_argument("--prefix", default="coco_prefix", help="stem of the names of its files")
    group.add_argument("--save_every", type=int, default=1, help="epochs between numbered checkpoints (default 1)")
    group.add_argument("--save_steps", type=int, default=10000, help="steps between resume points and _latest.pt (default 10000)")
    group.add_argument("--keep_last", type=int, help="keep this many numbered checkpoints, the latest (default all)")
    group.add_argument("--save_full", action="store_true", help="write a frozen GPT-2 into the checkpoints too, as published")
    group.add_argument("--log_every", type=int, default=50, help="steps between lines of the metrics file (default 50)")

    group = parser.add_argument_group("model")
    group.add_argument("--prefix_length", type=int, default=10, help="P, tokens of the prefix (default 10)")
    group.add_argument("--prefix_length_clip", type=int, default=10, help="K, vectors that the transformer mapper begins with (10)")
    group.add_argument("--mapping_type", choices=("mlp", "transformer", "encoder", "linear"), default="mlp")
    group.add_argument("--num_layers", type=int, default=8, help="layers of the transformer or encoder mapper (default 8)")
    group.add_argument("--mapper_heads", type=int, help="attention heads of the encoder mapper (default 16)")
    group.add_argument("--mapper_dropout", type=float, default=0.1, help="dropout of the encoder mapper (default 0.1)")
    group.add_argument("--only_prefix", action="store_true", help="train the mapper only; GPT-2 stays as it is")
    group.add_argument("--normalize_prefix", action="store_true", help="divide each embedding by its L2 norm; kept in the checkpoint")
    group.add_argument("--is_rn", action="store_true", help="the embeddings are RN50x4's (640 wide); the data says so too, this checks it")
    group.add_argument("--gpt2_type", help="language model: a name or a folder (default gpt2; distilgpt2 for TinyViT features)")
    group.add_argument("--stop_token", help='where captions end: by default <|endoftext|>, learned as last target; "." as published')
    group.add_argument("--gpt2_dropout", type=float, help="dropout of a tuned GPT-2 (default its own: 0.1)")
    group.add_argument("--init_from", help='checkpoint to start from, ours or a published one; "none": from none')
    group.add_argument("--init_parts", choices=("all", "gpt", "mapper"), default="all", help="what of --init_from to take (default all)")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=10)
    group.add_argument("--max_steps", type=int, help="stop after this many optimiser steps; the learning rate ends there too")
    group.add_argument("--patience", type=int, help="stop after this many epochs without a better --val_data loss (default never)")
    group.add_argument("--bs", type=int, default=40, help="captions an optimiser step, over all processes (default 40)")
    group.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default 2e-5)")
    group.add_argument("--warmup_steps", type=int, default=5000, help="steps of linear warm-up (default 5000)")
    group.add_argument("--sampling", choices=("images", "captions"), default="images", help="draw whole images, or captions one by one")
    group.add_argument("--drop_last", action="store_true", help="drop an epoch's last part-batch, as published")
    group.add_argument("--ignore_index", type=int, help='token left out of the loss (published: 0, which is "!")')
    group.add_argument("--cut_captions", action="store_true", help="cut captions at min(mean + 10 sd, longest) tokens, as published")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--resume", action="store_true", help="go on from {prefix}_state.pt; starts anew where there is none")
    group.add_argument("--device", help="cuda, mps or cpu (default the best there is)")
    group.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="auto: bf16 if it pays here")
    restored = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in PUBLISHED.items())
    group.add_argument("--published", action="store_true", help=f"train exactly as published; the same as {restored}")
    return parser


def parse_options(argv, description):
    """Read and cross-check the options of train.py → Namespace. A mistake ends in one line on stderr and exit code 2."""
    parser = build_parser(description)
    options = parser.parse_args(argv)
    if options.published:
        given = {word.split("=")[0].lstrip("-") for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")}
        for name, value in PUBLISHED.items():
            if name not in given:
                setattr(options, name, value)
    at_least = {"prefix_length": 1, "prefix_length_clip": 1, "num_layers": 1, "epochs": 1, "bs": 1, "save_every": 1, "save_steps": 1}
    for name, least in {**at_least, "log_every": 1, "keep_last": 1, "patience": 1, "warmup_steps": 0, "max_steps": 0, "seed": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; expected at least {least}")
    if not 0 < options.lr < 1:
        parser.error(f"--lr is {options.lr}; expected a number between 0 and 1, such as 2e-5")
    if options.gpt2_dropout is not None and not 0 <= options.gpt2_dropout < 1:
        parser.error(f"--gpt2_dropout is {options.gpt2_dropout}; expected 0 or more and less than 1")
    if options.mapper_heads is not None and options.mapper_heads < 1:
        parser.error(f"--mapper_heads is {options.mapper_heads}; expected at least 1")
    if not 0 <= options.mapper_dropout < 1:
        parser.error(f"--mapper_dropout is {options.mapper_dropout}; expected 0 or more and less than 1")
    if options.patience and not options.val_data:
        parser.error("--patience needs --val_data, the captions whose loss is watched")
    if not options.prefix or "/" in options.prefix:
        parser.error(f"--prefix is {options.prefix!r}; expected the stem of a file name; the folder is --out_dir")
    return options
