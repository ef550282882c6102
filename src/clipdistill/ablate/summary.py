"""What an ablation leaves in its folder: ablation.json, ablation.md, ablation.svg, claims.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.ablate.grid import GridRun
from clipdistill.ablate.pictures import draw
from clipdistill.ablate.plan import AblationPlan
from clipdistill.ablate.results import Results, collect, to_json
from clipdistill.ablate.tables import markdown
from clipdistill.runtime.files import write_together
from clipdistill.statistics.verdicts import FILE as CLAIMS
from clipdistill.statistics.verdicts import verdict_document

NAME = "ablation"


def summarise(plan: AblationPlan, grid: Sequence[GridRun], out: Path, *, command: str | None = None) -> Results | None:
    """Compare what is finished and write the files; None when no run is finished yet."""
    results = collect(plan, grid, out)
    if results is None:
        return None
    picture = draw(results)
    page = markdown(results, picture=f"{NAME}.svg" if picture else None, command=command)
    written: dict[Path, Any] = {out / f"{NAME}.svg": picture} if picture else {}
    written[out / f"{NAME}.json"] = to_json(results) | {"command": command}
    if results.verdicts:
        written[out / CLAIMS] = verdict_document(results.verdicts, plan.title or "ablation")
    write_together({**written, out / f"{NAME}.md": page.rstrip("\n") + "\n"})
    return results
