"""The files around the code, held against the tree: workflow, issue templates, Dockerfile, citation, changelog, contributing."""

import fnmatch
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def make_targets():
    """Targets that the Makefile names as such."""
    return set(re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[1].split())


def made_in(commands):
    """Targets of the make commands in a text."""
    return set(re.findall(r"(?:^|[`;&] *)make +([a-z][a-z-]*)", commands, re.MULTILINE))


def scripts_in(text):
    """Scripts and modules that a text runs or names, as paths."""
    modules = {one.replace(".", "/") + ".py" for one in re.findall(r"python -m (\w+\.\w+)", text)}
    return modules | set(re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.(?:py|md|txt))\b", text)) - {"unpinned.txt"}


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def jobs(workflow):
    return workflow["jobs"]


@pytest.fixture(scope="module")
def commands(jobs):
    """What each job runs, as one text."""
    return {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def dockerfile():
    """The Dockerfile's instructions, as pairs of name and arguments."""
    text = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def test_the_workflow_runs_for_changes_and_every_night(workflow):
    events = workflow[True]  # YAML 1.1 reads `on` as true
    assert {"push", "pull_request", "schedule"} <= set(events)
    minute, hour, *rest = events["schedule"][0]["cron"].split()
    assert 0 <= int(minute) < 60 and 0 <= int(hour) < 24 and rest == ["*", "*", "*"]


def test_jobs_have_an_end_and_actions_a_version(jobs):
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 60, name
        assert job["steps"][0]["uses"].startswith("actions/checkout@v"), name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


def test_pythons_of_the_workflow_are_those_the_project_supports(jobs):
    versions = jobs["tests"]["strategy"]["matrix"]["python"]
    oldest = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"].removeprefix(">=")
    assert versions == [oldest, "3.12"]
    containers = [job["container"] for job in jobs.values() if "container" in job]
    assert containers and {re.fullmatch(r"python:(.*)-bookworm", one)[1] for one in containers} <= {*versions, "${{ matrix.python }}"}


def test_what_the_workflow_runs_exists(commands):
    targets, scripts = made_in("\n".join(commands.values())), scripts_in("\n".join(commands.values()))
    assert {"setup", "test"} <= targets <= make_targets()
    assert {"requirements.txt", "predict.py"} <= scripts
    assert not [name for name in scripts if not (ROOT / name).is_file()]
    assert "ruff check ." in commands["lint"] and "ruff check ." in read("Makefile")
    for name in ("tests", "unpinned"):
        assert re.search(r"apt-get install .*default-jre-headless chromium", commands[name]), name


def test_commands_of_the_workflow_are_bash(workflow, commands):
    assert workflow["defaults"]["run"]["shell"] == "bash"
    for name, text in commands.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0, name


def test_the_nightly_job_alone_takes_the_newest_libraries(jobs, commands):
    assert "github.event_name == 'schedule'" in jobs["unpinned"]["if"]
    assert all(job["if"] == "github.event_name != 'schedule'" for name, job in jobs.items() if name != "unpinned")
    unpin = next(line for line in commands["unpinned"].splitlines() if line.startswith("sed ")).partition(" > ")[0]
    left = subprocess.run(unpin, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.partition("==")[0] for line in read("requirements.txt").splitlines() if "==" in line] == [
        line.partition("==")[0] for line in left.splitlines() if not line.startswith("#")
    ]
    assert [line for line in left.splitlines() if "==" in line] == re.findall(r"^setuptools==.*$", read("requirements.txt"), re.MULTILINE)
    test_command = re.search(r"\$\(BIN\)/python (-m pytest -m \"not slow\")", read("Makefile"))[1]
    assert test_command in commands["unpinned"]


def test_the_lint_job_installs_the_pinned_ruff(commands):
    find = re.search(r"\$\((grep .*?)\)\"", commands["lint"])[1]
    found = subprocess.run(find, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"ruff==[\d.]+\n", found)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms_that_name_what_exists(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert fields and len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)
    names = scripts_in(path.read_text(encoding="utf-8"))
    assert names and not [name for name in names if not (ROOT / name).is_file()]


def test_there_is_a_template_for_bugs_and_one_for_questions():
    assert [path.name for path in TEMPLATES] == ["bug.yml", "question.yml"]


def test_the_dockerfile_begins_with_a_supported_python(dockerfile, jobs):
    name, image = dockerfile[0]
    assert name == "FROM" and re.fullmatch(r"python:(.*)-bookworm", image)[1] in jobs["tests"]["strategy"]["matrix"]["python"]
    assert {name for name, _ in dockerfile} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}


def test_the_dockerfile_sets_up_and_runs_the_demo_with_what_it_has_copied(dockerfile):
    copied, targets, whole = set(), [], False
    for name, words in dockerfile:
        if name == "COPY":
            *sources, _ = words.split()
            copied |= set(sources)
            whole |= "." in sources
        if name == "RUN":
            made = made_in(words)
            assert not made or "Makefile" in copied
            assert "setup" not in made or {"requirements.txt", ".ci/install.py"} <= copied
            assert "demo" not in made or whole
            targets += made
    assert targets == ["setup", "demo"] and set(targets) <= make_targets()
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_starts_scripts_with_the_python_that_was_set_up(dockerfile):
    said = dict(dockerfile)  # the last of each
    assert said["ENV"] == f"PATH={said['WORKDIR']}/.venv/bin:$PATH"
    assert json.loads(said["ENTRYPOINT"]) == ["python"]
    script, *_ = json.loads(said["CMD"])
    assert (ROOT / script).is_file()
    comments = "\n".join(re.findall(r"^#.*$", read("Dockerfile"), re.MULTILINE))
    assert not [name for name in scripts_in(comments) if not (ROOT / name).is_file()]


def is_left_out(name):
    """Whether .dockerignore leaves out a file; its last pattern that matches decides."""
    left_out = False
    for pattern in read(".dockerignore").split():
        plain = pattern.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in pattern[:4]
        parts = name.split("/")
        candidates = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)] + (parts if anywhere else [])
        if any(fnmatch.fnmatchcase(one, plain) and (anywhere or one.count("/") == plain.count("/") or "**" in plain) for one in candidates):
            left_out = not pattern.startswith("!")
    return left_out


def test_the_image_gets_the_code_and_no_environment_data_or_weights():
    fixture = "tests/data/before_the_new_layout/train.pkl"
    for name in ("Makefile", "requirements.txt", "train.py", "data/download.py", "data/README.md", "demo/run.py", fixture):
        assert (ROOT / name).is_file() and not is_left_out(name), name
    for name in ".venv/bin/python .git/HEAD data/demo/train.pkl coco_train/x.json x.pt a/b/x.pkl models/__pycache__/x.pyc".split():
        assert is_left_out(name), name


def test_the_citation_agrees_with_the_project_and_names_the_paper():
    citation, project = yaml.safe_load(read("CITATION.cff")), tomllib.loads(read("pyproject.toml"))["project"]
    assert (citation["title"].lower(), citation["type"]) == (project["name"], "software")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["abstract"] == project["description"]
    (paper,) = citation["references"]
    assert f"*{paper['title']}*, {paper['journal']}, {paper['year']}" in read("README.md")
    assert ", ".join(author["family-names"] for author in paper["authors"]) in read("README.md")
    assert paper["url"].rpartition("/")[2] == "2111.09734" in paper["identifiers"][0]["value"]


def test_the_changelog_names_every_script():
    text = read("CHANGELOG.md")
    assert text.startswith("# Changelog\n\n## Unreleased\n")
    scripts = {path.name for path in ROOT.glob("*.py")} - {"common.py"}
    for name in {*scripts, "data/download.py", "python -m models.average", "python -m models.hub", "python -m reports.run"}:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_targets_that_a_page_names_exist(page):
    text = read(page)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links and not [link for link in links if not (ROOT / link).exists()]
    folders = re.findall(r"`((?:\.?\w+/)+)`", text)
    assert folders and not [folder for folder in folders if not (ROOT / folder).is_dir()]
    assert not [name for name in scripts_in(text) - {"parse_NAME.py"} if not (ROOT / name).is_file()]
    assert made_in(text) <= make_targets()
    assert max(map(len, text.splitlines())) <= 120


def test_contributing_is_one_page():
    text = read("CONTRIBUTING.md")
    assert len(text.splitlines()) <= 70
    assert {"setup", "lint", "test"} <= made_in(text) and "docs/architecture.md" in text
