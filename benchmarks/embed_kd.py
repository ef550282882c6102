"""A training step with its teacher at work and with the teacher's stored embeddings: time and peak memory of each.

    python benchmarks/embed_kd.py --data dataset_flickr8k.json [--batch 16] [--rounds 3] [--json FILE]

CLIP-Embed-KD (arXiv 2404.06170) reports a ninth of the memory and an eighth of the time for embeddings as teachers. A
step reads and renders its pictures, asks the teacher (ViT-B-16, or its rows), runs the student (ViT-T-16) forward and
backward under CLIP-KD's terms and updates it with AdamW; weights and stored rows are random, which changes no time.
From disk: JPEG files decoded at each step, rows of a cache, mapped, its pages dropped before each step. In memory:
pictures decoded beforehand, rows in one array. Each measurement is a process of its own with one thread: one step to
warm up, then --steps; variants take turns. Memory is the process's largest resident set, less what it was after the
imports; of the whole process beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache import WEIGHTS, Variant, made_up_store
from clipdistill.cache.stored import StoredRows
from clipdistill.cache.teacher import CachedTeacher
from clipdistill.data.loader import Batch, PairLoader
from clipdistill.data.memory import KeptInMemory
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource, Subset
from clipdistill.models import build_student
from clipdistill.objective import Embeddings
from clipdistill.runtime.files import write_json
from clipdistill.train.teacher import LiveTeacher

TEACHER, STUDENT = "ViT-B-16", "ViT-T-16"
VARIANTS = {
    "live, from disk": (True, False),
    "stored, from disk": (False, False),
    "live, in memory": (True, True),
    "stored, in memory": (False, True),
}
WIDTH = 512


class RowsInMemory:
    """Stored rows in one array."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.nn.functional.normalize(torch.randn(2, samples, WIDTH, generator=generator), dim=-1)

    def __call__(self, batch: Batch) -> Embeddings:
        image, text = self.rows[:, torch.as_tensor(batch.indices)]
        return Embeddings(image, text, 100.0)


def drop_pages(folder: Path) -> None:
    """Have the system forget what it keeps in memory of the files of a folder."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(variant: str, data: str, batch: int, steps: int) -> dict[str, Any]:
    """Seconds and processor seconds of each step, and memory in MB, in this process."""
    torch.set_num_threads(1)
    live, kept = VARIANTS[variant]
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source: PairSource = Subset(open_pairs(data, split="train"), batch * (steps + 1))
    if kept:
        source = KeptInMemory(source)
        for i in range(len(source)):
            source.image(i)
    device = torch.device("cpu")
    student = build_student(STUDENT, seed=1)
    given: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, teacher = Path(name), None
        if live:
            model = build_student(TEACHER, seed=0)
            given, teacher = {"teacher": model}, LiveTeacher([model], device, "fp32")
        elif kept:
            teacher = RowsInMemory(len(source))
        else:
            store = made_up_store(folder, len(source), WIDTH, "fp16")
            given = {"stored": StoredRows(store, "fixed", (0,))}
            teacher = CachedTeacher("cached", store, given["stored"], [100.0], device, None, [])
        loader = PairLoader(
            source, student=student, batch_size=batch, caption="first", steps=steps + 1, device=device, **given
        )
        step = Variant(student, loader, teacher, WIDTH, device, "fp32").step
        return {"steps": taken(step, steps, folder), **memory(at_start)}


def taken(step: Callable[[], tuple[float, float]], steps: int, folder: Path) -> list[tuple[float, float]]:
    step()
    found = []
    for _ in range(steps):
        drop_pages(folder)
        found.append(step())
    return found


def memory(at_start: int) -> dict[str, float]:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"megabytes": (most - at_start) / 1024, "megabytes_whole": most / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs, their training split")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each process, after one to warm up")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one here, once (what the processes do)")
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measure(given.variant, given.data, given.batch, given.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for turn in range(given.rounds):
        names = list(VARIANTS)
        for name in names[turn % 4 :] + names[: turn % 4]:
            words = [sys.executable, __file__, "--variant", name, "--data", given.data]
            words += ["--batch", str(given.batch), "--steps", str(given.steps)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(time.strftime("%H:%M:%S"), name, found[name][-1], flush=True)
        report: dict[str, Any] = {"teacher": TEACHER, "student": STUDENT, "terms": WEIGHTS, "torch": torch.__version__}
        report |= {"batch": given.batch, "rounds": turn + 1, "steps": given.steps, "found": summary(found)}
        if given.json:
            write_json(given.json, report)


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each variant, and live over stored; said on the terminal too."""
    rows: dict[str, Any] = {}
    for name, parts in found.items():
        times = [step for part in parts for step in part["steps"]]
        rows[name] = {
            "seconds": statistics.median(wall for wall, _ in times),
            "processor_seconds": statistics.median(used for _, used in times),
            "processor_seconds_each": sorted(round(used, 2) for _, used in times),
            **{key: statistics.median(part[key] for part in parts) for key in ("megabytes", "megabytes_whole")},
        }
    for where in ("from disk", "in memory"):
        live, stored = rows[f"live, {where}"], rows[f"stored, {where}"]
        keys = ("seconds", "processor_seconds", "megabytes", "megabytes_whole")
        rows[f"live over stored, {where}"] = {key: round(live[key] / stored[key], 2) for key in keys}
        print(where, rows[f"live over stored, {where}"], flush=True)
    return rows


if __name__ == "__main__":
    main()
