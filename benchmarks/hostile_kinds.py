"""The kinds of inputs that benchmarks.hostile draws, and the scripts that each kind is tried on."""

import importlib
import io
import json
import os
import random
import re
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks import hostile_cases as cases
from benchmarks.hostile_cases import SCRIPTS, Case

READERS = ["train.py", "predict.py --data", "evaluate.py --data", "check.py", "check.py describe"]
PARSERS = [name for name in SCRIPTS if name.startswith("parse_")]
ANNOTATIONS = {"parse_coco.py": "captions.json", "parse_flickr.py": "flickr.csv", "parse_clotho.py": "clotho.csv",
               "parse_conceptual.py --tsv": "cc.tsv", "parse_conceptual.py": "shard.tar", "parse_huggingface.py": "rows.parquet",
               "parse_folder.py": "own/metadata.csv", "parse_food.py": "own/Captions.csv"}  # fmt: skip


def complete(said):
    """What is missing from the output that a script wrote from the four valid items; None where nothing is."""
    if os.path.exists("said.json"):
        found = len(json.loads(Path("said.json").read_text(encoding="utf-8")))
    elif os.path.exists("new.pkl"):
        from features.store import load_features

        found = len(load_features("new.pkl").captions)
    elif os.path.exists("run"):
        found = 4 * bool(sorted(Path("run").glob("*-000.pt")))
    else:
        found = 0
    return None if found >= 4 else f"{found} of 4 items in the output"


def _features(draw, name):
    return Case("feature pickles", name, SCRIPTS[name], lambda: cases.change_pickle(draw))


def _directories(draw, name):
    argv = ["train" if word == "train.pkl" else word for word in SCRIPTS[name]]
    return Case("feature directories", name, argv, lambda: cases.change_directory(draw))


def _checkpoints(draw, name):
    argv = [*SCRIPTS[name], *(["--init_from", "out/model-000.pt"] if name == "train.py" else [])]
    return Case("checkpoints", name, argv, lambda: cases.change_checkpoint(draw))


def _annotations(draw, name):
    path = ANNOTATIONS[name]

    def prepare():
        if path.startswith("own/"):
            column = "file_name" if name == "parse_folder.py" else "Index"
            cases.write_table(path, [[column, "caption"], *([f"{number}.jpg", cases.TEXTS[number]] for number in range(4))])
        change = cases.change_json_file if path.endswith(".json") else cases.change_text_file
        (cases.change_bytes if path.endswith((".tar", ".parquet")) else change)(draw, path)

    return Case("annotations", name, SCRIPTS[name], prepare)


def _references(draw, name):
    path = draw.choice(["captions.json", "said_before.json"])
    return Case("references and results", name, SCRIPTS[name], lambda: cases.change_json_file(draw, path))


def _options(draw, name):
    argv = list(SCRIPTS[name])
    for _ in range(draw.randint(1, 3)):
        option, word = draw.choice(option_names(name)), draw.choice(cases.WORDS)
        argv += [option, *([word] if draw.random() < 0.85 else [])]
    return Case("option combinations", name, argv)


def _files(draw, name):
    folder = {"parse_folder.py": "own", "parse_food.py": "own", "parse_clotho.py": "sounds"}.get(name, "photos")
    argv = [*SCRIPTS[name], *(["--max_skipped", "50%"] if name.startswith("parse_") else [])]
    return Case("pictures and sounds", name, argv, lambda: cases.add_odd_files(draw, folder), complete)


def _outputs(draw, name):
    argv = SCRIPTS[name]
    place = argv[argv.index("--out_dir" if name == "train.py" else "--out") + 1]
    state = {}
    return Case("output places", name, argv, lambda: state.update(check=cases.place_output(draw, place)), lambda said: state["check"](said))


def _terminals(draw, name):
    return Case("terminals", name, SCRIPTS[name], None, complete, draw.choice(["cp1252", "ascii", "latin-1", "cp437"]))


def _twins(draw, name):
    return Case("simultaneous runs", name, SCRIPTS[name], None, complete, twins=2)


def _interrupted(draw, name):
    argv = [*SCRIPTS[name], *(["--resume"] if name == "train.py" else [])]
    return Case("interrupted runs", name, argv, None, complete, interrupt=draw.uniform(0.02, 1.0))


KINDS = {
    "feature pickles": (24, _features, READERS),
    "feature directories": (10, _directories, READERS),
    "checkpoints": (14, _checkpoints, ["train.py", "predict.py", "evaluate.py --data", "models.hub", "reports.run"]),
    "annotations": (16, _annotations, list(ANNOTATIONS)),
    "references and results": (8, _references, ["evaluate.py"]),
    "option combinations": (16, _options, list(SCRIPTS)),
    "pictures and sounds": (8, _files, ["predict.py", "parse_folder.py", "parse_food.py", "parse_clotho.py"]),
    "output places": (6, _outputs, ["train.py", "predict.py", "evaluate.py", "reports.run", *PARSERS]),
    "terminals": (4, _terminals, ["train.py", "predict.py", "parse_folder.py", "parse_coco.py", "parse_clotho.py"]),
    "simultaneous runs": (2, _twins, ["train.py", "predict.py", "parse_coco.py", "parse_folder.py"]),
    "interrupted runs": (2, _interrupted, ["train.py", "predict.py", "parse_coco.py", "parse_folder.py"]),
}


def draw_case(number, seed, only=()):
    """Draw one input; the same number and seed give the same one."""
    draw = random.Random(f"{seed}/{number}")
    kinds = only or list(KINDS)
    kind = draw.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    _, make, names = KINDS[kind]
    return make(draw, draw.choice(names)), draw


def load_script(name):
    """Import what runs under this name."""
    return importlib.import_module(name.split()[0].removesuffix(".py").replace("/", "."))


_option_names = {}


def option_names(name):
    """List the options that a script's --help names."""
    if name not in _option_names:
        text = io.StringIO()
        with redirect_stdout(text):
            try:
                load_script(name).main([*(["describe"] if name == "models.hub" else []), "--help"])
            except SystemExit:
                pass
        _option_names[name] = sorted(set(re.findall(r"(?<![\w-])--\w+", text.getvalue())) - {"--help"}) or ["--x"]
    return _option_names[name]
