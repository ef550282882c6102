"""`clipdistill demo`: the whole way on built-in data, no network, minutes on two cores.

A small teacher ships with the package. Three students of one architecture are trained with the same budget, data
order and starting weights: contrastive only, CLIP-KD, CLIP-RD. Then teacher and students are measured (retrieval,
zero-shot classification of attribute combinations that were never trained on, throughput) and reported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.errors import InputError, listed
from clipdistill.report import report_place
from clipdistill.runtime.console import TextTable, say
from clipdistill.runtime.files import make_folder, write_json

if TYPE_CHECKING:  # torch and all that needs it wait until the settings are known to be right
    from clipdistill.train.config import RunConfig
    from clipdistill.train.run import Run

TEACHER = "scenes-teacher"
RECIPES = ("clip", "clip-kd", "clip-rd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and how much to do."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for runs and report (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starting weights and data order")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="recipes to compare, separated by commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed seconds a model, tower and batch size")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of the runs: train.steps=50")


def run(arguments: argparse.Namespace) -> int:
    """Train, measure, report; an interrupted demo continues where it stopped."""
    from clipdistill.train.config import check_names, resolve

    began = time.monotonic()
    out: Path = arguments.out
    recipes = listed(arguments.recipes, "--recipes")
    if len(set(recipes)) < len(recipes):
        raise InputError(f"--recipes {arguments.recipes}: a recipe is named twice")
    if not 0 < arguments.seconds < 3600:
        raise InputError(f"--seconds must be above 0 and below 3600, got {arguments.seconds:g}")
    configs = [
        resolve(
            recipe,
            {"out": str(out / recipe), "train": {"seed": arguments.seed}},
            size="demo",
            assignments=arguments.settings,
        )
        for recipe in recipes
    ]
    for config in configs:
        check_names(config)
    make_folder(out, "demo")
    report = report_place(out / "report.html")

    from clipdistill.report.look import look
    from clipdistill.report.report import write_report
    from clipdistill.train.run import distill
    from clipdistill.train.sources import SharedSources

    sources = SharedSources()  # pictures are drawn once, the teacher is measured once
    say("the teacher's embeddings, computed once for all students", colour="bold")
    cache = fill_cache(configs[0], out / "teacher-cache")
    runs: list[Run] = []
    for config in configs:
        say(f"{len(runs) + 1}/{len(configs)}  {config.recipe}", colour="bold")
        cached = {"teacher": f"cache:{cache}"} if config.needs_teacher else {}
        runs.append(distill(config.model_copy(update=cached), sources=sources))
    say("measuring speed", colour="bold")
    measure_speed(runs, arguments.seconds)
    say("drawing the report", colour="bold")
    look([run.folder for run in runs], images=300, queries=8, progress=False)
    summary = write_report([r.folder for r in runs], report, title="clipdistill demo", claims="published")
    print_summary(runs)
    say(f"{summary.headline}\n\nreport: {report}   ({time.monotonic() - began:.0f} s)")
    return 0


def fill_cache(config: RunConfig, folder: Path) -> Path:
    """The store of the teacher's embeddings of every training picture and caption."""
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill
    from clipdistill.config import as_dict, build
    from clipdistill.runtime.progress import Meter

    settings = {"teacher": TEACHER, "data": as_dict(config.data), "out": folder}
    with Meter("pictures") as meter:
        fill(build(CacheConfig, settings), progress=lambda done, total, _: meter.set(done, total))
    return folder


def measure_speed(runs: Sequence[Run], seconds: float) -> None:
    """Teacher and students in one alternating run, so that the ratios hold on a busy machine; bench.json each.

    Of students with one architecture one is measured: the others are as fast, and the report knows them by it.
    """
    from clipdistill.bench.throughput import throughput
    from clipdistill.models import load_model

    models = {"teacher": load_model(TEACHER, teacher=True)}
    for run in runs:
        student = load_model(str(run.student), teacher=True)
        if not any(student.architecture == known.architecture for known in models.values()):
            models[run.folder.name] = student
    result = throughput(models, batch_sizes=(1, 64), seconds=seconds)
    for run in runs:
        write_json(run.folder / "bench.json", result, checked=True)


def print_summary(runs: Sequence[Run]) -> None:
    """One line a model: the same numbers as the report's table."""
    shown = ("t2i_R@1", "i2t_R@1", "top1")
    table = TextTable(["model", *shown], title="teacher and students")
    rows: dict[str, dict[str, float]] = {}
    for run in runs:
        for score in run.scores or ():
            name = "teacher" if score.model == "teacher" else run.folder.name
            if score.metric in shown:
                rows.setdefault(name, {}).setdefault(score.metric, score.value)
    for name, values in sorted(rows.items(), key=lambda item: item[0] != "teacher"):
        table.rows.append([name, *(f"{values[m]:.1%}" if m in values else "" for m in shown)])
    table.print()
