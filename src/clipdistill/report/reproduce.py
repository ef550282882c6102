"""How to get each number of a run again: the commands, and what they depend on."""

from __future__ import annotations

import shlex
from typing import Any

from clipdistill.config import parse_yaml
from clipdistill.errors import InputError
from clipdistill.report.data import ReportedRun

_PLAIN = ("path", "split", "size", "seed")
"""Settings of the data that the command line can express."""


def run_facts(run: ReportedRun) -> list[tuple[str, str]]:
    """(name, value) of what a run depends on."""
    prints = {row.role: row.fingerprint for row in run.scores if row.fingerprint}
    versions = run.facts.get("versions")
    facts = [
        ("folder", str(run.folder)),
        ("method", run.method),
        ("student", run.student),
        ("teacher", run.teacher or "none"),
        ("data", run.data),
        ("data fingerprint", str(run.facts.get("data_fingerprint") or "")),
        ("seed", "" if run.seed is None else str(run.seed)),
        ("steps", str(run.facts.get("steps", ""))),
        ("samples seen", f"{run.samples_seen:,}"),
        ("device", ", ".join(p for p in (run.device, run.dtype) if p)),
        *((f"{role} fingerprint", value) for role, value in prints.items()),
        ("architecture", run.architecture),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""),
    ]
    return [(name, value) for name, value in facts if value]


def train_command(run: ReportedRun) -> str:
    """The command that trained the run; where none was kept, one that trains it again from its resolved recipe."""
    if run.command or not run.recipe:
        return run.command
    folder = run.folder
    return shlex.join(["clipdistill", "train", "--recipe", str(folder / "recipe.yaml"), "--out", f"{folder}-again"])


def eval_commands(run: ReportedRun) -> list[str]:
    """The `clipdistill eval` commands that measure the run's student as its scores.json was measured.

    Empty where the run kept no recipe, or its data need settings that only a recipe can express.
    """
    try:
        recipe = parse_yaml(run.recipe, "recipe.yaml") if run.recipe else None
    except InputError:
        return []
    evaluation = recipe.get("evaluation") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(evaluation, dict):
        return []
    tasks = {str(dict(row.question).get("task")) for row in run.scores}
    teacher = next((t for t in (evaluation.get("teacher"), run.teacher) if t and any(_teacher_rows(run))), None)
    commands = []
    data = _data(recipe.get("validation"), run)
    if data is not None and "retrieval" in tasks:
        commands.append([*data, "--protocol", str(evaluation.get("protocol", "standard"))])
    if "zero-shot" in tasks:
        commands += [["--data", str(name)] for name in evaluation.get("zero_shot") or ()]
    tail = ["--teacher", str(teacher)] if teacher else []
    return [shlex.join(["clipdistill", "eval", str(run.folder), *command, *tail]) for command in commands]


def _teacher_rows(run: ReportedRun) -> list[bool]:
    return [row.role == "teacher" for row in run.scores]


def _data(stored: Any, run: ReportedRun) -> list[str] | None:
    """The arguments that open a validation set, or None when the command line cannot express it."""
    if not isinstance(stored, dict) or not stored.get("path"):
        return None
    path = str(stored["path"])
    drawn = path.partition(":")[0] == "scenes"
    if not drawn:
        unusual = {k: v for k, v in stored.items() if k not in _PLAIN and v not in (None, False, "error", 0.001, [])}
        columns = {"image_column": "filepath", "caption_column": "title", "max_pixels": 64_000_000}
        if any(columns.get(key) != value for key, value in unusual.items()):
            return None
        split = next((dict(row.question).get("split") for row in run.scores if row.question), None)
        split = stored.get("split") or split
        return ["--data", path, *(["--split", str(split)] if split else [])]
    options = [f"{key}={stored[key]}" for key in ("size", "seed") if stored.get(key)]
    name = path if ":" in path or not stored.get("split") else f"{path}:{stored['split']}"
    joined = f"{name}{'&' if '?' in name else '?'}{'&'.join(options)}" if options else name
    return ["--data", joined]
