"""The options of train.py. Published options keep their published names.

To add a training option, add it here and use it in one other file. A new option counts as part of what a run is, so that --resume
compares it; if it does not shape the result, add its name to NOT_COMPARED too.
"""

import argparse
import dataclasses

from common import Parser
from models.config import MOST_RETRIEVED
from models.mappers import MAPPERS
from models.tuning import TUNINGS

LR = 2e-5  # as published
WARMUP_STEPS = 5000  # as published
WARMUP_SHARE = 0.05  # of the run, at most

# What --published sets, unless the option is given too. The README's table of differences names the same options.
PUBLISHED = {
    "stop_token": ".",
    "sampling": "captions",
    "drop_last": True,
    "ignore_index": 0,
    "cut_captions": True,
    "mixed_precision": "no",
    "save_full": True,
}

RETRIEVED = 4  # captions, SmallCap's k
RETRIEVAL_PROMPT = "Similar images show {retrieved} This image shows "  # as in SmallCap

LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": None}  # as published for Instagram

# Options that a resumed run may change, or that are compared in another form (see training.identity.describe_identity).
NOT_COMPARED = {
    *("out_dir", "prefix", "save_every", "save_steps", "keep_last", "save_full", "log_every", "tracker"),  # files and logs
    *("epochs", "max_steps", "patience"),  # the end of the run; a longer run is allowed
    *("resume", "device", "compile"),  # where and how fast it runs
    *("mixed_precision", "warmup_steps", "init_from"),  # compared as settled
    *("data", "val_data", "is_rn"),  # compared by content
    *("gpt2_type", "prefix_length", "prefix_length_clip", "mapping_type", "num_layers", "normalize_prefix"),  # in the model's config
    *("stop_token", "prompt", "base_checkpoint", "datastore", "retrieved_captions", "noise_variance", "modality_offset"),  # likewise
    *("tune", "only_prefix", "freeze_mapper", "lora"),  # likewise
    *(f"lora_{name}" for name in LORA),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that an option takes."""

    least: float = 1
    most: float = float("inf")
    exclusive: bool = False  # whether `least` and `most` themselves are refused

    def expected(self, value):
        """Say which numbers are expected, or return None where `value` is one."""
        inside = self.least < value < self.most if self.exclusive else self.least <= value <= self.most
        if inside:
            return None
        if self.exclusive:
            return f"more than {self.least:g}" + (f" and less than {self.most:g}" if self.most < float("inf") else "")
        return f"at least {self.least:g}" if value < self.least else f"at most {self.most:,}"


RATE, SHARE, AT_LEAST_0, POSITIVE = Limits(0, 1, True), Limits(0, 1), Limits(0), Limits(0, exclusive=True)
DROPOUT = Limits(0, 0.999)
SIZE = Limits(1, 10_000)
LIMITS = {
    **dict.fromkeys(("bs", "accumulate", "keep_last", "patience", "log_every", "save_every", "save_steps", "val_every"), Limits()),
    **dict.fromkeys(("warmup_steps", "max_steps", "seed", "val_captions", "noise_variance"), AT_LEAST_0),
    **dict.fromkeys(("prefix_length", "prefix_length_clip", "lora_rank"), SIZE),
    **dict.fromkeys(("lr", "mapper_lr"), RATE),
    **dict.fromkeys(("warmup_ratio", "weight_decay"), SHARE),
    **dict.fromkeys(("gpt2_dropout", "lora_dropout"), DROPOUT),
    **dict.fromkeys(("clip_grad", "lora_alpha"), POSITIVE),
    "num_layers": Limits(1, 1000),
    "retrieved_captions": Limits(1, MOST_RETRIEVED),
    "epochs": Limits(1, 1_000_000),
}


def build_parser(description):
    """Build the parser of train.py. Groups stand in the order in which a new user needs them."""
    parser = Parser(prog="train.py", description=description)
    _add_data_and_model(parser)
    _add_training(parser)
    _add_saving_and_fidelity(parser)
    _add_beyond(parser)
    return parser


def _add_data_and_model(parser):
    group = parser.add_argument_group("data and output")
    group.add_argument("--data", nargs="+", metavar="FILE", default=["./data/coco/oscar_split_train.pkl"],
                       help="feature files or folders from a parse script (default ./data/coco/oscar_split_train.pkl)")  # fmt: skip
    group.add_argument("--val_data", nargs="+", metavar="FILE", help="feature files of held-out captions to validate on (default none)")
    group.add_argument("--out_dir", default="./checkpoints", help="folder for everything that this run writes (default %(default)s)")
    group.add_argument("--prefix", default="coco_prefix", help="first part of the names of its files (default %(default)s)")

    group = parser.add_argument_group("model")
    group.add_argument("--mapping_type", choices=tuple(MAPPERS), default="mlp",
                       help=f"mapper from embedding to prefix (default %(default)s). {_describe(MAPPERS)}")  # fmt: skip
    group.add_argument("--prefix_length", type=int, default=10, help="length P of the prefix, in tokens (default %(default)s)")
    group.add_argument("--prefix_length_clip", type=int, default=10,
                       help="number K of vectors that the transformer mapper makes of an embedding (default %(default)s)")  # fmt: skip
    group.add_argument("--num_layers", type=int, default=8, help="layers of the transformer or encoder mapper (default %(default)s)")
    group.add_argument("--normalize_prefix", action="store_true",
                       help="divide each embedding by its L2 norm; the checkpoint records it (default off)")  # fmt: skip
    group.add_argument("--is_rn", action="store_true", help="check that the embeddings are 640 wide, as RN50x4's are (default off)")
    group.add_argument("--gpt2_type", "--language_model", metavar="NAME",
                       help="causal language model of transformers, by name or folder (default gpt2; distilgpt2 for TinyViT)")  # fmt: skip
    group.add_argument("--stop_token", help='token that ends a caption (default <|endoftext|>, learned as last target; "." as published)')
    group.add_argument("--prompt", help="text between prefix and caption; {base} in it stands for a caption by --base_checkpoint, "
                       "{retrieved} for captions of similar images (default none)")  # fmt: skip
    group.add_argument("--base_checkpoint", metavar="FILE", help="checkpoint whose captions fill {base}; they are decoded once and kept "
                       "beside --data (default none)")  # fmt: skip

    group = parser.add_argument_group("what is trained", "A part without trained parameters keeps its dropout off.")
    group.add_argument("--tune", choices=tuple(TUNINGS),
                       help=f"part of the language model to train beside the mapper (default full). {_describe(TUNINGS)}")  # fmt: skip
    group.add_argument("--only_prefix", action="store_true", help="train the mapper only; the same as --tune mapper (default off)")
    group.add_argument("--freeze_mapper", action="store_true", help="keep the mapper as --init_from gives it (default off)")
    group.add_argument("--lora_rank", type=int, help=f"rank of the adapters (default {LORA['rank']})")
    group.add_argument("--lora_alpha", type=float, help=f"weight of the adapters: alpha / rank (default {LORA['alpha']})")
    group.add_argument("--lora_dropout", type=float, help=f"dropout probability before the adapters (default {LORA['dropout']})")
    group.add_argument("--lora_targets", metavar="NAMES",
                       help="layers with adapters, with commas (default c_attn,c_proj,c_fc for GPT-2, else all-linear)")  # fmt: skip


def _add_training(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--init_from", metavar="FILE", help='checkpoint to start from, ours or a published one; "none" for a fresh mapper '
                       "(default none; for Clotho features model_weights.pt, where the working folder has it)")  # fmt: skip
    group.add_argument("--init_parts", choices=("all", "gpt", "mapper"), default="all",
                       help="parts of --init_from to take (default %(default)s)")  # fmt: skip
    group.add_argument("--epochs", type=int, default=10, help="number of passes over the data (default %(default)s)")
    group.add_argument("--max_steps", type=int, help="stop after this many optimizer steps; the schedule ends there too (default no limit)")
    group.add_argument("--bs", type=int, default=40, help="captions per optimizer step, over all processes (default %(default)s)")
    group.add_argument("--lr", type=float, default=LR, help="peak learning rate (default %(default)s)")
    group.add_argument("--mapper_lr", type=float, help="peak learning rate of the mapper (default --lr)")
    group.add_argument("--warmup_steps", type=int, help=f"optimizer steps of linear warm-up (default {WARMUP_STEPS}, but at most "
                       f"{WARMUP_SHARE:.0%}% of the run; with --published always {WARMUP_STEPS})")  # fmt: skip
    group.add_argument("--warmup_ratio", type=float, help="warm-up as a share of the run, instead of --warmup_steps (default none)")
    group.add_argument("--weight_decay", type=float, default=0.0,
                       help="weight decay of AdamW, on matrices only (default %(default)s, as published)")  # fmt: skip
    group.add_argument("--clip_grad", type=float, help="largest norm of the whole gradient (default no limit)")
    group.add_argument("--gpt2_dropout", type=float, help="dropout probability of a tuned language model (default its own, 0.1 for GPT-2)")
    group.add_argument("--seed", type=int, default=0, help="seed of initial weights, batches and dropout (default %(default)s)")

    group = parser.add_argument_group("validation", "Needs --val_data; the best weights are kept in {prefix}_best.pt.")
    group.add_argument("--val_every", type=int, metavar="STEPS", help="optimizer steps between validations (default one per epoch)")
    group.add_argument("--val_captions", type=int, default=200,
                       help="images to caption at each validation, for CIDEr; 0 for none (default %(default)s)")  # fmt: skip
    group.add_argument("--best_by", choices=("loss", "cider"), default="loss",
                       help="figure that decides which weights are the best (default %(default)s)")  # fmt: skip
    group.add_argument("--patience", type=int, help="stop after this many validations without a better one (default never)")


def _add_saving_and_fidelity(parser):
    group = parser.add_argument_group("saving and resuming")
    group.add_argument("--resume", action="store_true",
                       help="resume from {prefix}_state.pt, also with more --epochs or --max_steps; start from scratch where there is none "
                       "(default off)")  # fmt: skip
    group.add_argument("--save_every", type=int, default=1, help="epochs between numbered checkpoints (default %(default)s)")
    group.add_argument("--save_steps", type=int, default=10000, help="optimizer steps between resume points (default %(default)s)")
    group.add_argument("--keep_last", type=int, help="number of numbered checkpoints to keep (default all)")
    group.add_argument("--save_full", action="store_true",
                       help="write a frozen language model into the checkpoints too, adapters merged (default off)")  # fmt: skip
    group.add_argument("--log_every", type=int, default=50, help="optimizer steps between lines of the metrics file (default %(default)s)")
    group.add_argument("--tracker", choices=("tensorboard", "wandb", "none"), default="tensorboard",
                       help="experiment tracker that gets the curves too (default %(default)s)")  # fmt: skip

    group = parser.add_argument_group("speed and memory")
    group.add_argument("--device", help="cuda, mps or cpu (default the best that is available)")
    group.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"), default="auto",
                       help="number format of the computation; auto: bf16 where the hardware has it (default %(default)s)")  # fmt: skip
    group.add_argument("--accumulate", type=int, default=1,
                       help="parts into which a step's captions are split, to save memory (default %(default)s)")  # fmt: skip
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="recompute activations in the backward pass instead of keeping them (default off)")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the language model with torch.compile; takes minutes at the start, "
                       "pays on a GPU (default off)")  # fmt: skip

    group = parser.add_argument_group("fidelity to the published code")
    restored = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in PUBLISHED.items())
    group.add_argument("--published", action="store_true", help=f"train as published: {restored}, and the published AdamW (default off)")
    group.add_argument("--sampling", choices=("images", "captions"), default="images",
                       help="draw whole images with their captions, or captions one by one as published (default %(default)s)")  # fmt: skip
    group.add_argument("--drop_last", action="store_true", help="drop the last, smaller batch of an epoch, as published (default off)")
    group.add_argument("--ignore_index", type=int, help='token left out of the loss; published: 0, which is "!" (default none)')
    group.add_argument("--cut_captions", action="store_true",
                       help="cut captions at min(mean + 10 sd, longest) tokens, as published (default off)")  # fmt: skip


def _add_beyond(parser):
    group = parser.add_argument_group("retrieval and training on texts", "As in SmallCap, CapDec and DeCap; see docs/beyond.md.")
    group.add_argument("--datastore", nargs="+", metavar="FILE",
                       help="feature files or folders of the same encoder, of images or texts, whose captions take the place of "
                            "{retrieved} in --prompt; an image's own captions are left out (default --data)")  # fmt: skip
    group.add_argument("--retrieved_captions", type=int, metavar="K",
                       help=f"captions shown, one of each of the K nearest images (default {RETRIEVED})")  # fmt: skip
    group.add_argument("--noise_variance", type=float, metavar="X",
                       help="variance of the noise on every coordinate of a normalised text embedding, in training only "
                            "(default 0.016 for features of parse_text.py)")  # fmt: skip
    group.add_argument("--modality_offset", metavar="FILE",
                       help="feature file of any pictures: measure how far the mean of their embeddings is from that of the texts, and "
                            "subtract it from pictures when captioning (default none)")  # fmt: skip


def _describe(registry):
    """List the entries of a registry with their help texts."""
    return "; ".join(f"{name}: {entry.help}" for name, entry in registry.items())


def parse_options(argv, description):
    """Read and check the options of train.py. A mistake ends in one line on stderr and exit code 2.

    Returns:
        Namespace; `tune`, `lora` (a dict, or None without adapters) and what --published sets are settled.
    """
    parser = build_parser(description)
    options = parser.parse_args(argv)
    if options.published:
        parser.set_defaults(**PUBLISHED)
        options = parser.parse_args(argv)
    _check_values(parser, options)
    _check_combinations(parser, options)
    tune = options.tune or ("mapper" if options.only_prefix else "full")
    return argparse.Namespace(**vars(options) | {"tune": tune, "lora": _settle_lora(parser, options, tune)})


def _check_values(parser, options):
    """Refuse empty texts, and numbers outside their limits."""
    for name, value in vars(options).items():
        if "" in (value if isinstance(value, list) else [value]):
            parser.error(f"--{name} is empty; give a value, or leave it out")
    for name, limits in LIMITS.items():
        value = getattr(options, name)
        expected = None if value is None else limits.expected(value)
        if expected:
            parser.error(f"--{name} is {value}; expected {expected}")
    if "/" in options.prefix:
        parser.error(f"--prefix is {options.prefix!r}; expected part of a file name, without a folder. The folder is --out_dir")
    if options.prompt is not None and not options.prompt.strip():
        parser.error("--prompt is empty; give the text between prefix and caption, or leave it out")


def _check_combinations(parser, options):
    """Refuse options that contradict or need one another."""
    if options.warmup_ratio is not None and options.warmup_steps is not None:
        parser.error("--warmup_ratio and --warmup_steps both set the warm-up; give one")
    if bool(options.base_checkpoint) != ("{base}" in (options.prompt or "")):
        given, absent = ("--base_checkpoint", "{base} in --prompt")[:: 1 if options.base_checkpoint else -1]
        parser.error(f"{given}, but no {absent}; give both, or neither")
    beyond = [f"--{name}" for name in ("datastore", "retrieved_captions") if getattr(options, name)]
    if beyond and "{retrieved}" not in (options.prompt or ""):
        parser.error(f'{beyond[0]}, but no {{retrieved}} in --prompt; give, for example, --prompt "{RETRIEVAL_PROMPT}"')
    watching = [f"--{name}" for name in ("patience", "val_every") if getattr(options, name)] + ["--best_by"] * (options.best_by != "loss")
    if watching and not options.val_data:
        parser.error(f"{watching[0]} needs --val_data, the captions to validate on")
    if options.best_by == "cider" and not options.val_captions:
        parser.error("--best_by cider needs captions to score; give --val_captions above 0")
    if options.compile and options.gradient_checkpointing:
        parser.error("--compile and --gradient_checkpointing do not go together; give one")
    if options.only_prefix and options.tune not in (None, "mapper"):
        parser.error(f"--only_prefix is --tune mapper; --tune {options.tune} asks for something else. Give one")
    if options.freeze_mapper and (options.only_prefix or options.tune == "mapper"):
        parser.error("--freeze_mapper leaves nothing to train with --tune mapper. Give another --tune")


def _settle_lora(parser, options, tune):
    """Return rank, alpha, dropout and targets of the adapters; None where there are none."""
    given = {name: getattr(options, f"lora_{name}") for name in LORA if getattr(options, f"lora_{name}") is not None}
    if tune != "lora":
        if given:
            names = ", ".join(f"--lora_{name}" for name in given)
            parser.error(f"{names} without --tune lora, which would have adapters. Add it, or leave them out")
        return None
    if given.get("targets", "all-linear") != "all-linear":
        given["targets"] = [name.strip() for name in given["targets"].split(",") if name.strip()]
        if not given["targets"]:
            parser.error(f"--lora_targets is {options.lora_targets!r}; expected names separated by commas, such as c_attn,c_proj")
    return LORA | given
