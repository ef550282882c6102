"""The rooms of the package and what each imports, from the code itself: the picture and the table of architecture.md.

    python docs/architecture.py            # writes docs/images/architecture.svg and the table in docs/architecture.md
    python docs/architecture.py --check    # writes nothing; exit code 1 where an import breaks the rules

A file imports from its own room and from lower ones only; every import counts, also inside functions and for types.
"""

from __future__ import annotations

import argparse
import ast
import html
import sys
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src"
PACKAGE = "clipdistill"

ORDER = (
    ("errors", "version"),
    ("arguments", "commands", "config", "registry"),
    ("recipes", "runtime"),
    ("remote", "runs"),
    ("data",),
    ("scenes", "models"),
    ("objective", "embed"),
    ("cache", "vectors"),
    ("bank", "ray_engine"),
    ("statistics",),
    ("evaluate", "probe"),
    ("train",),
    ("regions", "ternary", "curation"),
    ("bench",),
    ("export",),
    ("report",),
    ("ablate", "search", "serve"),
    ("reference",),
    ("listing", "doctor", "demo"),
    ("api",),
    ("cli", "__init__"),
    ("__main__",),
)
"""Floors from the lowest up; rooms of one floor do not know each other."""

WINGS = (
    "models.inheritance", "models.prompts", "models.resolution", "models.sized", "scenes", "demo", "bank", "vectors",
    "ray_engine", "bench", "ablate", "export", "regions", "ternary", "curation", "search", "serve", "probe",
    "reference", "listing", "doctor", "remote", "data.formats.hub", "data.formats.labelled_libraries",
    "data.formats.arrays", "data.formats.parquet_footer", "data.mixture", "data.benchmarks", "evaluate.matching",
    "evaluate.balanced", "objective.one_modality", "objective.logit_matching", "objective.targeted", "train.features",
    "train.trackers", "train.replay", "train.replay_command", "train.dry_run", "train.idle", "report.exports",
    "statistics.claims_command", "statistics.compare_command",
)  # fmt: skip
"""Rooms, and parts of rooms, that a run can do without. The core finds them by name and never imports them."""

BEGIN, END = "<!-- rooms -->", "<!-- end of rooms -->"


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the package's modules it imports anywhere."""
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from package import module` needs the module; `from module import name` the module itself
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inner & files.keys() or {node.module}
        arrows[name] = (found & files.keys()) - {name}
    return arrows


def room(module: str) -> str:
    """'train' for clipdistill.train.loop, '__init__' for the package's own file."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def back_up(arrows: dict[str, set[str]]) -> list[str]:
    """'a -> b' for every import from a room that does not lie on a lower floor."""
    floor = {name: i for i, names in enumerate(ORDER) for name in names}
    unknown = {room(name) for name in arrows} - floor.keys()
    if unknown:
        return [f"{name}: has no floor in docs/architecture.py" for name in sorted(unknown)]
    return [
        f"{a} -> {b}"
        for a in sorted(arrows)
        for b in sorted(arrows[a])
        if room(a) != room(b) and floor[room(b)] >= floor[room(a)]
    ]


def in_wing(module: str) -> bool:
    """Whether a module lies in a wing."""
    return any(f"{module}.".startswith(f"{PACKAGE}.{wing}.") for wing in WINGS)


def into_wings(arrows: dict[str, set[str]]) -> list[str]:
    """'a -> b' for every import of a wing by the core. The package's own `__init__` names all types for checkers."""
    core = [name for name in sorted(arrows) if not in_wing(name) and room(name) != "__init__"]
    return [f"{a} -> {b}" for a in core for b in sorted(arrows[a]) if in_wing(b)]


def lines(files: dict[str, Path], wings: bool) -> int:
    """Lines of code of the wings, or of the core."""
    return sum(path.read_text(encoding="utf-8").count("\n") for n, path in files.items() if in_wing(n) == wings)


def summary(files: dict[str, Path], name: str) -> str:
    """The first sentence of a room's own docstring."""
    path = files.get(f"{PACKAGE}.{name}") or files[PACKAGE]
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def table(files: dict[str, Path]) -> str:
    """Markdown: a row a room, from the top floor down."""
    rows = ["| room | part | files | what it is for |", "|---|---|---|---|"]
    for names in reversed(ORDER):
        for name in names:
            inside = [module for module in files if room(module) == name]
            if inside:
                kind = "wing" if name in WINGS else "core"
                rows.append(f"| `{name}` | {kind} | {len(inside)} | {summary(files, name).replace('|', '/')} |")
    return "\n".join(rows)


def picture(files: dict[str, Path], arrows: dict[str, set[str]]) -> str:
    """SVG: a row and a column for each room, lowest floor first; a dot where the row's room imports the column's.

    Since rooms import only from below, every dot lies under the diagonal; its size is the number of imports. The bar
    beside a room is its number of lines.
    """
    sizes: dict[str, int] = defaultdict(int)
    for name, path in files.items():
        sizes[room(name)] += path.read_text(encoding="utf-8").count("\n")
    count: dict[tuple[str, str], int] = defaultdict(int)
    for a, others in arrows.items():
        for b in others:
            count[room(a), room(b)] += room(a) != room(b)
    rooms = [name for names in ORDER for name in names if name in sizes]
    step, left, top = 26, 110, 100
    side, right = len(rooms) * step, 170
    shapes = []
    for i, name in enumerate(rooms):
        middle, label = top + (i + 0.5) * step, html.escape(name.strip("_"))
        column = left + (i + 0.5) * step
        shapes.append(f'<rect class="row{i % 2}" x="{left}" y="{middle - step / 2}" width="{side}" height="{step}"/>')
        shapes.append(
            f'<rect class="own" x="{column - step / 2}" y="{middle - step / 2}" width="{step}" height="{step}"/>'
        )
        shapes.append(f'<text class="name" x="{left - 8}" y="{middle + 5}">{label}</text>')
        shapes.append(f'<text transform="translate({column + 5} {top - 8}) rotate(-60)">{label}</text>')
        long = sizes[name] / max(sizes.values()) * (right - 60)
        shapes.append(f'<rect class="bar" x="{left + side + 8}" y="{middle - 7}" width="{long:.1f}" height="14"/>')
        shapes.append(f'<text x="{left + side + 14 + long:.1f}" y="{middle + 5}">{sizes[name]:,}</text>')
        for j, other in enumerate(rooms):
            if count[name, other]:
                radius = min(3 + count[name, other] ** 0.5, step / 2 - 1)
                shapes.append(f'<circle cx="{left + (j + 0.5) * step}" cy="{middle}" r="{radius:.1f}"/>')
    width, height = left + side + right, top + side + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        "<title>Which room imports from which: every dot lies below the diagonal</title>\n"
        "<style>text{font:13px sans-serif;fill:#1c2733}.name{text-anchor:end}circle{fill:#2f6fb5}.own{fill:#c9d3df}"
        ".row0{fill:#f3f6fa}.row1{fill:#e9eef5}.bar{fill:#9db7d5}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say what is wrong")
    options = parser.parse_args(arguments)
    files = modules()
    arrows = imports(files)
    problems = ["in a circle: " + ", ".join(group) for group in circles(arrows)]
    problems += [f"back up: {arrow}" for arrow in back_up(arrows)]
    problems += [f"from the core into a wing: {arrow}" for arrow in into_wings(arrows)]
    page = DOCS / "architecture.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = f"{before}{BEGIN}\n{table(files)}\n{END}{rest.split(END)[1]}"
    if not options.check:
        page.write_text(text, encoding="utf-8")
        (DOCS / "images" / "architecture.svg").write_text(picture(files, arrows), encoding="utf-8")
    core, rest = lines(files, wings=False), lines(files, wings=True)
    print(f"{len(files)} files in {sum(map(len, ORDER))} rooms: {core:,} lines in the core, {rest:,} in the wings")
    print("\n".join(problems) or "no circle, no arrow back up, none from the core into a wing")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
