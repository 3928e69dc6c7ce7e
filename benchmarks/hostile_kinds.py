"""The kinds of inputs that benchmarks.hostile draws, and the scripts that each kind is tried on."""

import dataclasses
import json
import random
import re

from benchmarks import hostile_changes as changes
from benchmarks import hostile_media as media
from benchmarks.hostile_forms import PROPER, expect
from benchmarks.hostile_world import ANNOTATIONS, PARSERS, READERS, SCRIPTS, option_names, place_of_output


@dataclasses.dataclass
class Case:
    """One input: what is run, what is changed before, and what must hold after."""

    kind: str
    script: str
    argv: list
    prepare: object = None  # called in the case's folder with the case, whose other fields it may set
    check: object = None  # called there after exit code 0, with the text on stderr; returns what is wrong, or None
    kept: object = None  # the same, called however the run ended
    encoding: str = "utf-8"
    environment: dict = dataclasses.field(default_factory=dict)
    twins: int = 1  # processes that run it at the same time
    interrupt: float = 0.0  # seconds until a signal; the command is then run again
    must_succeed: bool = False
    megabytes: int = 1000  # what the run may take besides the libraries


def _pickles(draw, name):
    return Case("feature pickles", name, SCRIPTS[name], lambda case: changes.change_pickle(draw), megabytes=300)


def _directories(draw, name):
    argv = ["train" if word == "train.pkl" else word for word in SCRIPTS[name]]
    return Case("feature directories", name, argv, lambda case: changes.change_directory(draw), megabytes=300)


def _checkpoints(draw, name):
    argv = [*SCRIPTS[name], *(["--init_from", "out/model-000.pt"] if name == "train.py" else [])]
    return Case("checkpoints", name, argv, lambda case: changes.change_checkpoint(draw))


def _annotations(draw, name):
    return Case("annotations", name, SCRIPTS[name], lambda case: changes.change_annotations(draw, name))


def _references(draw, name):
    def prepare(case):
        path = changes.change_references(draw)
        read = "captions.json" if path in ("captions.json", "clotho.csv") else "said_before.json"
        case.argv = [path if word == read else word for word in case.argv]

    return Case("references and results", name, SCRIPTS[name], prepare)


def _options(draw, name):
    argv = list(SCRIPTS[name])
    for _ in range(draw.randint(1, 3)):
        option, word = draw.choice(option_names(name)), draw.choice(changes.WORDS)
        if name == "data/download.py" and word.startswith("http"):
            word = "file:mirror"  # a server that does not answer is tried for a minute
        argv += [option, *([word] if draw.random() < 0.85 else [])]
    return Case("option values", name, argv, lambda case: changes.place_oddity(draw, "odd.fifo"))


def _media(draw, name):
    folder = {"parse_folder.py": "own", "parse_food.py": "own", "parse_clotho.py": "sounds"}.get(name, "photos")
    argv = [*SCRIPTS[name], *(["--max_skipped", "50%"] if name.startswith("parse_") else [])]
    return Case("pictures and sounds", name, argv, lambda case: media.add_odd_files(draw, folder), expect_valid)


def _shards(draw, name):
    return Case("shards", name, [*SCRIPTS[name], "--max_skipped", "9"], lambda case: media.change_shard(draw))


def _proper(draw, name):
    return Case("people's forms", name, SCRIPTS[name], lambda case: PROPER[name](draw, case), must_succeed=True)


def _outputs(draw, name):
    def prepare(case):
        case.kept = media.place_output(draw, place_of_output(case.argv))

    return Case("output places", name, SCRIPTS[name], prepare)


def _terminals(draw, name):
    encoding = draw.choice(["cp1252", "ascii", "latin-1", "cp437", "shift-jis"])
    return Case("terminals", name, SCRIPTS[name], None, expect_valid, encoding=encoding, must_succeed=True)


def _environments(draw, name):
    environment = draw.choice([
        {"TMPDIR": "nowhere"}, {"TMPDIR": "captions.json"}, {"TMPDIR": "a b\n"}, {"TMPDIR": ""}, {"HOME": "nowhere"}, {"HOME": ""},
        {"LANG": "de_DE.UTF-8", "LC_ALL": "de_DE.UTF-8"}, {"LANG": "tr_TR"}, {"LC_ALL": "C"}, {"LC_ALL": "no_such"}, {"COLUMNS": "1"},
        {"COLUMNS": "x"}, {"COLUMNS": "0", "LINES": "0"}, {"OMP_NUM_THREADS": "x"}, {"TZ": "no/such"}, {"XDG_CACHE_HOME": "captions.json"},
        {"HF_HOME": "captions.json"}, {"MPLCONFIGDIR": "captions.json"}, {"NO_COLOR": "1", "TERM": "dumb"}, {"LANGUAGE": "\udcff"},
    ])  # fmt: skip
    return Case("environments", name, SCRIPTS[name], None, expect_valid, environment=environment)


def _twins(draw, name):
    return Case("simultaneous runs", name, SCRIPTS[name], None, expect_valid, twins=2)


def _interrupted(draw, name):
    argv = [*SCRIPTS[name], *(["--resume"] if name == "train.py" else [])]
    return Case("interrupted runs", name, argv, None, expect_valid, interrupt=draw.uniform(0.02, 1.0))


def expect_valid(said):
    """Say what is missing of the four valid items, and odd ones beside them may be there."""
    wrong = expect(4)(said)
    return wrong if wrong and int(re.search(r"\d+", wrong)[0]) < 4 else None


WITH_OUTPUT = [name for name in SCRIPTS if place_of_output(SCRIPTS[name])]
MAKERS = ["train.py", "predict.py", "parse_folder.py", "parse_coco.py", "parse_clotho.py"]
KINDS = {
    "feature pickles": (20, _pickles, READERS),
    "feature directories": (14, _directories, READERS),
    "checkpoints": (12, _checkpoints, ["train.py", "predict.py", "evaluate.py --data", "models.hub", "reports.run"]),
    "annotations": (14, _annotations, list(ANNOTATIONS)),
    "references and results": (9, _references, ["evaluate.py"]),
    "option values": (16, _options, list(SCRIPTS)),
    "pictures and sounds": (5, _media, ["predict.py", "parse_folder.py", "parse_food.py", "parse_clotho.py"]),
    "shards": (4, _shards, ["parse_conceptual.py"]),
    "people's forms": (6, _proper, list(PROPER)),
    "output places": (6, _outputs, [name for name in WITH_OUTPUT if name != "data/download.py"]),
    "terminals": (2, _terminals, MAKERS),
    "environments": (2, _environments, [*MAKERS, "evaluate.py"]),
    "simultaneous runs": (1, _twins, ["train.py", "predict.py", *PARSERS]),
    "interrupted runs": (1, _interrupted, ["train.py", "predict.py", "parse_coco.py", "parse_folder.py"]),
}


# Left out by --quick: an input of these takes a second and more.
SLOW_KINDS = ("pictures and sounds", "terminals", "environments", "simultaneous runs", "interrupted runs")
SLOW_SCRIPTS = ("train.py", "predict.py", "predict.py --data", "parse_clotho.py")


def draw_case(number, seed, only=(), quick=False):
    """Draw one input; the same arguments give the same one."""
    draw = random.Random(json.dumps([seed, number]))
    kinds = only or [kind for kind in KINDS if not quick or kind not in SLOW_KINDS]
    kind = draw.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    _, make, names = KINDS[kind]
    return make(draw, draw.choice([name for name in names if not quick or name not in SLOW_SCRIPTS])), draw
