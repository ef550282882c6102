"""From a plan to the runs: one resolved configuration for each variant and seed, checked against what is on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clipdistill.ablate.plan import AblationPlan, settings_of
from clipdistill.config import as_dict
from clipdistill.errors import InputError
from clipdistill.recipes import lay, load_recipe
from clipdistill.runs.folder import RECIPE, RunFolder
from clipdistill.runtime.files import digest_of
from clipdistill.runtime.machine import pick_device
from clipdistill.train.config import RunConfig, assigned, check_names, resolve_values
from clipdistill.train.opening import changes, stored_settings

State = Literal["finished", "interrupted", "new"]
_NAMES = {"out", "name", "method", "recipe"}


@dataclass(frozen=True, eq=False)
class GridRun:
    """One run of the grid; `config.out` is its folder, DIR/VARIANT.seed-N."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.out.name

    @property
    def folder(self) -> Path:
        return self.config.out

    def state(self) -> State:
        """What is on disk. Raises InputError that names the key when it belongs to another configuration."""
        run = RunFolder(self.folder)
        if not (run / RECIPE).exists():
            return "new"
        try:
            changed = changes(stored_settings(run), as_dict(self.config))
        except InputError:  # damaged: training sets it aside, or says what is missing
            return "interrupted"
        if changed:
            raise InputError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed[:5])}): give the ablation another "
                "--out, give the variant another name, or remove that folder"
            )
        try:
            return "finished" if run.status() == "finished" else "interrupted"
        except InputError:  # a damaged run.json: training sets it aside and goes on from the checkpoints
            return "interrupted"


def build_grid(
    plan: AblationPlan, out: Path, settings: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
) -> list[GridRun]:
    """All runs, seed by seed, so that an unfinished grid has compared every variant equally often.

    Rising precedence: recipe and size, the plan's settings, `settings` (the command line's options), the variant's
    switches, `assignments` (key=value). Raises InputError for whatever a run could not be made of.
    """
    recipes = dict.fromkeys(variant.recipe for variant in plan.variants.values())
    bases = {recipe: base_settings(recipe, plan, settings or {}) for recipe in recipes}
    runs = [
        GridRun(name, seed, _config(plan, name, seed, out, bases, assignments))
        for seed in dict.fromkeys(seed for name in plan.variants for seed in plan.seeds_of(name))
        for name in plan.variants
        if seed in plan.seeds_of(name)
    ]
    _refuse_equal(runs)
    for run in {run.variant: run for run in runs}.values():  # seeds differ in nothing that can be missing
        check_names(run.config)
    from clipdistill.train.run import (
        with_precision,  # needs torch, which waits until every setting is known to be right
    )

    return [replace(run, config=with_precision(run.config, pick_device(run.config.device))) for run in runs]


def _refuse_equal(runs: Sequence[GridRun]) -> None:
    """Raise InputError where two variants are one and the same: comparing them would say nothing."""
    seen: dict[str, str] = {}
    for run in runs:
        settings = {key: value for key, value in as_dict(run.config).items() if key not in _NAMES}
        other = seen.setdefault(digest_of(settings), run.variant)
        if other != run.variant:
            raise InputError(
                f"variants '{other}' and '{run.variant}' have the same settings: a key=value is laid over what they "
                "differ in, or a switch changes nothing; leave it out"
            )


def base_settings(recipe: str, plan: AblationPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the plan's size and settings and the command line's over it."""
    return lay(lay(load_recipe(recipe, plan.size), plan.settings), settings)


def _config(
    plan: AblationPlan,
    name: str,
    seed: int,
    out: Path,
    bases: Mapping[str, Mapping[str, Any]],
    assignments: Sequence[str],
) -> RunConfig:
    variant = plan.variants[name]
    where = f"variant '{name}'"
    values = settings_of(variant, bases[variant.recipe], where)
    own_options = {"out": "--out", "name": "the variant", "method": "the variant", "train__seed": "--seeds"}
    values = lay(values, assigned(assignments, {}, **own_options))
    if "stages" in values:
        raise InputError(f"{where}: recipe {variant.recipe} describes a run in stages; compare one of its stages")
    own = {"out": str(out / f"{name}.seed-{seed}"), "name": f"{name} seed {seed}", "method": name}
    values = lay(values, {**own, "train": {"seed": seed}})
    return resolve_values(values, variant.recipe)


def shard(runs: Sequence[GridRun], text: str | None) -> list[GridRun]:
    """The runs of one of n independent jobs: 'i/n' (from 1), 'ranks' (under torchrun), 'slurm' (array or step), None:
    all. Raises InputError for anything else.
    """
    if text is None:
        return list(runs)
    if text == "ranks":
        number, count = _environment("RANK", "WORLD_SIZE", "torchrun")
        number += 1
        # from here on this process is alone: each rank trains runs of its own
        for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)
    elif text == "slurm":
        array = "SLURM_ARRAY_TASK_ID" in os.environ
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT") if array else ("SLURM_PROCID", "SLURM_NTASKS")
        number, count = _environment(*names, "SLURM")
        number += 1 - (int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")) if array else 0)
    else:
        first, slash, second = text.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal()):
            raise InputError(f"--shard {text}: write i/n, for example  --shard 2/4,  or 'ranks' or 'slurm'")
        number, count = int(first), int(second)
    if not 1 <= number <= count:
        raise InputError(f"--shard {text}: job {number} of {count}; jobs are counted from 1 to {count}")
    return list(runs)[number - 1 :: count]


def _environment(number: str, count: str, what: str) -> tuple[int, int]:
    try:
        return int(os.environ[number]), int(os.environ[count])
    except (KeyError, ValueError) as error:
        raise InputError(f"--shard: {what} has set no {number} and {count} here; write i/n instead") from error
