"""What makes two runs the same run, what --published sets, and what --help says: held against the parser itself."""

import re

import train
from training.options import LIMITS, NOT_COMPARED, PUBLISHED, build_parser, parse_options

# Options that shape the result, so that --resume compares them. A new option belongs here or into NOT_COMPARED.
COMPARED = {
    "init_parts", "bs", "lr", "published", "mapper_lr", "warmup_ratio", "weight_decay", "clip_grad", "gpt2_dropout", "seed", "accumulate",
    "gradient_checkpointing", "val_every", "val_captions", "best_by", "sampling", "drop_last", "ignore_index", "cut_captions",
}  # fmt: skip


def all_actions():
    return [action for action in build_parser("")._actions if action.dest != "help"]


def test_every_option_is_compared_or_named_as_not_compared():
    settled = vars(parse_options([], ""))
    assert set(settled) - NOT_COMPARED == COMPARED
    assert NOT_COMPARED <= set(settled)


def test_limits_and_published_values_are_of_options_that_exist():
    names = {action.dest for action in all_actions()}
    assert set(LIMITS) <= names
    assert set(PUBLISHED) <= names
    assert {action.dest for action in all_actions() if action.type in (int, float)} - set(LIMITS) == {"ignore_index"}


def test_published_sets_what_was_not_given():
    options = parse_options(["--published", "--sampling=images", "--mixed_precision", "bf16"], "")
    assert {name: getattr(options, name) for name in PUBLISHED} == PUBLISHED | {"sampling": "images", "mixed_precision": "bf16"}
    assert parse_options([], "").sampling == "images"


def test_the_readme_names_the_options_that_published_sets(root):
    """In the table of differences; where a row's option is not part of --published, the row does not name it as restored."""
    rows = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    restored = {name for row in rows for name in re.findall(r"`--(\w+)", row.split("|")[-2]) if name in PUBLISHED}
    assert restored == set(PUBLISHED)


def test_help_says_what_each_option_does_with_its_default(capsys):
    for action in all_actions():
        assert action.help, action.dest
        assert "default" in action.help, action.dest
        assert len(action.help.split()) >= 5, action.dest
    try:
        train.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    said = capsys.readouterr().out
    assert said.isascii()
    assert said.startswith("usage: train.py [options]\n")
    assert said.count("python train.py") >= 2
    groups = re.findall(r"^([a-z][a-z ]+):$", said, re.M)
    expected = ["data and output", "model", "what is trained", "training", "validation", "saving and resuming", "speed and memory",
                "fidelity to the published code", "retrieval and training on texts"]  # fmt: skip
    assert [group for group in groups if group != "options"] == expected
