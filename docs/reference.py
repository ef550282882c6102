"""The pages that say what can be set, typed and called, from the code itself: settings.md, commands.md, python.md.

python docs/reference.py            # writes the pages
python docs/reference.py --check    # writes nothing; exit code 1 when a page is not what the code says
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from itertools import groupby
from pathlib import Path

import clipdistill
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
codes are in [Runs that survive](reliability.md). Tab completes commands, options, settings and their choices after
`clipdistill completion bash > ~/.clipdistill.bash` (once, and after each update) and a line
`source ~/.clipdistill.bash` in `~/.bashrc`; for zsh the same with `zsh`.

Every command takes `--plugin FILE.py`, a file that is run first ([Extending](extending.md)), and `--local-cache DIR`
with `--local-cache-size SIZE`, where copies of remote shards are kept ([Remote data](remote.md))."""


PYTHON = """# Python

`import clipdistill as cd` takes milliseconds; torch is loaded when something is computed. What the commands do,
functions do; what they return shows its numbers with intervals, in a notebook as tables. Mistakes raise
`clipdistill.errors.InputError` with the sentence that the command would print. In place of `--plugin FILE.py` a program
imports what registers ([Extending](extending.md)); in place of `--gpus N` it is started with
`torchrun --nproc-per-node N program.py`.

```python
import clipdistill as cd

run = cd.distill({
    "recipe": "clip-rd", "teacher": "scenes-teacher", "student": "scenes-student",
    "data": "scenes", "validation": "scenes:val", "out": "runs/python",
    "train": {"steps": 200},
})
run.scores  # tables; run.scores.to_frame() with pandas
scores = cd.evaluate(run.student, "scenes:val", teacher="scenes-teacher")
embeddings = cd.embed(run.student, "scenes:val")  # .image (N, D), .text (M, D)
cd.export(run.student, "onnx", "export/python", data="scenes:val")
cd.bench([run.student, "scenes-teacher"])
```"""

FUNCTIONS = {
    "demo": ("cache", "distill", "bench", "report"),
    "train": ("distill", "dry_run", "register_callback"),
    "replay": ("replay",),
    "ablate": ("ablate",),
    "regions": ("region_boxes", "region_embeddings", "region_scores", "region_vectors", "before_after"),
    "cache": (
        "cache",
        "clipdistill.cache.check.verify",
        "clipdistill.cache.store.CacheStore",
        "clipdistill.cache.merge.merge",
        "clipdistill.cache.tars.export_shards",
    ),
    "embed": ("embed_to_file", "embed", "read_embeddings"),
    "eval": ("evaluate", "retrieval", "clipdistill.evaluate.geometry.geometry"),
    "fetch": ("fetch",),
    "probe": ("probe",),
    "export": ("export",),
    "compare": ("compare",),
    "claims": ("claims",),
    "bench": ("bench",),
    "report": ("report",),
    "search": (
        "search",
        "clipdistill.search.ask.open_collection",
        "clipdistill.search.server.serve",
        "clipdistill.search.vectors.write_vectors",
    ),
    "serve": ("serve",),
    "scenes": ("clipdistill.scenes.write.write_scenes",),
    "list": (
        "clipdistill.listing.recipes",
        "clipdistill.listing.students",
        "clipdistill.listing.towers",
        "clipdistill.listing.datasets",
        "clipdistill.reference.settings.settings",
    ),
    "completion": ("clipdistill.reference.completion.completion_script",),
    "doctor": ("clipdistill.doctor.examine",),
}
"""What does in Python what a command does: names of `clipdistill` itself, or functions of its rooms."""


RESULTS = (
    "clipdistill.statistics.scores.Score",
    "clipdistill.statistics.compare.ModelComparison",
    "clipdistill.statistics.compare.MetricComparison",
    "clipdistill.export.graphs.Exported",
    "clipdistill.cache.fill.FillReport",
    "clipdistill.embed.encode.EncodedPairs",
    "clipdistill.search.ask.SearchResult",
    "clipdistill.bench.measure.Measurements",
    "clipdistill.vectors.job.EmbedReport",
    "clipdistill.train.dry_run.DryRun",
    "clipdistill.ablate.ask.Ablation",
    "clipdistill.probe.linear.ProbeResults",
    "clipdistill.probe.linear.ProbeResult",
    "clipdistill.statistics.verdicts.Verdicts",
    "clipdistill.statistics.judge.Verdict",
    "clipdistill.report.report.ReportSummary",
    "clipdistill.train.replay.Replay",
    "clipdistill.serve.ask.RunningService",
    "clipdistill.evaluate.retrieval.RetrievalScores",
    "clipdistill.data.benchmarks.fetch.Fetched",
    "clipdistill.regions.box_file.BoxFile",
    "clipdistill.regions.store.RegionStore",
    "clipdistill.regions.measure.Measured",
    "clipdistill.regions.ask.RegionVectors",
    "clipdistill.regions.retention.Changes",
    "clipdistill.regions.retention.Change",
)
"""What functions give back, and what is in it: classes that are described beside those of `clipdistill` itself."""


def function_table() -> str:
    """A row a command."""
    table = TextTable(["command", "from Python"], text=(0, 1))
    for command in COMMANDS:
        functions = FUNCTIONS[command]
        table.rows.append([f"`{command}`", ", ".join(f"`{f if '.' in f else f'cd.{f}'}`" for f in functions)])
    return table.markdown()


def python_page() -> str:
    """Signature and docstring of everything public, functions first, then what they take and return."""
    import torch

    public = {name: getattr(clipdistill, name) for name in clipdistill.__all__ if name != "__version__"}
    functions = {name: value for name, value in public.items() if not inspect.isclass(value)}
    parts = [PYTHON, "## Commands and functions", function_table(), "## Functions"]
    for name, value in functions.items():
        parts.append(f"### `{name}`\n\n```py\n{signature(f'cd.{name}', value)}\n```\n\n{text(documented(value))}")
    parts.append("## Classes")
    more = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in RESULTS]
    for cls in dict.fromkeys([value for value in public.values() if inspect.isclass(value)] + more):
        name = f"cd.{cls.__name__}" if cls in public.values() else cls.__name__
        parts.append(f"### `{cls.__name__}`\n\n{text(cls)}")
        own = [name for name in vars(cls) if not name.startswith("_")]
        fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        if fields or issubclass(cls, torch.nn.Module):
            parts.append(f"```py\n{signature(name, cls)}\n```")
        lines = []
        for method in own:
            value = inspect.getattr_static(cls, method)
            value = getattr(value, "__func__", value)
            if isinstance(value, property):
                lines.append(f"- `.{method}`: {first(value.fget)}")
            elif inspect.isfunction(value) and value.__doc__:
                names = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]
                lines.append(f"- `.{method}({', '.join(names)})`: {first(value)}")
        if lines:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def documented(value: object) -> object:
    """The function that a package stands for when it is called, else the value itself."""
    return getattr(value, "function", value) if inspect.ismodule(value) else value


def signature(name: str, value: object) -> str:
    """As it stands in the code, over several lines where it is long."""
    found = inspect.signature(value)  # type: ignore[arg-type]
    words, starred = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            words.append("*")
        kind = parameter.annotation if isinstance(parameter.annotation, str) else ""
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        star = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        words.append(f"{star}{parameter.name}{f': {kind}' if kind else ''}{default}")
    back = (
        f" -> {found.return_annotation}"
        if isinstance(found.return_annotation, str) and not inspect.isclass(value)
        else ""
    )
    line = f"{name}({', '.join(words)}){back}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){back}"


def shown(value: object) -> str:
    """A default without addresses in memory."""
    if isinstance(value, type) or inspect.isfunction(value):
        return value.__name__
    if repr(value) == "<factory>":  # of a dataclass
        return "..."
    return "..." if type(value).__repr__ is object.__repr__ or " object at " in repr(value) else repr(value)


def text(value: object) -> str:
    """The docstring in Markdown: what it says of parameters and fields by name becomes a list."""
    parts = []
    for paragraph in (inspect.getdoc(value) or "").split("\n\n"):
        words = " ".join(paragraph.split())
        words = re.sub(r"(?<=[.)]) (?=(?:Returns|Raises|raises) )", "\n\n", words)
        for part in words.split("\n\n"):
            pieces = re.split(rf"(?:^|(?<=[;.:)] ))((?:{names(value)})(?:, (?:{names(value)}))*): ", part)
            parts.append(pieces[0].strip())
            items = zip(pieces[1::2], pieces[2::2], strict=True)
            parts.append("\n".join(f"- {coded(which)}: {said.strip().rstrip(';.')}." for which, said in items))
    return "\n\n".join(filter(None, parts))


def names(value: object) -> str:
    """What a docstring may describe by name, as a regular expression: parameters, and fields of a class."""
    try:
        found = [*inspect.signature(value).parameters]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = []
    return "|".join(map(re.escape, found)) or "(?!)"


def coded(which: str) -> str:
    """'`a`, `b`' of 'a, b'."""
    return ", ".join(f"`{name}`" for name in which.split(", "))


def first(value: object) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()) or "see its annotation."


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
            if action.dest in ("help", "plugin", "local_cache", "local_cache_size"):
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


PAGES = {"settings.md": settings_page, "commands.md": commands_page, "python.md": python_page}


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
