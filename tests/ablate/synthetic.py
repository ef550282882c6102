"""Made-up finished runs of a grid, with effects that the tests know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clipdistill.ablate.grid import GridRun, build_grid
from clipdistill.ablate.plan import AblationPlan
from clipdistill.config import as_dict, build
from clipdistill.statistics.protocol import Protocol
from clipdistill.statistics.scores import Queries, Score, Scores

IMAGES, CAPTIONS = 600, 3000


def protocol(**changes: Any) -> Protocol:
    values: dict[str, Any] = {
        "name": "standard",
        "task": "retrieval",
        "dataset": "flickr8k",
        "split": "val",
        "images": IMAGES,
        "captions": CAPTIONS,
        "captions_per_image": "all",
        "positives": "any caption of the image",
        "transform": "64 px",
        "dtype": "float32",
        "keys_sha256": "ab" * 32,
        "model_fingerprint": "f",
    }
    return Protocol(**(values | changes))


def plan_of(variants: Mapping[str, Mapping[str, Any]], **values: Any) -> AblationPlan:
    return build(AblationPlan, {"variants": variants, "size": "debug", **values}, "plan")


def scores_of(rate: float, seed: int, *, fingerprint: str, with_queries: bool = True, **changes: Any) -> Scores:
    """Captions that are found with probability `rate`: the same luck of each query for every method of a seed."""
    found = Scores()
    luck = np.random.default_rng(99).random(CAPTIONS)
    wobble = 0.003 * np.random.default_rng([seed, int(1e6 * rate)]).standard_normal()
    for model, share in (("student", rate + wobble), ("teacher", 0.6)):
        own = protocol(**({"model_fingerprint": f"{model} {fingerprint}" if model == "student" else "t"} | changes))
        right = (luck < share).astype(float)
        found.scores.append(Score("t2i_R@1", float(right.mean()), CAPTIONS, own, model=model))
        if with_queries:
            queries = Queries({"t2i_R@1": right}, {"t2i_R@1": np.arange(CAPTIONS) // 5})
            found.queries[model, own.question()] = queries
    return found


def write_run(run: GridRun, rate: float, **facts: Any) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    described = {
        "format": 1,
        "name": run.config.run_name,
        "method": run.variant,
        "seed": run.seed,
        "status": "finished",
        "student": "scenes-student",
        "data": "scenes/train",
        "data_fingerprint": "d",
        "validation": "scenes/val",
        "device": "CPU",
        "batch_size": 16,
        "ranks": 1,
        "steps": 3,
        "samples_seen": 48,
        "seconds": 2.0 + run.seed,
        "parameters": {"total": 290_000},
        "initial_weights": f"start {run.seed}",
        **facts,
    }
    (run.folder / "run.json").write_text(json.dumps(described))
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(as_dict(run.config)))
    lines = [{"step": s, "samples": 16 * s, "scores": {"t2i_R@1": rate * s / 3}} for s in (1, 2, 3)]
    (run.folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores_of(rate, run.seed, fingerprint=run.name).save(run.folder / "scores.json")


def write_grid(plan: AblationPlan, out: Path, rates: Mapping[str, float]) -> list[GridRun]:
    """All runs of a plan, finished, each variant with its rate."""
    grid = build_grid(plan, out)
    for run in grid:
        write_run(run, rates[run.variant])
    return grid
