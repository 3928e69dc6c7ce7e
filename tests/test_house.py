"""The house itself: who imports whom, what is pinned where, how fast scripts answer, how long files are."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "common.py")
PACKAGES = ("models", "features", "reports", "evaluation", "training", "prediction", "page", "demo", "benchmarks")
# Who may import what of ours, besides itself and common. Scripts may import the packages, not one another.
ALLOWED = {
    "features": (),
    "reports": ("features.schema", "features.image_ids"),
    "models": ("features.encoder_names", "features.schema"),
    "prediction": ("models", "features", "reports"),
    "page": ("models", "features", "reports", "prediction"),
    "evaluation": ("models", "features", "reports", "prediction"),
    "training": ("models", "features", "reports", "evaluation"),
    "demo": ("models", "features", "reports", "evaluation"),
    "benchmarks": ("models", "features", "reports", "training", "evaluation", "demo"),
}


def find_modules():
    """Map the name of every module of ours to its file."""
    modules = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = path
    return modules


def imports_of(path, modules):
    """The modules of ours that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            whole = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            found.add(next((one for one in whole if one in modules), None))
    return found - {None}


def find_circles(graph):
    """Groups of modules that import one another, directly or through others (Tarjan 1972)."""
    order, lowest, stack, circles = {}, {}, [], []

    def visit(module):
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == order[module]:
            circle = [stack.pop()]
            while circle[-1] != module:
                circle.append(stack.pop())
            if len(circle) > 1:
                circles.append(circle)

    for module in graph:
        if module not in order:
            visit(module)
    return circles


MODULES = find_modules()


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert sorted(map(sorted, find_circles(graph))) == [["b", "c"], ["e", "f"]]


def test_no_two_modules_import_each_other():
    assert find_circles({name: imports_of(path, MODULES) - {name} for name, path in MODULES.items()}) == []


def is_allowed(module, package):
    begins = (*ALLOWED[package], package, "common")
    return any(module == one or module.startswith(one + ".") for one in begins)


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in ALLOWED])
def test_imports_run_one_way(module):
    beyond = {other for other in imports_of(MODULES[module], MODULES) if not is_allowed(other, module.split(".")[0])}
    assert not beyond


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    others = {Path(other).stem for other in SCRIPTS} - {Path(script).stem} - ({"parse_folder"} if script == "parse_food.py" else set())
    assert not imports_of(ROOT / script, MODULES) & others


def longest_functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.end_lineno - node.lineno + 1, node.name


def test_no_function_is_longer_than_a_screen():
    found = {f"{name}.{function}": lines for name, path in MODULES.items() for lines, function in longest_functions(path)}
    assert {name: lines for name, lines in found.items() if lines >= 80 and not name.startswith("benchmarks.")} == {}


def pins(text):
    return [line.strip().removeprefix("- ") for line in text.splitlines() if re.match(r"\s*(- )?[\w.-]+==", line)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_without_heavy_imports(script):
    code = (
        f"import sys, {Path(script).stem} as script\n"
        "try: script.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'accelerate', 'skimage', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " + script in done.stdout


def test_conda_environment_has_the_pinned_packages():
    environment = (ROOT / "environment.yml").read_text()
    assert pins(environment) == pins((ROOT / "requirements.txt").read_text())
    assert "name: clip_prefix_caption" in environment
    assert "python=3.11" in environment
    assert "openjdk" in environment


IMPORTED_AS = {
    "clip-anytorch": "clip", "faiss-cpu": "faiss", "open_clip_torch": "open_clip", "pillow": "PIL", "pytest-xdist": "xdist",
    "scikit-image": "skimage",
}  # fmt: skip


def test_nothing_here_shadows_an_installed_package():
    names = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for pin in pins((ROOT / "requirements.txt").read_text()):
        name = pin.split("==")[0].lower()
        module = IMPORTED_AS.get(name, name)
        if name in ("ruff", "setuptools"):
            continue
        assert module not in names
        spec = importlib.util.find_spec(module)
        assert spec is not None, pin
        assert "site-packages" in str(spec.origin or list(spec.submodule_search_locations)), pin


def test_no_file_holds_two_things():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "data"} & set(path.relative_to(ROOT).parts):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, path


# Options of other programs that the docs name: gdown and hf; torchrun and accelerate; Slurm; img2dataset and clip-retrieval.
OTHERS_OPTIONS = set(
    "id local-dir repo-type nnodes nproc_per_node rdzv_backend rdzv_endpoint rdzv_id cpu num_processes "
    "nodes ntasks-per-node gpus-per-node cpus-per-task requeue url_list input_format url_col caption_col output_format output_folder "
    "processes_count thread_count image_size input_dataset clip_model enable_metadata".split()
)


def test_the_readme_is_short_and_the_options_it_and_the_docs_name_exist():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    sources = "".join((ROOT / script).read_text() for script in SCRIPTS)
    sources += "".join(path.read_text() for package in (*PACKAGES, "data") for path in (ROOT / package).glob("*.py"))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8"))) - OTHERS_OPTIONS:
            assert f'"--{option}"' in sources, f"{page.name} names --{option}, which no script has"
