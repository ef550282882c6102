"""Looking at what the runs' embeddings do: a gallery of what each model retrieves, and the geometry of each space.

    look([Path("runs/rd"), Path("runs/kd")])      # writes gallery.json and geometry.json into both

This is the one part of the report that needs models and pictures; what it finds is kept in the run folders, so that
later reports on the same runs only read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.names import PREFIX
from clipdistill.config import build
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, Subset
from clipdistill.embed.encode import EncodedPairs, encode_pairs
from clipdistill.errors import InputError
from clipdistill.evaluate.geometry import geometry
from clipdistill.evaluate.retrieval import retrieval_ranks
from clipdistill.models import load_model
from clipdistill.report import IMAGES
from clipdistill.report.gallery import thumbnail
from clipdistill.runs.folder import RunFolder
from clipdistill.runtime.files import write_json


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
    device: str | torch.device | None = None,
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
        if source.problems:
            notes.append(source.problems.sentence(source.name))
        if len(source) > images:
            source = Subset(source, images)
        if len(source) < 2:
            names = ", ".join(map(_name, group.runs))
            notes.append(
                f"{names}: {source.name} has one picture, which tells nothing of retrieval and geometry: name more "
                "with --data"
            )
            continue

        def encoded(name: str, source: PairSource = source) -> EncodedPairs:
            RunFolder(Path(name)).load_plugins()
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
        gallery = build_gallery(models, source, queries=queries, top=top)
        for run, student in students.items():
            shape = {"data": source.name, **geometry(student, models.get("teacher"))}
            write_json(run / "gallery.json", gallery, checked=True)
            write_json(run / "geometry.json", shape, checked=True)
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
    named = [evaluation.get("teacher") if isinstance(evaluation, dict) else None, RunFolder(run).facts().get("teacher")]
    return next((str(name) for name in named if name and not str(name).startswith(PREFIX)), None)


def _recipe(run: Path) -> dict[str, Any]:
    """The run's resolved configuration, {} where it was not kept."""
    return RunFolder(run).settings() if (run / "recipe.yaml").is_file() else {}


def _name(run: Path) -> str:
    return str(RunFolder(run).facts().get("name") or run.name)


def build_gallery(
    models: Mapping[str, EncodedPairs], source: PairSource, *, queries: int = 12, top: int = 5, seed: int = 0
) -> dict[str, Any]:
    """What each model retrieves for the same queries, ready to be written as gallery.json.

    models: name ("teacher", the run's name, ...) -> embeddings of `source`, all of the same samples and captions.
    queries: how many in all; two thirds text to image, the rest image to text. Half of each kind are drawn at random,
    half are those on which the models disagree most, and each says which.
    Raises InputError when the models were not measured on the same samples.
    """
    if not models:
        raise InputError("a gallery needs at least one model's embeddings")
    reference = next(iter(models.values()))
    for name, encoded in models.items():
        same = (
            list(encoded.keys) == list(reference.keys)
            and list(encoded.captions) == list(reference.captions)
            and torch.equal(
                torch.as_tensor(encoded.text_to_image).cpu(), torch.as_tensor(reference.text_to_image).cpu()
            )
        )
        if not same:
            raise InputError(f"gallery: '{name}' was not encoded on the same samples as '{next(iter(models))}'")
    owner = torch.as_tensor(reference.text_to_image).cpu().long()
    keys = list(reference.keys)
    position = {source.key(i): i for i in range(len(source))}
    missing = next((key for key in keys if key not in position), None)
    if missing is not None:
        raise InputError(f"gallery: the embeddings hold the sample '{missing}', which is not in the pair source")
    texts = list(reference.captions)
    wanted_text = min(len(texts), max(1, (2 * queries + 2) // 3))
    wanted_image = min(len(keys), max(0, queries - wanted_text))
    ranks = [retrieval_ranks(e.image, e.text, owner) for e in models.values()]
    generator = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    used: set[str] = set()
    for text, why in _choose(np.stack([one.best_rank("t2i") for one in ranks]), wanted_text, generator):
        truth = int(owner[text])
        query: dict[str, Any] = {
            "kind": "t2i",
            "text": texts[text],
            "truth": keys[truth],
            "why": why,
            "models": {},
            "ranks": {},
        }
        for name, encoded in models.items():
            scores = encoded.image.float() @ encoded.text[text].float()
            best = _top(scores, top)
            query["models"][name] = [
                {"key": keys[i], "score": round(float(scores[i]), 4), "hit": i == truth} for i in best
            ]
            query["ranks"][name] = _rank(scores, [truth])
            used.update(keys[i] for i in best)
        used.add(keys[truth])
        found.append(query)
    for image, why in _choose(np.stack([one.best_rank("i2t") for one in ranks]), wanted_image, generator):
        own = [int(t) for t in torch.nonzero(owner == image).flatten()]
        query = {"kind": "i2t", "image": keys[image], "why": why, "models": {}, "ranks": {}}
        for name, encoded in models.items():
            scores = encoded.text.float() @ encoded.image[image].float()
            query["models"][name] = [
                {"text": texts[i], "score": round(float(scores[i]), 4), "hit": int(owner[i]) == image}
                for i in _top(scores, top)
            ]
            query["ranks"][name] = _rank(scores, own)
        used.add(keys[image])
        found.append(query)
    thumbnails = {key: thumbnail(source.image(position[key])) for key in sorted(used)}
    selection = (
        f"Half of the {len(found)} queries were drawn at random (seed {seed}) from {len(texts):,} captions and "
        f"{len(keys):,} images, half are those on which the models disagree most."
    )
    return {"format": 1, "selection": selection, "queries": found, "thumbnails": thumbnails}


def _choose(ranks: np.ndarray, count: int, generator: np.random.Generator) -> list[tuple[int, str]]:
    """(index, why): the first half drawn at random, the rest where the models' ranks lie furthest apart."""
    total = ranks.shape[1]
    by_chance = count if len(ranks) == 1 else (count + 1) // 2
    drawn = [int(i) for i in generator.choice(total, size=min(by_chance, total), replace=False)]
    spread = np.log(ranks.max(0)) - np.log(ranks.min(0))
    order = [int(i) for i in np.argsort(-spread, kind="stable") if int(i) not in set(drawn)]
    return [(i, "drawn at random") for i in drawn] + [(i, "models disagree") for i in order[: count - len(drawn)]]


def _top(scores: Tensor, count: int) -> list[int]:
    return [int(i) for i in torch.argsort(scores, descending=True, stable=True)[:count]]


def _rank(scores: Tensor, right: Sequence[int]) -> int | None:
    """1 + how many score higher than the best right answer."""
    return int((scores > scores[list(right)].max()).sum()) + 1 if right else None
