"""Every recipe runs to its end, in a real bash, on a miniature of its data set with miniature models."""

import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

import miniatures
import tiny
import tiny_towers
from helpers import error_line
from training import launch

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
NAMES = [path.stem for path in RECIPES]
TWO_PARTS = ("food", "flickr8k_small")
LONG = ("tini_tiny", "instagram_full", "instagram_head")  # TinyViT has no small form; the others differ little from those that stay
FAST = {"RECIPE_SMOKE": "1", "METRICS": "bleu rouge cider", "DATASET": "instagram"}
FAST |= {
    "TRAIN": "data/flickr30k/flickr30k_images/results.csv",
    "ENCODER": "ViT-B/32",
    "LANGUAGE_MODEL": "gpt2",
    "PROCESSES": "1",
}  # of flickr8k_small
# What a recipe calls in place of Python: it hands its words to this process, which has torch loaded, and waits for the exit code.
STAND_IN = """#!/bin/bash
printf '%s\\0' "$@" > "$RECIPE_CALLS/words"
echo > "$RECIPE_CALLS/call"
read -r code < "$RECIPE_CALLS/answer"
exit "$code"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with data/ as the recipes want it: data sets of a handful of items, and small random models under all names used."""
    folder = tmp_path_factory.mktemp("recipes")
    weights = folder / "data/weights"
    tiny.save_clip(weights / "ViT-B-32.pt", 512, "vit")
    tiny.save_clip(weights / "RN50x4.pt", 640, "resnet")
    tiny_towers.save_hf_clip(weights / "openai/clip-vit-base-patch32")
    for name in ("gpt2", "distilgpt2"):
        tiny.save_gpt2(weights / name, width=miniatures.WIDTH, layers=2, heads=miniatures.HEADS, positions=420)
    for seed, name in enumerate(("coco", "conceptual")):
        miniatures.save_published_mlp(weights / f"{name}_weights.pt", weights / "gpt2", seed)
    miniatures.save_coco_karpathy(folder)
    miniatures.save_food(folder)
    miniatures.save_clotho(folder)
    miniatures.save_flickr(folder)
    miniatures.save_instagram(folder)
    return folder


class Bash:
    """Runs a recipe in bash; every `python X.py …` in it is X.main([…]) here. `commands` lists (words, exit code) of what it called."""

    def __init__(self, tree, folder):
        self.tree, self.folder, self.commands = tree, folder, []
        stand_in = folder / "bin/python"
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        for name in ("call", "answer"):
            os.mkfifo(folder / name)

    def run(self, recipe, **environment):
        """→ the exit code of the recipe."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, **FAST, "PATH": path, "RECIPE_CALLS": str(self.folder), **environment}
        pipes = [os.open(self.folder / name, os.O_RDWR) for name in ("call", "answer")]  # both ways: opening does not wait for bash
        bash = subprocess.Popen(["bash", str(recipe)], cwd=self.tree, env=environment, start_new_session=True)
        try:
            while bash.poll() is None:
                if select.select([pipes[0]], [], [], 0.02)[0]:
                    os.read(pipes[0], 100)
                    words = (self.folder / "words").read_bytes().decode().split("\0")[:-1]
                    code = call(words)
                    self.commands.append((words, code))
                    os.write(pipes[1], f"{code}\n".encode())
        finally:
            if bash.poll() is None:  # something here went wrong: end it, and the command in it that waits for an answer
                os.killpg(bash.pid, signal.SIGKILL)
                bash.wait()
            for pipe in pipes:
                os.close(pipe)
        return bash.returncode


def call(words):
    """Run "X.py …" or "-m X …" in this process, in the working directory → its exit code."""
    name, *words = words[1:] if words[0] == "-m" else words
    try:
        return importlib.import_module(name.removesuffix(".py")).main(words)
    except SystemExit as end:
        return end.code


@pytest.fixture
def bash(tree, tmp_path, monkeypatch):
    """A Bash whose commands run in the tree, without Java's start-up."""
    import evaluation.tokens

    monkeypatch.chdir(tree)
    monkeypatch.setattr(evaluation.tokens, "java_is_here", lambda: False)
    return Bash(tree, tmp_path)


def scores_of(tree, name):
    """What a recipe's last command wrote → dict."""
    (path,) = (tree / "checkpoints" / f"smoke_{name}").glob("*.predictions.json")
    return json.loads(path.with_name(path.name.replace(".predictions", "")).read_text())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES])
def test_a_recipe_runs_to_its_end(bash, tree, name):
    if name == "tini_tiny":
        tiny.save_tinyvit(tree / "data/weights/tinyvit")
    assert bash.run(ROOT / f"recipes/{name}.sh") == 0, bash.commands
    called = [words for words, _ in bash.commands if words[0] not in ("predict.py", "-m")]
    averaged = [words[1] for words, _ in bash.commands if words[0] == "-m"]
    assert averaged == (["models.average"] if name == "flickr8k_small" else [])
    assert [words[0] for words in called[-3:]] == ["check.py", "train.py", "evaluate.py"]
    checked = dict((words[0], code) for words, code in bash.commands)["check.py"]
    assert checked == (1 if name.startswith("instagram") else 0), "posts are long, which is a problem; nothing else here is one"
    trained, scored = called[-2:]
    assert (scored[scored.index("--data") + 1] in trained) == (name in TWO_PARTS), "the others have a third part"
    scores = scores_of(tree, name)["scores"]
    assert {"BLEU-4", "ROUGE-L", "CIDEr"} <= set(scores)
    assert all(0 <= scores[name] < 100 for name in scores)
    config = json.loads((tree / f"checkpoints/smoke_{name}/coco_prefix.json").read_text())["model"]
    expected = {
        "coco_mlp": {"mapping_type": "mlp", "tune": "full", "prefix_length": 10, "encoder": "ViT-B/32"},
        "coco_transformer": {"mapping_type": "transformer", "tune": "mapper", "clip_length": 40, "normalize_prefix": True},
        "tini_tiny": {"encoder": "tinyvit", "gpt2_type": "distilgpt2", "tune": "full", "num_layers": 8, "prefix_length": 40},
        "flickr30k": {"mapping_type": "encoder", "tune": "ends", "prefix_length": 4, "num_layers": 6},
        "instagram_lora": {"tune": "lora", "lora": {"rank": 16, "alpha": 16.0, "dropout": 0.1, "targets": ["c_attn", "c_proj", "c_fc"]}},
        "flickr8k_small": {"mapping_type": "linear", "tune": "lora", "encoder": "ViT-B/32"},
        "instagram_head": {"tune": "head", "freeze_mapper": True},
        "instagram_prompt": {"prompt": " is a picture of {base} and a social media post would caption it "},
    }.get(name, {"mapping_type": "mlp", "tune": "full"})
    assert {key: config[key] for key in expected} == expected


def test_a_recipe_started_again_makes_nothing_twice(bash, capsys):
    for _ in range(2):
        before = len(bash.commands)
        assert bash.run(ROOT / "recipes/food.sh") == 0
    assert [words[0] for words, _ in bash.commands[before:]] == ["check.py", "train.py", "evaluate.py"]
    assert "this run is finished" in capsys.readouterr().out


def test_a_recipe_stops_at_a_problem_or_a_failing_command(bash, monkeypatch):
    import check
    import train

    monkeypatch.setattr(check, "main", lambda words: 1)
    monkeypatch.setattr(train, "main", lambda words: 3)
    for told, code, last in (({}, 1, "check.py"), ({"GO_ON": "1"}, 3, "train.py")):
        assert bash.run(ROOT / "recipes/food.sh", **told) == code
        assert bash.commands[-1][0][0] == last


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_says_what_it_is(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert os.access(recipe, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    for heading in ("Goal", "Hardware", "Data", "Published", "Ours", "Otherwise"):
        assert re.search(rf"^# {heading} +\S", text, re.MULTILINE), heading
    assert f"bash recipes/{recipe.name} " in text
    assert "RECIPE_SMOKE" in text
    assert all(len(line) <= 140 for line in text.splitlines())
    assert f"`{recipe.name}`" in (ROOT / "recipes/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "data"), [("food", "food"), ("flickr8k_small", "flickr30k")])
def test_a_recipe_runs_with_the_real_python(tree, tmp_path, recipe, data):
    """flickr8k_small trains in two processes then."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "data").mkdir()
    for name in (data, "weights"):
        (tmp_path / "data" / name).symlink_to(tree / "data" / name)
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    environment = {**os.environ, **FAST, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", str(ROOT / f"recipes/{recipe}.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("2 process(es)" in done.stdout) == (recipe == "flickr8k_small")
    assert scores_of(tmp_path, recipe)["scores"]["BLEU-1"] >= 0


@pytest.mark.parametrize("words", [[], ["2"], ["0", "train.py"], ["-1", "train.py"], ["two", "train.py"]])
def test_a_number_of_processes_that_is_none_is_refused_in_one_line(capsys, words):
    assert "expected a number of processes and a script" in error_line(launch.main, capsys, words)


NAMELESS = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [[], NAMELESS], ids=["named", "nameless"])
def test_a_mistake_in_two_processes_ends_in_its_line_and_exit_code(machine):
    if machine and (not shutil.which("unshare") or subprocess.run([*machine, "true"], capture_output=True).returncode):
        pytest.skip("this machine lets no process change its name")
    command = [*machine, sys.executable, "-m", "training.launch", "2", "train.py", "--nonsense"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # then Python writes every piece of a line by itself
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("train.py: error: unrecognized arguments: --nonsense") for line in lines), done.stderr
    assert len(lines) <= 4, done.stderr  # torchrun says thirty; torch may warn of a network that it dislikes
    assert "Traceback" not in done.stderr and "Root Cause" not in done.stderr, done.stderr
