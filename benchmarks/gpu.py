"""Everything that needs a GPU, within 8 minutes on one: tests, recipes, training, cache, the objective's table.

    sh benchmarks/gpu.sh                                           # or: make test-gpu
    python benchmarks/gpu.py --device cpu --small                  # the same calls with tiny sizes: do they run?

Each part is a process of its own with a time limit; what a part does not need, the later ones may. One that fails or
runs over its limit is a row that says so, and the others go on; the JSON is written anew after each and keeps the last
words of those that failed. Models have random weights and pictures are noise: speeds and memory are those of real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = (
    "objective.engine=dense", "objective.engine=tiled", "train.precision=fp32", "train.precision=bf16",
    "train.precision=fp16", "train.compile=false", "train.grad_checkpointing=true", "train.compile=true",
)  # fmt: skip
"""Settings with which CLIP-RD is trained besides; what takes longest comes last."""
LIMITS = {"tests": 70, "recipes": 110, "steps": 110, "trainer": 50, "cache": 40, "ranks": 30, "objective": 70}
"""Seconds of each part, 8 minutes together."""
NEEDED = {
    "tests": ("pytest", "pytest_timeout", "hypothesis"), "trainer": ("open_clip_train", "webdataset", "braceexpand"),
    "objective": ("matplotlib",),
}  # fmt: skip
"""Packages of a part besides those of clipdistill."""
STEP_SECONDS = 20.0
"""After that long a way of training has taken steps enough."""
ENDED = 3
"""Exit status of `recipes` on a device that answers no more: the next case has a process of its own."""


def cases(small: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Every recipe that is one run, and CLIP-RD in every way; the recipe and the settings of each."""
    from clipdistill.recipes import load_recipe, recipe_names

    single = [name for name in recipe_names() if "stages" not in load_recipe(name)]
    return [(name, ()) for name in (("clip", "clipdistill") if small else single)] + [("clip-rd", (w,)) for w in WAYS]


def recipes(device: str, small: bool, after: int = 0) -> Iterator[dict[str, Any]]:
    """Each of `cases` but the first `after` for a few steps; one that fails is a row that says so."""
    import torch

    import clipdistill as cd
    from clipdistill.recipes import load_recipe
    from clipdistill.train.config import resolve
    from clipdistill.train.run import distill

    with tempfile.TemporaryDirectory() as folder:
        debug = load_recipe("clip-rd", "debug")
        with contextlib.suppress(Exception):  # the recipes that need it say so
            cd.cache(debug["teacher"], debug["data"], f"{folder}/cache", device=device, quiet=True)
        for number, (recipe, assignments) in enumerate(cases(small)[after:]):
            given = {"out": f"{folder}/{number}", "device": device}
            if any(term.startswith("bank_") for term in load_recipe(recipe)["objective"]["weights"]):
                given["teacher"] = f"cache:{folder}/cache"
            began = time.perf_counter()
            try:
                status = distill(resolve(recipe, given, size="debug", assignments=list(assignments)), quiet=True).status
            except Exception as error:
                status = failed(error)
            seconds = time.perf_counter() - began
            yield {"what": " ".join((recipe, *assignments)), "value": seconds, "unit": "s", "note": status}
            if status.startswith("FAILED"):
                try:
                    _wait(torch.ones(1, device=device).device)
                except Exception:  # an error of CUDA's own stays with the process
                    os._exit(ENDED)


def failed(error: Exception) -> str:
    """A note."""
    return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:150]}"


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

        def ours(of: Callable[[], Any], text: Any, micro: int | None, pictures: Any = pictures) -> None:
            optimiser.zero_grad(set_to_none=True)
            forward_backward(
                towers, objective, pictures, text, of(), micro_batch=micro, precision="bf16", seed=(0, 0, 0)
            )
            optimiser.step()

        def theirs(micro: int | None, pictures: Any = pictures, tokens: Any = tokens) -> None:
            optimiser.zero_grad(set_to_none=True)
            with autocast(where, "bf16"):
                image, text, scale = student(pictures, tokens)
                loss = plain(image, text, scale)
            loss.backward()
            optimiser.step()

        cut = tokens[:, :16]
        ways: dict[str, Callable[[int | None], None]] = {
            "open_clip's loss, full context, no teacher": theirs,
            "CLIP-RD, stored teacher": lambda micro: ours(lambda: stored, cut, micro),  # noqa: B023 - called in turn
            "CLIP-RD, live teacher": lambda micro: ours(live, cut, micro),  # noqa: B023
        }
        groups = (None, 2 if small else 256)
        for name, way in ways.items():
            for micro, rate, note in tried(way, (None,) if way is theirs else groups, batch, count, where):
                part = f" in groups of {micro}" if micro else ""
                yield {"what": f"{name}, batch {batch:,}{part}", "value": rate, "unit": "pairs/s", "note": note}
                optimiser.zero_grad(set_to_none=True)


def tried(
    way: Callable[[int | None], None], groups: tuple[int | None, ...], batch: int, count: int, where: Any
) -> Iterator[tuple[int | None, float | None, str]]:
    """(size of the groups, pairs a second, note) of the first of `groups` that fits, and of those that do not."""
    import torch

    for micro in groups:
        rate, note = None, "out of memory"
        try:
            rate, note = timed(lambda: way(micro), batch, count, where)  # noqa: B023 - called in turn
        except torch.OutOfMemoryError:
            pass
        except Exception as error:
            note = failed(error)
        yield micro, rate, note  # outside of `except`, which keeps what the step held
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if note != "out of memory":
            return


def timed(way: Callable[[], None], batch: int, count: int, where: Any) -> tuple[float, str]:
    """Pairs a second of `count` steps, or of fewer that take `STEP_SECONDS`, after a first one; and a note."""
    way()
    _wait(where)
    _forget_peak(where)
    began, done = time.perf_counter(), 0
    while done < count and time.perf_counter() - began < STEP_SECONDS:
        way()
        _wait(where)
        done += 1
    rate = batch * done / (time.perf_counter() - began)
    return rate, ", ".join(filter(None, (_peak(where), f"{done} steps")))


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
        # the address, because a container's own name may lead nowhere
        return [*python, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                "--nproc-per-node", "1", *train, "--out", str(folder / "ranks"), "--quiet"]  # fmt: skip
    if part == "objective":
        sizes = "64" if small else "4096,16384,32768,1024,8192"
        seconds = "0.05" if small else "1"
        return [*python, str(ROOT / "benchmarks/objective.py"), "--device", device, "--sizes", sizes, "--dims", "512",
                "--rounds", "1", "--seconds", seconds, "--out", str(folder)]  # fmt: skip
    return [*python, __file__, "--part", part, "--device", device, *(["--small"] if small else [])]


def ran(command: list[str], limit: float) -> tuple[str, str, int]:
    """Output, last words and exit status (124: over the limit) of a process; what it started ends with it."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = []
        for file in (output, errors):
            file.seek(0)
            found.append(file.read().decode(errors="replace"))
    return found[0], found[1], code


def measure(part: str, device: str, small: bool, limit: float | None = None) -> list[dict[str, Any]]:
    """The rows of one part: what, value, unit, note; the last one of all of it, with the last words of one that failed.

    limit: seconds, those of `LIMITS` without it.
    """
    began, limit, rows = time.perf_counter(), limit or LIMITS[part], []
    with tempfile.TemporaryDirectory() as folder:
        while True:
            command = command_of(part, device, small, Path(folder))
            more = ["--after", str(len(rows))] if rows else []
            output, errors, code = ran([*command, *more], limit - (time.perf_counter() - began))
            before = len(rows)
            for line in output.splitlines():
                with contextlib.suppress(ValueError):  # a line that the limit has cut
                    rows += [json.loads(line)] if line.startswith('{"what"') else []
            if part != "recipes" or code in (0, 1, 2, 124) or len(rows) >= len(cases(small)):
                break
            if code != ENDED:  # the case has ended the process: it is the one after the last row
                what = " ".join((cases(small)[len(rows)][0], *cases(small)[len(rows)][1]))
                rows.append({"what": what, "value": None, "unit": "", "note": f"FAILED: the process ended ({code})"})
            if len(rows) == before or len(rows) >= len(cases(small)):
                break
        if part == "objective":
            rows += products(Path(folder, "objective.json"))
    text = errors.strip() or output.strip() or "no output"
    said = f"over its limit of {limit:.0f} s" if code == 124 else text.splitlines()[-1]
    summary = "passed" if code == 0 else f"FAILED ({code}): {said[:200]}"
    if lost := sum(str(row["note"]).startswith("FAILED") for row in rows):
        summary = f"FAILED: {lost} of {len(rows)}" + ("" if code in (0, ENDED) else f"; {said[:200]}")
    if part == "tests" and code == 0:
        summary = output.strip().splitlines()[-1]
    whole = {"what": f"{part}: whole", "value": time.perf_counter() - began, "unit": "s", "note": summary}
    return [*rows, whole if code == 0 else {**whole, "said": f"{output[-2000:]}\n{errors[-4000:]}"}]


def products(table: Path) -> list[dict[str, Any]]:
    """Rows of the objective's table, as far as it was written."""
    if not table.exists():
        return []
    found = json.loads(table.read_text(encoding="utf-8"))
    worst = ", ".join(f"{form} {value:.0e}" for form, value in found["gradient_errors"].items() if form != "released")
    rows = [{"what": "objective, largest deviation of a gradient", "value": None, "unit": "", "note": worst}]
    for row in sorted(found["rows"], key=lambda row: row["n"]):
        for form in found["gradient_errors"]:
            timed = row["forms"].get(form)
            note = "does not fit into this memory, or failed"
            if timed:
                share = row["floor_seconds"] / timed["seconds"]
                note = f"{share:.0%} of the measured rate of products, {timed['extra_bytes'] / 2**20:,.0f} MiB"
            seconds = timed and timed["seconds"]
            rows.append({"what": f"objective, {form}, N = {row['n']:,}", "value": seconds, "unit": "s", "note": note})
    return rows


def obstacle() -> str:
    """Why this torch has no CUDA device, in a sentence."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: install one from pytorch.org for this driver"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return ""
            torch.cuda.init()
        except Exception as error:
            told = [*told, argparse.Namespace(message=error)]
    reason = "".join(f" ({' '.join(str(warning.message).split())[:300]})" for warning in told[:1])
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no device{reason}"


def missing(parts: list[str]) -> dict[str, str]:
    """Part -> the packages that it will not find."""
    found = {part: [name for name in NEEDED.get(part, ()) if importlib.util.find_spec(name) is None] for part in parts}
    return {part: ", ".join(names) for part, names in found.items() if names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", default=",".join(LIMITS), help="comma-separated")
    parser.add_argument("--slack", type=float, default=1.0, help="this many times the limits, on a slow machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("recipes", "steps", "trainer", "cache"), help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "recipes":
        found = recipes(options.device, options.small, options.after)
    elif options.part:
        found = {"steps": steps, "trainer": trainer, "cache": cache}[options.part](options.device, options.small)
    if options.part:
        for row in found:
            print(json.dumps(row), flush=True)
        return
    import torch

    parts = options.parts.split(",")
    if unknown := sorted(set(parts) - set(LIMITS)):
        parser.error(f"--parts {','.join(unknown)}: the parts are {', '.join(LIMITS)}")
    if options.device.startswith("cuda") and (why := obstacle()):
        sys.exit(f"{why}; benchmarks/gpu.py --device cpu --small shows that the calls run")
    for part, names in missing(parts).items():
        print(f"{part} will fail: {names} not installed (pip install '.[dev,benchmarks]')", file=sys.stderr)
    about: dict[str, Any] = {"device": platform.machine(), "torch": torch.__version__, "small": options.small}
    if options.device.startswith("cuda"):
        about["device"] = torch.cuda.get_device_name(options.device)
        about["memory_bytes"] = torch.cuda.get_device_properties(options.device).total_memory
        about["cuda"] = torch.version.cuda

    def keep(rows: list[dict[str, Any]]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")

    keep([])  # a place that cannot be written is told before and not after
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + options.slack * sum(LIMITS[part] for part in parts)
    for number, part in enumerate(parts):
        later = options.slack * sum(LIMITS[name] for name in parts[number + 1 :])
        try:
            found = measure(part, options.device, options.small, end - later - time.perf_counter())
        except Exception as error:
            found = [{"what": f"{part}: whole", "value": None, "unit": "", "note": failed(error)}]
        for row in found:
            rows.append({"part": part, **row})
            value = "" if row["value"] is None else f"{row['value']:12,.2f} {row['unit']:10}"
            print(f"{row['what']:60} {value:24} {row['note']}", flush=True)
        keep(rows)
    if lost := [row["what"] for row in rows if row["what"].endswith(": whole") and row["note"].startswith("FAILED")]:
        sys.exit(f"failed: {', '.join(lost)}")


if __name__ == "__main__":
    main()
