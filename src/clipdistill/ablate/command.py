"""`clipdistill ablate`: variants of recipes times seeds, resumable, and the table of paired differences."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from clipdistill.ablate.ask import Ablation, make_plan, train_and_compare
from clipdistill.ablate.grid import build_grid, shard
from clipdistill.ablate.plan import AblationPlan
from clipdistill.errors import InputError, listed
from clipdistill.runtime.console import say
from clipdistill.train.command import add_shared_arguments
from clipdistill.train.command import settings_of as settings_of_options
from clipdistill.train.config import assigned


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
    given = next((Path(text) for text in arguments.plan if "=" not in text), None)
    kept = {name: getattr(arguments, name) for name in ("keep_checkpoints", "quiet")}
    from clipdistill.runtime.distributed import ProcessGroup, is_main
    from clipdistill.runtime.machine import pick_device

    with ProcessGroup(pick_device(mine[0].config.device)):
        done = train_and_compare(plan, grid, mine, out, given, command=_command(), **kept)
        if is_main():
            _tell(done, arguments.quiet)
    return 1 if done.outcome.failed else 0


def _tell(done: Ablation, quiet: bool) -> None:
    if not quiet:
        say(done.summary)
        for table in done.tables:
            table.print()
        if done.results is not None:
            say(f"table and picture: {done.folder / 'ablation.md'}   page: clipdistill report {done.folder}")
    for name, message in done.failed.items():
        say(f"failed: {name}: {message}", sys.stderr)


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
    assigned(assignments, settings)
    plan = make_plan(
        Path(files[0]) if files else arguments.recipe,
        settings,
        drop=_split(arguments.drop),
        add=_split(arguments.add),
        weights=_split(arguments.weight),
        **{f"{name}s": values if len(values) > 1 else () for name, values in _axes(arguments).items()},
        baseline=arguments.baseline,
        seeds=None if arguments.seeds is None else _seeds(arguments.seeds),
        size=arguments.size,
    )
    return plan, settings, assignments


def _axes(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    return {name: getattr(arguments, name) for name in ("student", "teacher", "batch_size")}


def _split(values: list[str]) -> list[str]:
    return [part for value in values for part in listed(value, "ablate")]


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise InputError(f"--seeds {text}: write how many (5), or which, separated by commas (0,1,7)") from error
