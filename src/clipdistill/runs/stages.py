"""Folders that stand for several runs: `stages.json` lists those of a run in stages, `ablation.json` an ablation's."""

from __future__ import annotations

from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.report.data import read_json

FILE = "stages.json"
ABLATION = "ablation.json"


def stage_folders(folder: Path) -> list[Path]:
    """The run folders that `folder` stands for, in order: itself where it is a run.

    A run of stages stands for the stages that have begun, an ablation for its finished runs. A file stands for none,
    so that a pattern may be given for all runs beside each other (`runs/ablation/*`).
    """
    if folder.is_file():
        return []
    if (folder / ABLATION).is_file() and not (folder / "run.json").is_file():
        return _ablation_runs(folder)
    listed = folder / FILE
    if not listed.is_file():
        return [folder]
    entries = read_json(listed).get("stages")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("folder"), str) for e in entries
    ):
        raise InputError(f"{listed}: expected a list of stages, each with its 'folder'")
    begun = [folder / Path(entry["folder"]).name for entry in entries]
    begun = [path for path in begun if (path / "run.json").is_file()]
    if not begun:
        raise InputError(f"{folder}: none of its stages has begun")
    return begun


def _ablation_runs(folder: Path) -> list[Path]:
    variants = read_json(folder / ABLATION).get("variants")
    if not isinstance(variants, list) or not all(
        isinstance(v, dict) and isinstance(v.get("runs"), list) for v in variants
    ):
        raise InputError(f"{folder / ABLATION}: expected a list of variants, each with its 'runs'")
    runs = [folder / Path(str(name)).name for variant in variants for name in variant["runs"]]
    if not runs:
        raise InputError(f"{folder}: none of the ablation's runs has finished")
    return runs
