"""Makes docs/results.md from finished ablations: tables, pictures, verdicts, commands, and the published claims.

python docs/results.py runs/ablation-scenes runs/ablation-pretrained

--keep leaves the sections and verdicts of other ablations as they stand: their runs need not be there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from clipdistill.ablate.summary import NAME
from clipdistill.errors import ClipdistillError, InputError
from clipdistill.runs.folder import run_folders
from clipdistill.statistics.claims import judge, read_claims
from clipdistill.statistics.records import read_records
from clipdistill.statistics.verdicts import verdicts_markdown

HERE = Path(__file__).resolve().parent

HEAD = """# Results: which distillation terms help

What the ablations below say, each a grid of variants x seeds at one budget. [ablation.md](ablation.md) explains how to
read them. The students are small and the budgets short, so these figures say what the terms do *here*; they are no
statement about the papers' own settings. This page is made from the finished runs by

```
{command}
```
"""
PUBLISHED = "## The published claims on these runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablations", nargs="+", type=Path, help="folders that clipdistill ablate wrote")
    parser.add_argument("--out", type=Path, default=HERE / "results.md", help="the page (default: docs/results.md)")
    parser.add_argument("--keep", action="store_true", help="leave what the page says of other ablations")
    options = parser.parse_args(arguments)
    try:
        write_results(options.ablations, options.out, keep=options.keep)
    except ClipdistillError as error:
        print(f"results.py: {error}", file=sys.stderr)
        return error.exit_code
    print(options.out)
    return 0


def write_results(ablations: Sequence[Path], out: Path, *, keep: bool = False) -> None:
    """The page at `out`, the pictures in images/ beside it. Raises InputError for a folder without an ablation.

    keep: sections of the page that is there stay where no ablation makes them anew, and so do its verdicts of published
    claims, but for those that these ablations judge by as many seeds or more.
    """
    head, *sections = re.split(r"^(?=## )", out.read_text(encoding="utf-8"), flags=re.MULTILINE) if keep else [""]
    old = {section.partition("\n")[0]: section for section in sections}
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    listed = " ".join(f"runs/{folder.resolve().name}" for folder in ablations)
    blocks = [HEAD.format(command=f"python docs/results.py {listed}")] if not head else [head.rstrip() + "\n"]
    for folder in ablations:
        page = folder / f"{NAME}.md"
        if not page.is_file():
            raise InputError(f"{folder}: no {NAME}.md there; run  clipdistill ablate PLAN --out {folder}  first")
        text = page.read_text(encoding="utf-8")
        for ending in (".svg", ".png"):  # .png: an older version's
            picture = folder / f"{NAME}{ending}"
            if picture.is_file():
                name = f"{folder.resolve().name}{ending}"
                shutil.copyfile(picture, images / name)
                text = text.replace(f"({NAME}{ending})", f"(images/{name})")
        section = re.sub(r"^#", "##", without_paths(text), flags=re.MULTILINE)
        old[section.partition("\n")[0]] = section.rstrip() + "\n"
    runs = [run for folder in ablations for run in run_folders(folder)]
    verdicts = [v for v in judge(read_claims("published"), read_records(runs)) if v.effect is not None]
    known = old.pop(PUBLISHED, "")
    blocks += [section.rstrip() + "\n" for section in old.values()]
    if verdicts or known:
        rows = verdicts_markdown(verdicts).rstrip().splitlines()[2:]
        stand = {_claim(line): line for line in known.splitlines() if line.startswith("| **")}
        rows = [line for line in rows if _seeds(line) >= _seeds(stand.get(_claim(line), ""))]
        kept = [line for claim, line in stand.items() if claim not in map(_claim, rows)]
        blocks.append(
            f"{PUBLISHED}\n\n`clipdistill claims published` with these runs: the papers' own figures beside the "
            "verdicts are single runs, mostly on other data and with other students.\n"
        )
        blocks.append(
            "\n".join(["| verdict | claim | evidence | published |", "| --- | --- | --- | --- |", *rows, *kept]) + "\n"
        )
    out.write_text("\n".join(blocks), encoding="utf-8")


def _claim(line: str) -> str:
    """The claim of a row of verdicts, its data set included; a row without one is itself."""
    found = re.search(r"`([^`]+)` \|", line)
    return found[1] if found else line


def _seeds(line: str) -> int:
    """How many seeds a row's verdict rests on."""
    found = re.search(r"\b(\d+) seeds?\b", line)
    return int(found[1]) if found else 0


def without_paths(text: str) -> str:
    """Commands without the folders of the machine they ran on: '/data/f8k/dataset.json' is 'dataset.json'."""
    text = re.sub(r"(?<![\w./~-])(?:/[\w.+~-]+)+/", "", text)
    return re.sub(r"(?<![\w./-])[\w.+~/-]*/(?=benchmarks/)", "", text)


if __name__ == "__main__":
    sys.exit(main())
