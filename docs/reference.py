"""The pages that say what can be set, typed and called, from the code itself: settings.md, commands.md, python.md.

python docs/reference.py            # writes the pages
python docs/reference.py --check    # writes nothing; exit code 1 when a page is not what the code says
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from clipdistill.commands import COMMANDS, command_parser
from clipdistill.reference.settings import SettingRow, settings
from clipdistill.runtime.console import TextTable

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/reference.py from the code; edit the docstrings and help texts there -->"

SETTINGS = """# Settings

Everything that a recipe, a plan or `key=value` on the command line can set; `clipdistill list settings PATTERN` finds
the same lines. A recipe is a YAML file in which the parts of a key before each dot are nested; on the command line it
is one word: `train.batch_size=256 objective.weights.xrd=0`.

"needed" stands where there is no default, though recipes bring many: those of `clip-rd` are
in `src/clipdistill/recipes/clip-rd.yaml`. What options of a command set is in [Commands](commands.md), what each term
computes in [Methods](methods.md)."""

COMMANDS_PAGE = """# Commands

`clipdistill COMMAND --help` shows the same. Where `key=value` is taken, [Settings](settings.md) lists the keys. Exit
codes are in [Runs that survive](reliability.md). Completion of commands, options and recipes:
`source <(clipdistill completion bash)` in `~/.bashrc`, or with `zsh` in `~/.zshrc`.

Every command takes `--plugin FILE.py`, a file that is run first ([Extending](extending.md))."""


def settings_page() -> str:
    """One table for each section of a run, of a plan and of a cache."""
    parts = [SETTINGS]
    for commands, rows in groupby(settings(), key=lambda row: row.commands):
        listed = list(rows)
        if commands == "train, ablate":
            parts.append("## A run: `train`, and every run of `ablate`")
        else:
            parts.append({"ablate": "## A plan: `ablate`", "cache": "## A store: `cache`"}[commands])
        sections = {row.key: row.meaning for row in listed if row.kind == "section" and row.key.count(".") == 0}
        plain = [row for row in listed if row.key.partition(".")[0] not in sections]
        parts.append(_table(plain))
        for section, meaning in sections.items():
            inner = [row for row in listed if row.key.startswith(f"{section}.")]
            parts.append(f"### `{section}` of {'a store' if commands == 'cache' else 'a run'}\n\n{meaning}")
            parts.append(_table(inner))
    return "\n\n".join(parts)


def _table(rows: list[SettingRow]) -> str:
    table = TextTable(["setting", "type", "default", "range", "meaning"], text=range(5))
    for row in rows:
        limits = ", ".join(f"`{c}`" for c in row.range.split(", ")) if row.kind == "choice" else row.range
        table.rows.append([f"`{row.key}`", row.kind, f"`{row.default}`" if row.default else "", limits, row.meaning])
    return table.markdown()


def commands_page() -> str:
    """One section for each command: its words, options and examples."""
    parts = [COMMANDS_PAGE]
    for name, (_, summary) in COMMANDS.items():
        parser = command_parser(name)[1]
        parts.append(f"## `{name}`\n\n{summary[0].upper()}{summary[1:]}.")
        table = TextTable(["argument", "value", "meaning"], text=range(3))
        for action in parser._actions:
            if action.dest in ("help", "plugin"):
                continue
            words = ", ".join(f"`{option}`" for option in action.option_strings)
            choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
            value = action.metavar or action.dest.upper().replace("_", "-")
            value = " ".join(value) if isinstance(value, tuple) else str(value)
            bare = action.nargs == 0 or (not action.option_strings and not choices)
            value = "" if bare else choices or f"`{value}`"
            if action.required and action.option_strings:
                value += " (needed)"
            help_text = (action.help or "") % {"default": action.default, "prog": parser.prog}
            table.rows.append([words or f"`{action.metavar or action.dest}`", value, help_text])
        if table.rows:
            parts.append(table.markdown())
        if parser.epilog:
            parts.append(f"```text\n{(parser.epilog % {'prog': parser.prog}).strip()}\n```")
    return "\n\n".join(parts)


PAGES = {"settings.md": settings_page, "commands.md": commands_page}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which page is not up to date")
    options = parser.parse_args(arguments)
    old = []
    for name, make in PAGES.items():
        page = DOCS / name
        title, _, rest = make().partition("\n\n")
        text = f"{title}\n\n{NOTE}\n\n{rest}\n"
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            old.append(name)
            if not options.check:
                page.write_text(text, encoding="utf-8")
    if options.check and old:
        print(f"not what the code says: {', '.join(old)}; run  python docs/reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
