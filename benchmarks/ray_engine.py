"""`--engine ray` against the local engine: what one worker costs more, and what a second one brings.

    python benchmarks/ray_engine.py [--images 512] [--rounds 3] [--model ViT-T-16] [--clock wall] [--json out.json]

The pairs of benchmarks/data.py (500 x 376 pixels, eight tars) are encoded by an untrained model: in this process, by
one Ray worker and by two, on one thread each, in turns. The start of the workers is not counted: a rate runs from when
each has done its first task to the last task. `--clock cpu` takes the workers' processor time instead, which counts on
a busy machine; Ray's own daemons are not in it. RAY_ADDRESS names a cluster that is there; else one is started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdistill.data.open import open_pairs
from clipdistill.models import build_student
from clipdistill.ray_engine.cluster import connect
from clipdistill.ray_engine.encoder import EncodeJob
from clipdistill.ray_engine.names import RayEngine
from data import photographs, write

BATCH = 16


@dataclass
class TimedJob(EncodeJob):
    """Notes when a task ended, and what the process has computed so far."""

    def __call__(self, task: dict[str, list]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        began = time.process_time()
        rows, notes = super().__call__(task)
        return rows, notes | {"process": os.getpid(), "ended": time.time(), "cpu": (began, time.process_time())}


def rate(results: Iterable[tuple[Any, Any, dict[str, Any]]], clock: str) -> float:
    """Pictures a second after each process's first task."""
    tasks = sorted((notes for *_, notes in results), key=lambda notes: notes["ended"])
    own = {process: [n for n in tasks if n["process"] == process] for process in {n["process"] for n in tasks}}
    begun = max(each[0]["ended"] for each in own.values())
    counted = [notes for notes in tasks if notes["ended"] > begun]
    if clock == "wall":
        return sum(len(notes["found"]) for notes in counted) / (tasks[-1]["ended"] - begun)
    spent = sum(each[-1]["cpu"][1] - each[0]["cpu"][1] for each in own.values())
    return sum(len(notes["found"]) for each in own.values() for notes in each[1:]) / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=512)
    add("--rounds", type=int, default=3)
    add("--model", default="ViT-T-16")
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--json", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"one worker, of local": [], "two workers, of twice one": []}
    with tempfile.TemporaryDirectory() as name:
        _, shards = write(Path(name) / "files", photographs(None, arguments.images, 500))
        source = open_pairs(str(shards))
        model = build_student(arguments.model, seed=0)
        tasks = [{"images": list(range(i, min(i + BATCH, len(source))))} for i in range(0, len(source), BATCH)]
        cluster = connect(RayEngine(workers=2, device="cpu"), None, print)
        for turn in range(arguments.rounds):
            local = TimedJob(model, source, "pictures", BATCH, "float32", "torch")
            local.start("cpu")
            rates = {"local": rate(((None, *local(task)) for task in tasks), arguments.clock)}
            for workers in (1, 2):
                cluster.workers = workers
                job = TimedJob(model, source, "pictures", BATCH, "float32", "torch")
                began = time.process_time()
                results = list(cluster.spread(job, tasks))
                rates[f"{workers}"] = rate(results, arguments.clock)
                print(f"turn {turn}, {workers} workers: the driver computed {time.process_time() - began:.1f} s")
            print("  ".join(f"{name}: {value:.1f} a second" for name, value in rates.items()))
            found["one worker, of local"].append(rates["1"] / rates["local"])
            twice = 2 if arguments.clock == "wall" else 1
            found["two workers, of twice one"].append(rates["2"] / rates["1"] / twice)
    for line, ratios in found.items():
        print(f"{line:<28} {statistics.median(ratios):6.3f}   {min(ratios):.3f} to {max(ratios):.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
