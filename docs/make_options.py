"""Write docs/options.md, the table of all options, from the parsers of the scripts.

    python docs/make_options.py

tests/test_options_page.py fails while the page differs from the parsers.
"""

import argparse
import importlib
import re
import sys
import textwrap
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Parser, replace_file  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
FIRST = ("train", "predict", "evaluate", "check", "parse_coco")  # scripts that stand first; the others follow by name
MODULES = {"data.download": "data/download.py"} | {name: f"python -m {name}" for name in ("models.average", "models.hub", "reports.run")}
COMMANDS = {"check": ("describe",)}  # first words that a script takes before it builds its parser
HEADING = ("option", "values", "default", "what it does")
DEFAULT = re.compile(r" *\(default:? ([^()]*(?:\([^()]*\)[^()]*)*)\)")
WORDS = {"off", "none", "all", "never", "required"}  # defaults that are words, not values
# Words with characters that Markdown would take for its own, addresses, folders with their slash, and file names.
CODE = r"[^\s`()\"';]*(?:[_{}<>*|]|://|(?<=\w)/(?=[,;]?(?:[\s)]|$))|\.[a-z]{2,6}\b)[^\s`()\"';]*?"
ABOUT = """# All options

`python docs/make_options.py` generates this page from the parsers of the scripts, and a test compares the two. Options
stand in the groups that `-h` shows. `...` after a value means one or more values. Where a default is "as above", the
text that `-h` prints above the options describes it.
"""


class _Caught(Exception):
    """Carries a parser out of the script that built it."""


def catch_parser(module, words=()):
    """Run a script's main up to the point where it would parse its options. Returns the parser."""

    def stop(parser, args=None, namespace=None):
        raise _Caught(parser)

    main = importlib.import_module(module).main
    with mock.patch.object(Parser, "parse_args", stop):
        try:
            main(list(words))
        except _Caught as caught:
            return caught.args[0]
    raise AssertionError(f"main of {module} built no parser")


def find_commands():
    """Map each command, as it is typed, to its parser and its summary; subcommands stand one by one."""
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"common"}
    commands = {}
    for module in (*FIRST, *sorted(scripts - set(FIRST)), *MODULES):
        title = MODULES.get(module, f"{module}.py")
        parsers = {"": catch_parser(module)} | {f" {word}": catch_parser(module, [word]) for word in COMMANDS.get(module, ())}
        inner = next((action for action in parsers[""]._actions if isinstance(action, argparse._SubParsersAction)), None)
        if inner:
            for action in inner._choices_actions:
                commands[f"{title} {action.dest}"] = inner.choices[action.dest], action.help
        else:
            commands |= {title + word: (parser, parser.description.strip().split("\n\n")[0]) for word, parser in parsers.items()}
    return commands


def code_pattern(parser):
    """Make the pattern of what stands between backquotes in a parser's texts: options, also with a value, and what CODE says."""
    chosen = [f"{name} (?:{'|'.join(map(re.escape, action.choices))})" for action in parser._actions if action.choices
              for name in action.option_strings]  # fmt: skip
    words = "|".join([*(one + r"\b" for one in chosen), r"--[a-z][\w-]*(?: \d+| [.](?= ))?", CODE])
    return re.compile(rf"(?<![\w`])({words})(?=[.,:;]*(?:[\s()\"';]|$))")


def describe_option(action, parser, pattern):
    """Describe an option in the four cells of its row; pattern: of code in texts."""
    names = action.option_strings or [str(action.metavar or action.dest)]
    if action.nargs == 0:
        values = ""
    elif action.choices and not action.metavar:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        plain = {int: "integer", float: "number"}.get(action.type, "text")
        values = (f"`{action.metavar}`" if action.metavar else plain) + (" ..." if action.nargs in ("+", "*") else "")
    text = " ".join((action.help or "").split()) % (vars(action) | {"prog": parser.prog})
    stated = DEFAULT.search(text)
    if stated:
        text, default = text[: stated.start()] + text[stated.end() :], stated[1]
    elif action.nargs == 0:
        default = "off"
    elif action.required if action.option_strings else action.nargs not in ("*", "?"):
        default = "required"
    else:
        default = "none" if action.default in (None, []) else str(action.default)
    is_value = " " not in default and (default not in WORDS or default == action.default)
    default = f"`{default}`" if is_value else pattern.sub(r"`\1`", default)
    return ", ".join(f"`{name}`" for name in names), values, default, pattern.sub(r"`\1`", text)


def table_row(cells):
    """Write a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells).replace("|  |", "| |") + " |"


def describe_command(title, parser, summary, seen):
    """Describe a command group by group, as lines of Markdown.

    Args:
        title: the command as it is typed.
        parser: its parser.
        summary: what it does.
        seen: dict from a group's text to the command that has shown it; groups of this command are added.

    Returns:
        list of lines. A group that another command has shown is a reference to that one.
    """
    pattern = code_pattern(parser)
    lines = [f"## {title}", "", *textwrap.wrap(pattern.sub(r"`\1`", summary), 120), ""]
    for group in parser._action_groups:
        rows = [describe_option(action, parser, pattern) for action in group._group_actions if action.dest != "help"]
        if not rows:
            continue
        about = [pattern.sub(r"`\1`", group.description), ""] if group.description else []
        body = [*about, table_row(HEADING), "|---" * len(HEADING) + "|", *map(table_row, rows)]
        shown_by = seen.setdefault("\n".join((group.title, *body)), title)
        lines += [f"### {group.title}", ""]
        lines += [*(body if shown_by == title else [f"As for [{shown_by}](#{heading_anchor(shown_by)})."]), ""]
    return lines


def heading_anchor(title):
    """Find the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def make_page():
    """Make the text of docs/options.md."""
    commands, seen = find_commands(), {}
    lines = [ABOUT, *(f"- [{title}](#{heading_anchor(title)})" for title in commands), ""]
    for title, (parser, summary) in commands.items():
        lines += describe_command(title, parser, summary, seen)
    return "\n".join(lines).rstrip() + "\n"


def main():
    """Write the page."""
    with replace_file(PAGE) as temporary:
        temporary.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
