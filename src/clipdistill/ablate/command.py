"""`clipdistill ablate`: variants of recipes times seeds, resumable, and the table of paired differences."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipdistill.ablate.grid import GridRun, base_settings, build_grid, shard
from clipdistill.ablate.plan import AblationPlan, plan_of_recipes, read_plan
from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.runs.folder import RUN
from clipdistill.runtime.console import say
from clipdistill.runtime.files import make_folder, write_text
from clipdistill.train.command import add_shared_arguments
from clipdistill.train.command import settings_of as settings_of_options

if TYPE_CHECKING:  # torch waits until the whole grid is known to be right
    from clipdistill.ablate.results import Results
    from clipdistill.ablate.run import GridOutcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which variants, which seeds, what they share, where to write."""
    add = parser.add_argument
    add("plan", nargs="*", metavar="plan.yaml | key=value", help="a file of variants; settings of every run")
    add("--recipe", action="append", default=[], help="a recipe to compare (repeatable); the first is the baseline")
    add("--drop", action="append", default=[], help="variants without a term: vrd,xrd are two, vrd+xrd is one")
    add("--add", action="append", default=[], help="variants with another term: affinity=1")
    add("--weight", action="append", default=[], help="variants with another weight of a term: fd=1000,fd=4000")
    add("--student", action="append", default=[], help="student of all variants; several: each variant with each")
    add("--teacher", action="append", default=[], help="teacher (or cache:DIR) of all; several: each with each")
    add("--batch-size", action="append", type=int, default=[], help="pairs a step; several: each variant with each")
    add("--baseline", help="the variant that the others are compared with (default: the plan's, or the first)")
    add("--seeds", help="how many seeds (5: 0 to 4), or which (3,7,11); default 5")
    add_shared_arguments(parser)
    add("--out", required=True, type=Path, help="folder of the ablation; the same command goes on where it stopped")
    add("--shard", help="only these runs: i/n (job i of n), 'ranks' (one run a torchrun rank), 'slurm' (array task)")
    add("--keep-checkpoints", action="store_true", help="keep the checkpoints of finished runs too")
    add("--list", action="store_true", help="show the runs of the grid and their state, and stop")
    add("--quiet", action="store_true", help="no progress on the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Train the grid and summarise it. Returns 0, 1 when some failed."""
    plan, settings, assignments = read_arguments(arguments)
    out: Path = arguments.out
    grid = build_grid(plan, out, settings, assignments)
    if arguments.list:
        for each in grid:
            say(f"{each.state():<12} {each.name}")
        return 0
    mine = shard(grid, arguments.shard)
    if not mine:
        say(f"--shard {arguments.shard}: no run of the {len(grid)} is left for this job")
        return 0
    from clipdistill.runtime.distributed import ProcessGroup
    from clipdistill.runtime.machine import pick_device

    with ProcessGroup(pick_device(mine[0].config.device)):
        return _train(plan, grid, mine, arguments)


def _train(plan: AblationPlan, grid: Sequence[GridRun], mine: Sequence[GridRun], arguments: argparse.Namespace) -> int:
    from clipdistill.ablate.run import failures, run_grid
    from clipdistill.ablate.summary import summarise
    from clipdistill.runtime.distributed import barrier, is_main

    out: Path = arguments.out
    if is_main():
        if (out / RUN).is_file():
            raise InputError(f"{out}: is a run: the runs of an ablation lie in a folder of their own")
        make_folder(out, "ablation")
        _record_plan(plan, out / "plan.yaml", [Path(text) for text in arguments.plan if "=" not in text])
    barrier()
    try:
        outcome = run_grid(mine, out, quiet=arguments.quiet, keep_checkpoints=arguments.keep_checkpoints)
    finally:  # also of what is there when the job is stopped
        results = summarise(plan, grid, out, command=_command()) if is_main() else None
    if is_main():
        if not arguments.quiet:
            _tell(outcome, results, out)
        for name, message in failures(out).items():
            say(f"failed: {name}: {message}", sys.stderr)
    return 1 if outcome.failed else 0


def _record_plan(plan: AblationPlan, path: Path, given: Sequence[Path]) -> None:
    """The whole plan into the ablation's folder; where it was read from there, the user's file stays as it is."""
    if given and path.exists() and given[0].samefile(path):
        if read_plan(path) != plan:
            raise InputError(f"{path}: the options change this plan, which is not written over: name another --out")
        return
    write_text(path, yaml.safe_dump(as_dict(plan), sort_keys=False))


def _tell(outcome: GridOutcome, results: Results | None, out: Path) -> None:
    from clipdistill.ablate.tables import terminal_table
    from clipdistill.statistics.verdicts import verdict_table

    say(
        f"{len(outcome.finished)} runs trained, {len(outcome.skipped)} were finished, "
        f"{len(outcome.elsewhere)} at work in another process, {len(outcome.failed)} failed"
    )
    if results is not None:
        terminal_table(results).print()
        if results.verdicts:
            verdict_table(results.verdicts).print()
        say(f"table and picture: {out / 'ablation.md'}   page: clipdistill report {out}")


def _command() -> str:
    return " ".join(["clipdistill", *(shlex.quote(part) for part in sys.argv[1:])])


def read_arguments(arguments: argparse.Namespace) -> tuple[AblationPlan, dict[str, Any], list[str]]:
    """(plan, settings of every run from the options, key=value assignments). Raises InputError for contradictions."""
    files = [text for text in arguments.plan if "=" not in text]
    assignments = [text for text in arguments.plan if "=" in text]
    if len(files) > 1 or (bool(files) == bool(arguments.recipe)):
        raise InputError("ablate: name one file of variants (ablate plan.yaml), or recipes (--recipe clip-rd)")
    options = argparse.Namespace(**vars(arguments))
    # the plan's axes where there are several, else settings of all runs
    options.student, options.teacher = (
        values[0] if len(values) == 1 else None for values in (arguments.student, arguments.teacher)
    )
    options.out = options.name = options.student_weights = options.tensorboard = options.wandb = None
    settings = settings_of_options(options)
    if len(arguments.batch_size) == 1:
        settings["train"] = {"batch_size": arguments.batch_size[0]}
    if files:
        switches = [name for name in ("drop", "add", "weight") if getattr(arguments, name)]
        switches += [n for n in ("student", "teacher", "batch_size") if len(getattr(arguments, n)) > 1]
        if switches:
            raise InputError(
                f"ablate: --{switches[0].replace('_', '-')} makes variants of recipes; with a file, add it there"
            )
        values = read_plan(Path(files[0])).model_dump(mode="json")
    else:
        values = {"variants": _variants(arguments, settings)}
    for key in ("size", "baseline"):
        if getattr(arguments, key) is not None:
            values[key] = getattr(arguments, key)
    if arguments.seeds is not None:
        values["seeds"] = _seeds(arguments.seeds)
    return build(AblationPlan, values, files[0] if files else "ablate"), settings, assignments


def _variants(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    recipes = arguments.recipe
    plan = AblationPlan.model_validate({"variants": {"any": {"recipe": recipes[0]}}, "size": arguments.size})
    weights = {r: base_settings(r, plan, settings).get("objective", {}).get("weights", {}) for r in recipes}
    made = plan_of_recipes(
        recipes,
        drop=_split(arguments.drop),
        add=_split(arguments.add),
        weights=_split(arguments.weight),
        students=arguments.student if len(arguments.student) > 1 else (),
        teachers=arguments.teacher if len(arguments.teacher) > 1 else (),
        batch_sizes=arguments.batch_size if len(arguments.batch_size) > 1 else (),
        weights_of=weights,
    )
    return {name: variant.model_dump(mode="json") for name, variant in made.items()}


def _split(values: list[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise InputError(f"--seeds {text}: write how many (5), or which, separated by commas (0,1,7)") from error
