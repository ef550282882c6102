"""What an ablation leaves in its folder: ablation.json, ablation.md, ablation.png, claims.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from clipdistill.ablate.grid import GridRun
from clipdistill.ablate.pictures import draw
from clipdistill.ablate.plan import Plan
from clipdistill.ablate.results import Results, collect, to_json
from clipdistill.ablate.tables import markdown
from clipdistill.statistics.verdicts import FILE as CLAIMS
from clipdistill.statistics.verdicts import write_verdicts

NAME = "ablation"


def summarise(plan: Plan, grid: Sequence[GridRun], out: Path, *, command: str | None = None) -> Results | None:
    """Compare what is finished and write the files; None when no run is finished yet."""
    results = collect(plan, grid, out)
    if results is None:
        return None
    drawn = draw(results, out / f"{NAME}.png")
    _write(out / f"{NAME}.json", json.dumps(to_json(results) | {"command": command}, indent=1, ensure_ascii=False))
    _write(out / f"{NAME}.md", markdown(results, picture=f"{NAME}.png" if drawn else None, command=command))
    if results.verdicts:
        write_verdicts(results.verdicts, out / CLAIMS, plan.title or "ablation")
    return results


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    temporary.replace(path)
