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
PACKAGES = ("models", "features", "reports", "evaluation", "training", "prediction", "demo", "benchmarks")
# Who may import what of ours, besides itself and common. Scripts may import the packages, not one another.
ALLOWED = {
    "models": {"features"},
    "reports": set(),
    "features": set(),
    "training": {"models", "features", "reports", "evaluation"},
    "prediction": {"models", "features", "reports", "evaluation"},
    "evaluation": {"models", "features", "reports", "prediction"},
    "demo": {"models", "features", "reports"},
    "benchmarks": {"models", "features", "reports", "training", "demo"},
}


def imports_of(path):
    """Every top-level module name that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def pins(text):
    return [line.strip().removeprefix("- ") for line in text.splitlines() if re.match(r"\s*(- )?[\w.-]+==", line)]


@pytest.mark.parametrize("package", [name for name in PACKAGES if (ROOT / name).is_dir()])
def test_imports_run_one_way(package):
    ours = set(PACKAGES) | {Path(script).stem for script in SCRIPTS}
    for path in (ROOT / package).rglob("*.py"):
        beyond = (imports_of(path) & ours) - ALLOWED[package] - {package}
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    others = {Path(other).stem for other in SCRIPTS if other != script}
    assert not imports_of(ROOT / script) & (others - ({"parse_folder"} if script == "parse_food.py" else set()))


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
    assert "name: clip_prefix_caption" in environment and "python=3.11" in environment and "openjdk" in environment


def test_nothing_here_shadows_an_installed_package():
    names = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for pin in pins((ROOT / "requirements.txt").read_text()):
        name = pin.split("==")[0].lower()
        module = {"clip-anytorch": "clip", "scikit-image": "skimage", "pillow": "PIL", "open_clip_torch": "open_clip"}.get(name, name)
        if name in ("ruff", "setuptools"):
            continue
        assert module not in names
        spec = importlib.util.find_spec(module)
        assert spec is not None and "site-packages" in str(spec.origin or list(spec.submodule_search_locations)), pin


def test_no_file_holds_two_things():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "data"} & set(path.relative_to(ROOT).parts):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, path


OTHERS_OPTIONS = {"id", "local-dir", "repo-type"}  # of gdown and hf, named in the docs


def test_the_readme_is_short_and_the_options_it_and_the_docs_name_exist():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    sources = "".join((ROOT / script).read_text() for script in SCRIPTS)
    sources += "".join(path.read_text() for package in (*PACKAGES, "data") for path in (ROOT / package).glob("*.py"))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8"))) - OTHERS_OPTIONS:
            assert f'"--{option}"' in sources, f"{page.name} names --{option}, which no script has"
