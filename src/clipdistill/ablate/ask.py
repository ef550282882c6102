"""`cd.ablate`, and what `clipdistill ablate` does with its options: from a plan to trained and compared runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipdistill.ablate.grid import GridRun, base_settings, build_grid, shard
from clipdistill.ablate.plan import AblationPlan, plan_of_recipes, read_plan
from clipdistill.arguments import checked
from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.runs.folder import RUN
from clipdistill.runtime.console import TextTable, html_page
from clipdistill.runtime.files import make_folder, write_text

if TYPE_CHECKING:  # torch waits until the whole grid is known to be right
    from clipdistill.ablate.results import Results
    from clipdistill.ablate.run import GridOutcome


@dataclass(repr=False)
class Ablation:
    """What `ablate` did and found. folder: with a run a variant and seed, and ablation.md; outcome: names of the runs
    that this call trained, passed over and lost; failed: run -> why, of all that failed and were not tried since;
    results: the compared scores, differences with intervals and verdicts of claims (None while no run is finished).
    """

    folder: Path
    outcome: GridOutcome
    results: Results | None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> list[TextTable]:
        """A row a variant with its differences from the baseline; the verdicts, where claims were made."""
        from clipdistill.ablate.tables import terminal_table
        from clipdistill.statistics.verdicts import verdict_table

        if self.results is None:
            return []
        claims = [verdict_table(self.results.verdicts)] if self.results.verdicts else []
        return [terminal_table(self.results), *claims]

    @property
    def summary(self) -> str:
        """How many runs were trained, and what failed."""
        names = [self.outcome.finished, self.outcome.skipped, self.outcome.elsewhere, self.outcome.failed]
        trained, finished, elsewhere, failed = map(len, names)
        return (
            f"{trained} runs trained, {finished} were finished, {elsewhere} at work in another process, {failed} failed"
        )

    def __repr__(self) -> str:
        failures = [f"failed: {name}: {message}" for name, message in self.failed.items()]
        return "\n".join([self.summary, *(line for table in self.tables for line in table.lines()), *failures])

    def _repr_html_(self) -> str:
        return html_page(self.tables, self.summary)


@checked
def ablate(
    plan: str | Path | Mapping[str, Any] | AblationPlan | Sequence[str],
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    add: Sequence[str] = (),
    weights: Sequence[str] = (),
    students: Sequence[str] = (),
    teachers: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    baseline: str | None = None,
    seeds: int | Sequence[int] | None = None,
    size: str | None = None,
    shard_of: str | None = None,
    keep_checkpoints: bool = False,
    quiet: bool = False,
) -> Ablation:
    """Train variants of recipes times seeds under one budget and compare them in pairs; called again, it goes on.

    plan: a YAML file of variants, what such a file holds, or a list of recipes, of which the first is the baseline.
    out: the folder of the ablation. settings: of all runs, as in `distill` (teacher, student, data, validation, ...).
    drop, add, weights: variants of listed recipes with one term switched ("vrd", "affinity=1", "fd=1000"); students,
    teachers, batch_sizes: each variant with each of them. baseline: the variant that the others are compared with.
    seeds: how many, or which (None: the plan's, else 5). size: a named size of the recipes. shard_of: "i/n", "ranks"
    or "slurm", for this job's share of the runs. keep_checkpoints: of finished runs too. quiet: no progress on the
    terminal.

    Returns an Ablation: outcome, results with intervals and verdicts, failed runs. Raises InputError for a plan that
    contradicts itself, before the first run, Preempted after a stop signal, StorageError when the disk is full.
    """
    given = Path(plan) if isinstance(plan, str | Path) else None
    made = make_plan(
        plan, settings or {}, drop=drop, add=add, weights=weights, students=students, teachers=teachers,
        batch_sizes=batch_sizes, baseline=baseline, seeds=seeds, size=size,
    )  # fmt: skip
    grid = build_grid(made, Path(out), settings)
    mine = shard(grid, shard_of)
    return train_and_compare(made, grid, mine, Path(out), given, keep_checkpoints=keep_checkpoints, quiet=quiet)


def make_plan(
    source: str | Path | Mapping[str, Any] | AblationPlan | Sequence[str],
    settings: Mapping[str, Any],
    *,
    drop: Sequence[str] = (),
    add: Sequence[str] = (),
    weights: Sequence[str] = (),
    students: Sequence[str] = (),
    teachers: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    baseline: str | None = None,
    seeds: int | Sequence[int] | None = None,
    size: str | None = None,
) -> AblationPlan:
    """The plan that `ablate` and the command's options describe. Raises InputError for contradictions."""
    over = {"size": size, "baseline": baseline, "seeds": seeds if isinstance(seeds, int | None) else list(seeds)}
    over = {name: value for name, value in over.items() if value is not None}
    axes = {"student": students, "teacher": teachers, "batch-size": batch_sizes}
    if isinstance(source, str | Path | Mapping | AblationPlan):
        switches = {"drop": drop, "add": add, "weight": weights, **axes}
        if used := next((name for name, values in switches.items() if values), None):
            raise InputError(f"ablate: --{used} makes variants of recipes; with a file, add it there")
        where = str(source) if isinstance(source, str | Path) else "ablate"
        found = read_plan(Path(source)) if isinstance(source, str | Path) else source
        values = found.model_dump(mode="json") if isinstance(found, AblationPlan) else dict(found)
        return build(AblationPlan, values | over, where)
    recipes = list(source)
    if not recipes:
        raise InputError("ablate: name one file of variants, or recipes")
    sized = AblationPlan.model_validate({"variants": {"any": {"recipe": recipes[0]}}, "size": size})
    variants = plan_of_recipes(
        recipes, drop=drop, add=add, weights=weights, students=students, teachers=teachers, batch_sizes=batch_sizes,
        weights_of={r: base_settings(r, sized, settings).get("objective", {}).get("weights", {}) for r in recipes},
    )  # fmt: skip
    described = {name: variant.model_dump(mode="json") for name, variant in variants.items()}
    return build(AblationPlan, {"variants": described} | over, "ablate")


def train_and_compare(
    plan: AblationPlan,
    grid: Sequence[GridRun],
    mine: Sequence[GridRun],
    out: Path,
    given: Path | None,
    *,
    keep_checkpoints: bool,
    quiet: bool,
    command: str | None = None,
) -> Ablation:
    """Train the runs `mine` and write what the grid's finished runs say. given: the file that the plan came from;
    command: what is said to have made the page."""
    from clipdistill.ablate.run import GridOutcome, failures, run_grid
    from clipdistill.ablate.summary import summarise
    from clipdistill.runtime.distributed import ProcessGroup, barrier, is_main
    from clipdistill.runtime.machine import pick_device

    if not mine:
        return Ablation(out, GridOutcome(), None)
    with ProcessGroup(pick_device(mine[0].config.device)):
        if is_main():
            if (out / RUN).is_file():
                raise InputError(f"{out}: is a run: the runs of an ablation lie in a folder of their own")
            make_folder(out, "ablation")
            _record_plan(plan, out / "plan.yaml", given)
        barrier()
        results = None
        try:
            outcome = run_grid(mine, out, quiet=quiet, keep_checkpoints=keep_checkpoints)
        finally:  # also of what is there when the job is stopped
            if is_main():
                results = summarise(plan, grid, out, command=command)
        return Ablation(out, outcome, results, failures(out) if is_main() else {})


def _record_plan(plan: AblationPlan, path: Path, given: Path | None) -> None:
    """The whole plan into the ablation's folder; where it was read from there, the user's file stays as it is."""
    if given is not None and path.exists() and given.samefile(path):
        if read_plan(path) != plan:
            raise InputError(f"{path}: the options change this plan, which is not written over: name another --out")
        return
    write_text(path, yaml.safe_dump(as_dict(plan), sort_keys=False))
