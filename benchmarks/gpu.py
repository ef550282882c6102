"""Everything that needs a GPU, within 8 minutes on one: tests, training, cache, the objective's table.

    python benchmarks/gpu.py --json docs/performance/gpu.json      # or: make test-gpu
    python benchmarks/gpu.py --device cpu --small                  # the same calls with tiny sizes: do they run?

Each part is a process of its own with a time limit; one that fails or runs over it is a row that says so, and the
others go on. Models have random weights and pictures are noise: speeds and memory are those of real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("clip", "clip-kd", "clip-kd-gd", "clip-kd-afd", "clip-rd", "tinyclip", "dclip", "open_clip", "siglip")
LIMITS = {"tests": 90, "recipes": 100, "steps": 140, "cache": 60, "ranks": 40, "objective": 100}
"""Seconds of each part."""


def recipes(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Every recipe for a few steps, and one of them with each engine, precision, and compiled."""
    from clipdistill.train.config import resolve
    from clipdistill.train.run import distill

    cases = [(recipe, ()) for recipe in RECIPES[: 2 if small else None]]
    for setting in ("objective.engine=dense", "objective.engine=tiled", "train.precision=bf16", "train.compile=true"):
        cases.append(("clip-rd", (setting,)))
    for recipe, assignments in cases:
        with tempfile.TemporaryDirectory() as folder:
            config = resolve(
                recipe, {"out": f"{folder}/run", "device": device}, size="debug", assignments=list(assignments)
            )
            began = time.perf_counter()
            run = distill(config, quiet=True)
            name = " ".join((recipe, *assignments))
            yield {"what": name, "value": time.perf_counter() - began, "unit": "s", "note": run.status}


def steps(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """CLIP-RD, ViT-B-16 as live and as stored teacher of ViT-T-16, against open_clip's own loss without a teacher."""
    import torch
    from open_clip import ClipLoss

    from clipdistill.models import build_student
    from clipdistill.objective import Embeddings, Objective
    from clipdistill.train.step import Towers, autocast, forward_backward

    where = torch.device(device)
    batches, count = ((8,), 2) if small else ((1024, 4096), 20)
    student = build_student("ViT-T-16", seed=0).module.to(where).train()
    teacher = build_student("ViT-T-16" if small else "ViT-B-16", seed=0).module.to(where).eval()
    widths = (student.visual.output_dim, teacher.visual.output_dim)
    towers, plain = Towers(student), ClipLoss()
    objective = Objective.from_recipe("clip-rd", student_dim=widths[0], teacher_dim=widths[1]).to(where)
    optimiser = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-5, fused=True)
    for batch in batches:
        pictures = torch.randn(batch, 3, 224, 224, device=where)
        tokens = torch.zeros(batch, 77, dtype=torch.long, device=where)
        tokens[:, 0], tokens[:, 1:14], tokens[:, 14] = 49406, 320, 49407
        stored = Embeddings(*(torch.randn(2, batch, widths[1], device=where)), 100.0)

        def live(pictures: Any = pictures, tokens: Any = tokens) -> Any:
            with torch.no_grad(), autocast(where, "bf16"):
                parts = zip(pictures.split(256), tokens.split(256), strict=True)
                found = [(teacher.encode_image(image), teacher.encode_text(text[:, :16])) for image, text in parts]
            return Embeddings(*(torch.cat(rows).float() for rows in zip(*found, strict=True)), 100.0)

        def ours(of: Callable[[], Any], text: Any, pictures: Any = pictures) -> None:
            optimiser.zero_grad(set_to_none=True)
            forward_backward(
                towers, objective, pictures, text, of(), micro_batch=None, precision="bf16", seed=(0, 0, 0)
            )
            optimiser.step()

        def theirs(pictures: Any = pictures, tokens: Any = tokens) -> None:
            optimiser.zero_grad(set_to_none=True)
            with autocast(where, "bf16"):
                image, text, scale = student(pictures, tokens)
                loss = plain(image, text, scale)
            loss.backward()
            optimiser.step()

        cut = tokens[:, :16]
        ways: dict[str, Callable[[], None]] = {
            "open_clip's loss, full context, no teacher": theirs,
            "CLIP-RD, stored teacher": lambda: ours(lambda: stored, cut),  # noqa: B023 - called within the turn
            "CLIP-RD, live teacher": lambda: ours(live, cut),  # noqa: B023
        }
        for name, way in ways.items():
            way()
            _wait(where)
            _forget_peak(where)
            began = time.perf_counter()
            for _ in range(count):
                way()
            _wait(where)
            rate = batch * count / (time.perf_counter() - began)
            yield {"what": f"{name}, batch {batch:,}", "value": rate, "unit": "pairs/s", "note": _peak(where)}


def cache(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Filling a cache with a ViT-B-16 teacher: decoding, both towers, writing."""
    import clipdistill as cd
    from clipdistill.models import build_student, save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(build_student("ViT-T-16" if small else "ViT-B-16", seed=0), Path(folder, "teacher"))
        rows = 16 if small else 4096
        began = time.perf_counter()
        cd.cache(
            teacher=f"{folder}/teacher",
            data=f"scenes:train?size={rows}",
            out=f"{folder}/cache",
            device=device,
            quiet=True,
        )
        seconds = time.perf_counter() - began
    yield {
        "what": "cache fill, whole call",
        "value": rows / seconds,
        "unit": "pictures/s",
        "note": f"{rows:,} pictures",
    }


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: Any) -> str:
    import torch

    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""


def command_of(part: str, device: str, small: bool, folder: Path) -> list[str]:
    """The process that does one part."""
    python = [sys.executable]
    if part == "tests":
        files = ("objective/test_gpu.py", "evaluate/test_retrieval.py", "bench/test_throughput.py")
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        return [*python, *pytest, *(str(ROOT / "tests" / file) for file in files)]
    if part == "ranks":
        train = ["-m", "clipdistill.cli", "train", "--recipe", "clip-rd", "--size", "debug", "--device", device]
        return [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
                *train, "--out", str(folder / "ranks"), "--quiet"]  # fmt: skip
    if part == "objective":
        sizes = "64" if small else "1024,4096,8192,16384,32768"
        seconds = "0.05" if small else "1"
        return [*python, str(ROOT / "benchmarks/objective.py"), "--device", device, "--sizes", sizes, "--dims", "512",
                "--rounds", "1", "--seconds", seconds, "--out", str(folder)]  # fmt: skip
    return [*python, __file__, "--part", part, "--device", device, *(["--small"] if small else [])]


def measure(part: str, device: str, small: bool) -> list[dict[str, Any]]:
    """The rows of one part: what, value, unit, note."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command_of(part, device, small, Path(folder)),
                capture_output=True,
                text=True,
                timeout=LIMITS[part],
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
                check=False,
            )
            output, code = done.stdout, done.returncode
            said = (done.stderr.strip() or output.strip() or "no output").splitlines()[-1]
        except subprocess.TimeoutExpired as error:
            output, code, said = (error.stdout or b"").decode(), 124, f"over its limit of {LIMITS[part]} s"
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"what"')]
        table = Path(folder, "objective.json")
        if part == "objective" and table.exists():
            for row in json.loads(table.read_text(encoding="utf-8"))["rows"]:
                for form, found in row["forms"].items():
                    share = row["floor_seconds"] / found["seconds"]
                    note = f"{share:.0%} of the measured rate of products, {found['extra_bytes'] / 2**20:,.0f} MiB"
                    what = f"objective, {form}, N = {row['n']:,}"
                    rows.append({"what": what, "value": found["seconds"], "unit": "s", "note": note})
    summary = "passed" if code == 0 else f"FAILED ({code}): {said[:200]}"
    if part == "tests" and code == 0:
        summary = output.strip().splitlines()[-1]
    return [*rows, {"what": f"{part}: whole", "value": time.perf_counter() - began, "unit": "s", "note": summary}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", default=",".join(LIMITS), help="comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("recipes", "steps", "cache"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for row in {"recipes": recipes, "steps": steps, "cache": cache}[options.part](options.device, options.small):
            print(json.dumps(row), flush=True)
        return
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device: benchmarks/gpu.py --device cpu --small shows that the calls run")
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    rows = []
    for part in options.parts.split(","):
        for row in measure(part, options.device, options.small):
            rows.append({"part": part, **row})
            value = "" if row["value"] is None else f"{row['value']:12,.2f} {row['unit']:10}"
            print(f"{row['what']:60} {value:24} {row['note']}", flush=True)
    if options.json:
        content = {"device": name, "torch": torch.__version__, "small": options.small, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
