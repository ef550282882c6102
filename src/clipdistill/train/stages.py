"""Runs in stages, described by one recipe: progressive inheritance, chains of teacher assistants.

    stages:
      "75": {student: "inherit:ViT-61M/32+29M"}
      "50": {student: "inherit:ViT-40M/32+19M,from=previous"}

Each stage is the recipe with its own settings laid over it, and an ordinary run in a folder below the run's. The word
`previous` as a teacher, as `student_weights`, as `train.masks.reference` or after `from=` means the student of the
stage before. The same command continues an interrupted run, inside a stage or between two.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdistill.errors import ClipdistillError, InputError, Preempted
from clipdistill.recipes import lay
from clipdistill.runs.folder import STAGES, STUDENT, RunFolder, run_folders
from clipdistill.runtime.files import new_folder, write_json
from clipdistill.train.config import RunConfig, assigned, checked_recipe, lay_own, resolve_values

if TYPE_CHECKING:
    from clipdistill.train.run import Run

FORMAT = 1
PREVIOUS = "previous"
_NAME = re.compile(r"^[\w.%+-]{1,60}$")


def resolve_stages(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    size: str | None = None,
    assignments: Sequence[str] = (),
) -> list[RunConfig]:
    """The runs of a recipe with `stages`, in order; an empty list for a recipe without.

    Arguments as in `resolve`; they go to every stage, but a stage whose teacher is `previous` keeps that. One stage
    alone is set by `stages.NAME.train.steps=100`. Stages draw their data in different orders unless they set
    `train.seed` themselves. Raises InputError as `resolve` does, and for a first stage that refers to a previous one.
    """
    given = {k: v for k, v in (settings or {}).items() if v is not None}
    over = lay(given, assigned(assignments, given))
    values = lay_own(checked_recipe(recipe, size), over)
    stages = values.pop("stages", None)
    if stages is None:
        return []
    if not isinstance(stages, Mapping) or not stages or not all(isinstance(s, Mapping) for s in stages.values()):
        raise InputError(f"recipe {recipe}: 'stages' must map the name of each stage to its settings")
    if "out" not in values:
        raise InputError(f"recipe {recipe}: no out was named; give one, for example  --out runs/first")
    own = over.pop("stages", {})
    out, configs = Path(values["out"]), []
    previous: Path | None = None
    for number, (name, overlay) in enumerate(stages.items(), start=1):
        if not _NAME.match(str(name)):
            raise InputError(f"recipe {recipe}: stage '{name}': a name has letters, digits and . % + - _ only")
        stage = lay(lay(lay(values, overlay), over), own.get(name, {}))
        if overlay.get("teacher") == PREVIOUS and "teacher" not in own.get(name, {}):
            stage["teacher"] = PREVIOUS  # a teacher named for the whole run is that of the stages that name none
        if not all(isinstance(part.get("train", {}), Mapping) for part in (stage, overlay)):
            raise InputError(f"recipe {recipe}: stage '{name}': 'train' must be a mapping of settings")
        if "seed" not in overlay.get("train", {}):
            stage = lay(stage, {"train": {"seed": stage.get("train", {}).get("seed", 0) + number - 1}})
        stage["out"] = str(out / f"stage-{number}-{name}")
        stage["name"] = f"{values.get('name') or out.name} {name}"
        stage = _with_previous(stage, previous, f"recipe {recipe}: stage '{name}'")
        configs.append(resolve_values(stage, recipe))
        previous = out / f"stage-{number}-{name}" / "student"
    return configs


def _with_previous(stage: dict[str, Any], previous: Path | None, where: str) -> dict[str, Any]:
    """`stage` with the word `previous` replaced by the folder of the previous stage's student."""

    def named(value: Any) -> Any:
        marked = isinstance(value, str) and (value == PREVIOUS or value.endswith(f"from={PREVIOUS}"))
        if not marked:
            return value
        if previous is None:
            raise InputError(f"{where}: there is no stage before the first, so '{value}' names nothing")
        return value.removesuffix(PREVIOUS) + str(previous)

    result: dict[str, Any] = {
        **stage,
        **{key: named(stage[key]) for key in ("teacher", "student", "student_weights") if key in stage},
    }
    masks = stage.get("train", {}).get("masks")
    if isinstance(masks, Mapping) and "reference" in masks:
        result = lay(result, {"train": {"masks": {"reference": named(masks["reference"])}}})
    return result


def distill_stages(
    configs: Sequence[RunConfig],
    *,
    allow_changes: bool = False,
    explain: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
) -> list[Run]:
    """Run the stages one after the other; finished ones are passed over, an interrupted one is continued.

    Writes stages.json, the last student as `student/` and a report over all stages beside their folders. `explain`
    stops after the pre-flight of the first unfinished stage. Raises what `distill` raises, after recording where it
    stopped.
    """
    from clipdistill.train.run import distill

    out = configs[0].out.parent
    runs: list[Run] = []
    for config in configs:
        if explain and (config.out / STUDENT).is_dir():
            continue
        try:
            runs.append(distill(config, allow_changes=allow_changes, explain=explain, quiet=quiet, callbacks=callbacks))
        except ClipdistillError as error:
            if not explain and config.out.is_dir():
                _write_list(out, configs, "stopped" if isinstance(error, Preempted) else "failed")
            raise
        if explain:
            return runs
        _write_list(out, configs, "finished" if config is configs[-1] else "running")
    if runs and _writes():
        from clipdistill.models.save import made_here

        # under a name of its own, so that the whole run is named like any other
        with new_folder(out / STUDENT, lambda _: True, "student", made_here) as folder:
            shutil.copytree(runs[-1].student, folder, dirs_exist_ok=True)
        report = importlib.import_module("clipdistill.report.report")  # above this room: found by name
        report.write_report(run_folders(out), out / "report.html", title=out.name)
    return runs


def _writes() -> bool:
    """Whether this process writes: between stages there is no process group to ask."""
    return int(os.environ.get("RANK", "0")) == 0


def _write_list(out: Path, configs: Sequence[RunConfig], status: str) -> None:
    if not _writes():
        return
    entries = [
        {"folder": config.out.name, "status": RunFolder(config.out).status() or "waiting", "student": config.student}
        for config in configs
    ]
    described = {"format": FORMAT, "recipe": configs[0].recipe, "status": status, "stages": entries}
    write_json(out / STAGES, described, checked=True)
