"""Looking at what the runs' embeddings do: a gallery of what each model retrieves, and the geometry of each space.

    look([Path("runs/rd"), Path("runs/kd")])      # writes gallery.json and geometry.json into both

This is the one part of the report that needs models and pictures; what it finds is kept in the run folders, so that
later reports on the same runs only read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.cache.names import PREFIX
from clipdistill.config import build, read_yaml
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, Subset
from clipdistill.embed.encode import EncodedPairs, encode_pairs
from clipdistill.errors import InputError
from clipdistill.evaluate.geometry import geometry
from clipdistill.models import load_model
from clipdistill.report.data import read_json
from clipdistill.report.gallery import build_gallery

IMAGES = 1000
"""Pictures looked at, evenly spread over the set: enough for the geometry, and quick."""


@dataclass
class _Look:
    """Runs that are looked at together: the same pairs, the same teacher."""

    data: DataConfig
    teacher: str | None
    runs: list[Path]


def look(
    runs: Sequence[Path],
    *,
    data: str | None = None,
    split: str | None = None,
    images: int = IMAGES,
    queries: int = 12,
    top: int = 5,
    batch_size: int = 256,
    device: str | None = None,
    progress: bool = True,
) -> list[str]:
    """Write gallery.json and geometry.json into every run folder; returns what had to be left out, one sentence each.

    data, split: pairs to look at (default: each run's own validation set); images: how many of them; queries, top: of
    the gallery. Raises InputError when a run has no student or no validation set and no data were named.
    """
    if images < 16:
        raise InputError(f"the geometry of embeddings needs at least 16 pictures, got {images}")
    notes: list[str] = []
    for group in _groups(runs, data, split):
        source = open_pairs(group.data, default_split="val")
        if len(source) > images:
            source = Subset(source, images)

        def encoded(name: str, source: PairSource = source) -> EncodedPairs:
            model = load_model(name, teacher=True)
            return encode_pairs(model, source, batch_size=batch_size, device=device, progress=progress)

        models: dict[str, EncodedPairs] = {}
        if group.teacher is not None:
            try:
                models["teacher"] = encoded(group.teacher)
            except InputError as error:
                notes.append(f"the teacher is missing from gallery and geometry: {error}")
        students = {run: encoded(str(run)) for run in group.runs}
        models |= {_name(run): student for run, student in students.items()}
        gallery = json.dumps(build_gallery(models, source, queries=queries, top=top))
        for run, student in students.items():
            shape = {"data": source.name, **geometry(student, models.get("teacher"))}
            _write(run / "gallery.json", gallery)
            _write(run / "geometry.json", json.dumps(shape, indent=1))
    return notes


def _groups(runs: Sequence[Path], data: str | None, split: str | None) -> list[_Look]:
    """The runs by data and teacher; a run without a teacher joins the first group with its data."""
    found: list[_Look] = []
    alone: list[tuple[DataConfig, Path]] = []
    for run in runs:
        config = _data(run, data, split)
        teacher = _teacher(run)
        if teacher is None:
            alone.append((config, run))
            continue
        group = next((g for g in found if g.data == config and g.teacher == teacher), None)
        if group is None:
            found.append(group := _Look(config, teacher, []))
        group.runs.append(run)
    for config, run in alone:
        group = next((g for g in found if g.data == config), None)
        if group is None:
            found.append(group := _Look(config, None, []))
        group.runs.append(run)
    return found


def _data(run: Path, data: str | None, split: str | None) -> DataConfig:
    if data is not None:
        return DataConfig(path=data, split=split)
    stored = _recipe(run).get("validation")
    if not isinstance(stored, dict):
        raise InputError(f"{run}: was trained without a validation set: name pairs to look at with --data")
    config = build(DataConfig, stored, str(run / "recipe.yaml"))
    return config if split is None else config.model_copy(update={"split": split})


def _teacher(run: Path) -> str | None:
    """The model that the run's student learned from or was measured beside; not a cache, which has no model."""
    evaluation = _recipe(run).get("evaluation")
    named = [evaluation.get("teacher") if isinstance(evaluation, dict) else None, _facts(run).get("teacher")]
    return next((str(name) for name in named if name and not str(name).startswith(PREFIX)), None)


def _recipe(run: Path) -> dict[str, Any]:
    """The run's resolved configuration, {} where it was not kept."""
    return read_yaml(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else {}


def _facts(run: Path) -> dict[str, Any]:
    return read_json(run / "run.json", "a run folder has a run.json; is this the folder `clipdistill train` wrote?")


def _name(run: Path) -> str:
    return str(_facts(run).get("name") or run.name)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
