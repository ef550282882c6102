"""Everything that needs a GPU, within 8 minutes on one: tests, recipes, training, cache, the objective's table.

    sh benchmarks/gpu.sh                                           # or: make test-gpu
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
WAYS = (
    "objective.engine=dense", "objective.engine=tiled", "train.precision=fp32", "train.precision=bf16",
    "train.precision=fp16", "train.compile=true", "train.compile=false", "train.grad_checkpointing=true",
)  # fmt: skip
"""Settings with which CLIP-RD is trained besides."""
LIMITS = {"tests": 70, "recipes": 110, "steps": 110, "trainer": 50, "cache": 40, "ranks": 30, "objective": 70}
"""Seconds of each part, 8 minutes together."""


def cases(small: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Every recipe that is one run, and CLIP-RD in every way; the recipe and the settings of each."""
    from clipdistill.recipes import load_recipe, recipe_names

    single = [name for name in recipe_names() if "stages" not in load_recipe(name)]
    return [(name, ()) for name in (("clip", "clipdistill") if small else single)] + [("clip-rd", (w,)) for w in WAYS]


def recipes(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Each of `cases` for a few steps; one that fails is a row that says so."""
    import clipdistill as cd
    from clipdistill.recipes import load_recipe
    from clipdistill.train.config import resolve
    from clipdistill.train.run import distill

    with tempfile.TemporaryDirectory() as folder:
        debug = load_recipe("clip-rd", "debug")
        cd.cache(debug["teacher"], debug["data"], f"{folder}/cache", device=device, quiet=True)
        for number, (recipe, assignments) in enumerate(cases(small)):
            given = {"out": f"{folder}/{number}", "device": device}
            if any(term.startswith("bank_") for term in load_recipe(recipe)["objective"]["weights"]):
                given["teacher"] = f"cache:{folder}/cache"
            began = time.perf_counter()
            try:
                status = distill(resolve(recipe, given, size="debug", assignments=list(assignments)), quiet=True).status
            except Exception as error:
                status = f"FAILED: {' '.join(str(error).split())[:150]}"
            seconds = time.perf_counter() - began
            yield {"what": " ".join((recipe, *assignments)), "value": seconds, "unit": "s", "note": status}


def trainer(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Whole runs of open_clip's own trainer and of `clipdistill train` on the same files, by benchmarks/train.py."""
    sys.path.insert(0, str(Path(__file__).parent))
    import train
    from clipdistill.data.open import open_pairs

    student, batch, count = ("TinyCLIP-ViT-8M-16-Text-3M", 4, 3) if small else ("ViT-T-16", 256, 8)
    told = argparse.Namespace(device=device, batch=batch, steps=count, rounds=1, compile=False)
    told.threads = min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as folder:
        source = open_pairs(f"scenes:train?size={batch * count}&pixels=96")
        pairs = train.write_pairs(source, batch * count, Path(folder))
        found = train.runs(told, student, pairs, "fp32" if small else "bf16", Path(folder), "default")
    for name in ("open_clip", "clipdistill"):
        note = "pictures decoded by one process; the first step left out"
        yield {"what": f"{name}'s trainer, batch {batch:,}", "value": found[name], "unit": "pairs/s", "note": note}


def steps(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """CLIP-RD, ViT-B-16 as live and as stored teacher of ViT-T-16, against open_clip's own loss without a teacher."""
    import torch
    from open_clip import ClipLoss

    from clipdistill.models import build_student
    from clipdistill.objective import Embeddings, Objective
    from clipdistill.train.step import Towers, autocast, forward_backward

    where = torch.device(device)
    batches, count = ((4,), 1) if small else ((1024, 4096), 20)
    names = ["TinyCLIP-ViT-8M-16-Text-3M"] * 2 if small else ["ViT-T-16", "ViT-B-16"]
    student, teacher = (build_student(name, seed=0).module.to(where) for name in names)
    student.train(), teacher.eval()
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
    if failed := sum(str(row["note"]).startswith("FAILED") for row in rows):
        summary = f"FAILED: {failed} of {len(rows)}"
    if part == "tests" and code == 0:
        summary = output.strip().splitlines()[-1]
    return [*rows, {"what": f"{part}: whole", "value": time.perf_counter() - began, "unit": "s", "note": summary}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", default=",".join(LIMITS), help="comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("recipes", "steps", "trainer", "cache"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = {"recipes": recipes, "steps": steps, "trainer": trainer, "cache": cache}[options.part]
        for row in part(options.device, options.small):
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
