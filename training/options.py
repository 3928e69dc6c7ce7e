"""The options of train.py: the published ones under their published names, and the field's words for the rest."""

import sys

from common import Parser
from models.mappers import MAPPERS
from models.tuning import TUNINGS

WARMUP_STEPS = 5000  # as published

PUBLISHED = {
    "stop_token": ".",
    "sampling": "captions",
    "drop_last": True,
    "ignore_index": 0,
    "cut_captions": True,
    "mixed_precision": "no",
    "save_full": True,
}


LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": None}  # as published for Instagram


def build_parser(description):
    """The parser of train.py → common.Parser."""
    parser = Parser(prog="train.py", description=description)
    group = parser.add_argument_group("data and output")
    group.add_argument("--data", nargs="+", default=["./data/coco/oscar_split_train.pkl"], help="feature file(s) from a parse script")
    group.add_argument("--val_data", nargs="+", help="feature file(s) to validate on; {prefix}_best.pt holds the best weights")
    group.add_argument("--out_dir", default="./checkpoints", help="folder for everything this run writes")
    group.add_argument("--prefix", default="coco_prefix", help="stem of the names of its files")
    group.add_argument("--save_every", type=int, default=1, help="epochs between numbered checkpoints (default 1)")
    group.add_argument("--save_steps", type=int, default=10000, help="steps between resume points and _latest.pt (default 10000)")
    group.add_argument("--keep_last", type=int, help="keep this many numbered checkpoints, the latest (default all)")
    group.add_argument("--save_full", action="store_true", help="write a frozen GPT-2 into the checkpoints too, as published")
    group.add_argument("--log_every", type=int, default=50, help="steps between lines of the metrics file (default 50)")
    group.add_argument("--tracker", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="where else to log to")

    group = parser.add_argument_group("validation", "on --val_data")
    group.add_argument("--val_every", type=int, metavar="STEPS", help="optimiser steps between validations (default: after each epoch)")
    group.add_argument("--val_captions", type=int, default=200, help="images to caption at each, for CIDEr (default 200; 0: none)")
    group.add_argument("--best_by", choices=("loss", "cider"), default="loss", help="what makes {prefix}_best.pt the best (default loss)")
    group.add_argument("--patience", type=int, help="stop after this many validations without a better one (default never)")

    group = parser.add_argument_group("model")
    group.add_argument("--prefix_length", type=int, default=10, help="P, tokens of the prefix (default 10)")
    group.add_argument("--prefix_length_clip", type=int, default=10, help="K, vectors that the transformer mapper begins with (10)")
    group.add_argument("--mapping_type", choices=tuple(MAPPERS), default="mlp")
    group.add_argument("--num_layers", type=int, default=8, help="layers of the transformer or encoder mapper (default 8)")
    group.add_argument("--mapper_heads", type=int, help="attention heads of the encoder mapper (default 16)")
    group.add_argument("--mapper_dropout", type=float, default=0.1, help="dropout of the encoder mapper (default 0.1)")
    group.add_argument("--normalize_prefix", action="store_true", help="divide each embedding by its L2 norm; kept in the checkpoint")
    group.add_argument("--is_rn", action="store_true", help="the embeddings are RN50x4's (640 wide); the data says so too, this checks it")
    group.add_argument(
        "--gpt2_type", "--language_model", metavar="NAME", help="any causal language model of transformers: a name or a folder "
        "(default gpt2; distilgpt2 for TinyViT features)"
    )  # fmt: skip
    group.add_argument("--stop_token", help='where captions end: by default <|endoftext|>, learned as last target; "." as published')
    group.add_argument("--gpt2_dropout", type=float, help="dropout of a tuned GPT-2 (default its own: 0.1)")
    group.add_argument("--init_from", help='checkpoint to start from, ours or a published one; "none": from none')
    group.add_argument("--init_parts", choices=("all", "gpt", "mapper"), default="all", help="what of --init_from to take (default all)")
    group.add_argument("--prompt", help="text between prefix and caption; {base} in it stands for what --base_checkpoint says of the image")
    group.add_argument("--base_checkpoint", help="checkpoint whose captions fill {base}; decoded once, kept beside --data")

    group = parser.add_argument_group("what is trained", "beside the mapper; without trained parameters a part keeps its dropout off")
    group.add_argument(
        "--tune", choices=tuple(TUNINGS), help="full: the whole language model (default). mapper: nothing of it. ends: embeddings, "
        "first block, last block, final norm. head: the output layer, untied. lora: low-rank adapters"
    )  # fmt: skip
    group.add_argument("--only_prefix", action="store_true", help="train the mapper only; GPT-2 stays as it is: --tune mapper")
    group.add_argument("--freeze_mapper", action="store_true", help="keep the mapper as --init_from gives it")
    group.add_argument("--lora_rank", type=int, help=f"(default {LORA['rank']})")
    group.add_argument("--lora_alpha", type=float, help=f"adapters count alpha / rank times (default {LORA['alpha']})")
    group.add_argument("--lora_dropout", type=float, help=f"dropout before the adapters (default {LORA['dropout']})")
    group.add_argument("--lora_targets", help="layers with adapters, by comma (default c_attn,c_proj,c_fc for GPT-2, else all-linear)")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=10)
    group.add_argument("--max_steps", type=int, help="stop after this many optimiser steps; the learning rate ends there too")
    group.add_argument("--bs", type=int, default=40, help="captions an optimiser step, over all processes (default 40)")
    group.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default 2e-5)")
    group.add_argument("--mapper_lr", type=float, help="peak learning rate of the mapper (default --lr)")
    group.add_argument("--warmup_steps", type=int, help=f"steps of linear warm-up (default {WARMUP_STEPS})")
    group.add_argument("--warmup_ratio", type=float, help="warm-up as a share of the run, in place of --warmup_steps")
    group.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW; none on norms and biases (default 0, as published)")
    group.add_argument("--clip_grad", type=float, help="longest gradient, as a norm over all of it (default no limit)")
    group.add_argument("--accumulate", type=int, default=1, help="parts a step's --bs captions go through in, to save memory (default 1)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="compute activations again in place of keeping them")
    group.add_argument("--compile", action="store_true", help="torch.compile the language model: minutes at the start, for faster steps "
                       "on a GPU; little gain on a CPU, or a loss")  # fmt: skip
    group.add_argument("--row_tokens", type=int, metavar="N", help="tokens that every row of packed captions holds, so that a GPU sees few "
                       "shapes (default on a GPU what wastes least of 256, 512, 1024; on a CPU each batch as it fits)")  # fmt: skip
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
    settle_tuning(parser, options)
    if options.warmup_ratio is not None and options.warmup_steps is not None:
        parser.error("--warmup_ratio and --warmup_steps both set the warm-up; give one")
    if options.warmup_steps is None:
        options.warmup_steps = WARMUP_STEPS
    at_least = {"accumulate": 1, "keep_last": 1, "patience": 1, "warmup_steps": 0, "max_steps": 0, "seed": 0, "log_every": 1}
    at_least |= {"val_every": 1, "val_captions": 0, "row_tokens": 16}
    at_least |= {"prefix_length": 1, "prefix_length_clip": 1, "num_layers": 1, "epochs": 1, "bs": 1, "save_every": 1, "save_steps": 1}
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; expected at least {least}")
    for name in ("lr", "mapper_lr"):
        rate = getattr(options, name)
        if rate is not None and not 0 < rate < 1:
            parser.error(f"--{name} is {rate}; expected a number between 0 and 1, such as 2e-5")
    for name in ("warmup_ratio", "weight_decay"):
        share = getattr(options, name)
        if share is not None and not 0 <= share <= 1:
            parser.error(f"--{name} is {share}; expected a number from 0 to 1")
    if options.clip_grad is not None and not options.clip_grad > 0:
        parser.error(f"--clip_grad is {options.clip_grad}; expected more than 0, such as 1")
    if options.gpt2_dropout is not None and not 0 <= options.gpt2_dropout < 1:
        parser.error(f"--gpt2_dropout is {options.gpt2_dropout}; expected 0 or more and less than 1")
    if options.prompt is not None and not options.prompt.strip():
        parser.error("--prompt is empty; give the text that stands between prefix and caption, or leave it out")
    if bool(options.base_checkpoint) != ("{base}" in (options.prompt or "")):
        there, absent = ("--base_checkpoint", "{base} in --prompt")[:: 1 if options.base_checkpoint else -1]
        parser.error(f"{there}, but no {absent}; give both, or neither")
    if options.mapper_heads is not None and options.mapper_heads < 1:
        parser.error(f"--mapper_heads is {options.mapper_heads}; expected at least 1")
    if not 0 <= options.mapper_dropout < 1:
        parser.error(f"--mapper_dropout is {options.mapper_dropout}; expected 0 or more and less than 1")
    asked = [f"--{name}" for name in ("patience", "val_every") if getattr(options, name)] + ["--best_by"] * (options.best_by != "loss")
    if asked and not options.val_data:
        parser.error(f"{asked[0]} needs --val_data, the captions that are watched")
    if options.best_by == "cider" and not options.val_captions:
        parser.error("--best_by cider needs captions to score; take --val_captions above 0")
    if options.compile and options.gradient_checkpointing:
        parser.error("--compile and --gradient_checkpointing do not go together; give one")
    if not options.prefix or "/" in options.prefix:
        parser.error(f"--prefix is {options.prefix!r}; expected the stem of a file name; the folder is --out_dir")
    return options


def settle_tuning(parser, options):
    """Bring --tune, --only_prefix and the adapters' options to `options.tune` and `options.lora` (a dict, or None without adapters)."""
    if options.only_prefix and options.tune not in (None, "mapper"):
        parser.error(f"--only_prefix is --tune mapper; --tune {options.tune} asks for something else. Give one")
    options.tune = options.tune or ("mapper" if options.only_prefix else "full")
    if options.freeze_mapper and options.tune == "mapper":
        parser.error("--freeze_mapper leaves nothing to train with --tune mapper. Take another --tune")
    given = {name: getattr(options, f"lora_{name}") for name in LORA}
    set_here = [f"--lora_{name}" for name, value in given.items() if value is not None]
    options.lora = None
    if options.tune == "lora":
        options.lora = LORA | {name: value for name, value in given.items() if value is not None}
        if options.lora["rank"] < 1 or not options.lora["alpha"] > 0 or not 0 <= options.lora["dropout"] < 1:
            shown = ", ".join(f"--lora_{name} {options.lora[name]}" for name in ("rank", "alpha", "dropout"))
            parser.error(f"{shown}: expected a rank of at least 1, an alpha above 0, and a dropout of 0 or more and less than 1")
        if options.lora_targets == "all-linear":
            options.lora["targets"] = "all-linear"
        elif options.lora_targets is not None:
            options.lora["targets"] = [name.strip() for name in options.lora_targets.split(",") if name.strip()]
            if not options.lora["targets"]:
                parser.error(f"--lora_targets is {options.lora_targets!r}; expected names by comma, such as c_attn,c_proj")
    elif set_here:
        parser.error(f"{', '.join(set_here)} without --tune lora, which would have adapters. Add it, or leave them out")
