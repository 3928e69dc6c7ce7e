"""docs/options.md is what the parsers of the scripts say."""

import argparse
import importlib.util
import re

import pytest

from common import Parser


@pytest.fixture(scope="module")
def make_options(root):
    """docs/make_options.py as a module."""
    spec = importlib.util.spec_from_file_location("make_options", root / "docs" / "make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(make_options):
    """The page as the parsers give it now."""
    return make_options.make_page()


@pytest.fixture(scope="module")
def commands(make_options):
    """Parser and summary of each command."""
    return make_options.find_commands()


def options_of(parser):
    return {name for action in parser._actions if action.dest != "help" for name in action.option_strings}


def test_the_page_is_what_the_parsers_say(page, root):
    written = (root / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == page, "docs/options.md is out of date: run python docs/make_options.py"


def test_the_width_of_the_terminal_changes_nothing(make_options, page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "37")
    assert make_options.make_page() == page


def test_every_script_with_options_has_its_section(commands, root):
    for script in root.glob("*.py"):
        assert script.name in commands or script.name == "common.py"
    assert {"data/download.py", "check.py describe", "python -m models.hub export", "python -m reports.run"} <= set(commands)


def test_every_option_of_every_command_is_in_its_section(make_options, commands, page):
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    assert list(sections) == list(commands)
    anchors = {make_options.heading_anchor(title): title for title in commands}
    for title, (parser, _) in commands.items():
        shown = sections[title] + "".join(sections[anchors[one]] for one in re.findall(r"^As for .*\(#(.*)\)\.$", sections[title], re.M))
        assert options_of(parser) <= set(re.findall(r"`(--?[A-Za-z][\w-]*)`", shown)), title


def test_links_lead_to_headings_of_the_page(make_options, page):
    anchors = {make_options.heading_anchor(heading) for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(.*?)\)", page)) <= anchors


def test_every_row_has_four_cells_and_even_backquotes(page):
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert not [row for row in rows if row.count("`") % 2]


def test_prose_is_at_most_120_characters_wide(page):
    assert not [line for line in page.splitlines() if not line.startswith("|") and len(line) > 120]


@pytest.mark.parametrize("arguments, expected", [
    (dict(help="size of it (default 5; 2 on a CPU)", type=int), ("`--x`", "integer", "5; 2 on a CPU", "size of it")),
    (dict(help="size (default %(default)s), in tokens", type=float, default=0.5), ("`--x`", "number", "`0.5`", "size, in tokens")),
    (dict(help="as --y says", choices=("a", "none"), default="none"), ("`--x`", "`a`, `none`", "`none`", "as `--y` says")),
    (dict(help="use --x none", choices=("a", "none")), ("`--x`", "`a`, `none`", "none", "use `--x none`")),
    (dict(help="write {name}.pkl", action="store_true"), ("`--x`", "", "off", "write `{name}.pkl`")),
    (dict(help="names", nargs="+", metavar="A|B", required=True), ("`--x`", "`A|B` ...", "required", "names")),
    (dict(help="half, a / b or folder/"), ("`--x`", "text", "none", "half, a / b or `folder/`")),
])  # fmt: skip
def test_a_row_says_names_values_default_and_help(make_options, arguments, expected):
    parser = Parser(prog="x.py")
    action = parser.add_argument("--x", **arguments)
    assert make_options.describe_option(action, parser, make_options.code_pattern(parser)) == expected


def test_pipes_in_cells_are_escaped(make_options):
    assert make_options.table_row(["`A|B`", "", "none", "x"]) == r"| `A\|B` | | none | x |"


def test_parsers_are_caught_before_anything_is_read(make_options, workdir):
    assert isinstance(make_options.catch_parser("evaluate"), argparse.ArgumentParser)
    assert list(workdir.iterdir()) == []
