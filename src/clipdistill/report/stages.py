"""Runs made of stages: a folder with `stages.json` stands for the run folders it lists."""

from __future__ import annotations

from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.report.data import read_json

FILE = "stages.json"


def stage_folders(folder: Path) -> list[Path]:
    """The run folders of the stages that have begun, in order; `folder` itself where it is no run of stages."""
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
