"""Training steps against open_clip's own trainer and plain eager torch, in turns, on real captions.

    python benchmarks/train.py --data captions.json [--quick] [--json train.json]
    python benchmarks/train.py --data captions.json --students ViT-T-16:bf16 --only runs,parts

For each student and precision (--students, those of the table in docs/performance.md):
runs: `open_clip_train.main` and `clipdistill train` as they are started by hand, in turns, on the same pictures,
captions and threads; pairs a second after the first step, as each writes in its log; rd: CLIP-RD from a cached teacher
against open_clip's plain contrastive run, the same way (random weights: a step takes as long); curves: losses of 200
steps with captions cut and not cut, same seed, fp32; parts: one step each in turn (forward, contrastive loss, backward,
AdamW) of plain torch at the full context, and of the same with captions cut and in groups, lean blocks, fused AdamW,
math attention and (--compile) compiled towers added one after the other.
open_clip's trainer needs  pip install 'clipdistill[benchmarks]'. Ratios are medians over rounds, with their least and
greatest. --quick: one round of few steps; what does not fit into its 9 minutes is left out and said.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.models import build_student, save_model
from clipdistill.models.blocks import as_open_clip
from clipdistill.objective import Objective
from clipdistill.runtime.machine import keep_freed_memory, return_freed_memory
from clipdistill.train.step import Towers, forward_backward

PARTS = ("plain", "captions cut", "captions in groups", "lean blocks", "fused AdamW", "math attention", "compiled")
STUDENTS = "ViT-T-16:bf16,ViT-T-16:fp32,TinyCLIP-ViT-8M-16-Text-3M:fp32"
ONLY = "runs,rd,curves,parts"
QUICK_SECONDS = 9 * 60.0
CURVE_STUDENT, CURVE_BATCH = "TinyCLIP-ViT-8M-16-Text-3M", 4


def trained(
    name: str, batch: int, cut: bool = True, groups: bool = True, lean: bool = True, fused: bool = True
) -> tuple[Any, Towers, Objective, Any]:
    """A student with random weights and what trains it. cut: the switch, a tower that is said to read its padding."""
    student = build_student(name, seed=0)
    if not cut:
        student._only_text = False
    if not lean:
        as_open_clip(student.module)
    towers, objective = (
        Towers(student.module.train(), group_captions=cut and groups),
        Objective({"task": 1.0}, student.embed_dim, student.embed_dim),
    )
    return student, towers, objective, torch.optim.AdamW(towers.parameters(), lr=1e-5, fused=fused or None)


def step_of(part: str, arguments: Any, source: PairSource, name: str, precision: str) -> Callable[[], float]:
    """A function that takes one step with all parts up to `part` and returns its seconds, waiting for data left out."""
    level = PARTS.index(part)
    student, towers, objective, optimiser = trained(
        name, arguments.batch, level >= 1, level >= 2, level >= 3, level >= 4
    )
    if level >= 6:
        towers.compile_for(arguments.batch)
    steps = arguments.steps * arguments.rounds + 2
    batches = iter(PairLoader(source, batch_size=arguments.batch, student=student, steps=steps, caption="random"))

    def step() -> float:
        batch = next(batches)
        began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        forward_backward(
            towers, objective, batch.student_images, batch.student_tokens, None,
            micro_batch=None, precision=precision, seed=(0, 0, 0), attention="math" if level >= 5 else "default",
        )  # fmt: skip
        optimiser.step()
        return time.perf_counter() - began

    return step


def parts(
    arguments: Any, source: PairSource, name: str, precision: str, names: tuple[str, ...], turns: int
) -> dict[str, Any]:
    """Seconds of a step by part, and the ratio of the first part to each, turn by turn."""
    steps = {part: step_of(part, arguments, source, name, precision) for part in names}
    for step in steps.values():
        step()  # warm-up
    seconds: dict[str, list[float]] = {part: [] for part in steps}
    for _ in range(turns):
        for part, step in steps.items():
            seconds[part].append(step())
    first = seconds[names[0]]
    del steps
    return_freed_memory()  # whole runs in other processes follow
    return {
        part: {"seconds": statistics.median(values), **spread([plain / own for plain, own in zip(first, values)])}
        for part, values in seconds.items()
    }


def curves(source: PairSource, steps: int, seconds: float) -> dict[str, float]:
    """The losses of `steps` steps with captions cut and not cut, in turns, from the same weights on the same batches.

    Fewer steps when `seconds` are over before.
    """
    began = time.monotonic()
    both = [trained(CURVE_STUDENT, CURVE_BATCH, cut) for cut in (True, False)]
    loaders = [PairLoader(source, batch_size=CURVE_BATCH, student=student, steps=steps) for student, *_ in both]
    losses: list[list[float]] = [[], []]
    spent = [0.0, 0.0]
    for batches in zip(*loaders):
        for i, ((_, towers, objective, optimiser), batch) in enumerate(zip(both, batches)):
            start = time.perf_counter()
            optimiser.zero_grad(set_to_none=True)
            output = forward_backward(
                towers, objective, batch.student_images, batch.student_tokens, None,
                micro_batch=None, precision="fp32", seed=(0, 0, 0),
            )  # fmt: skip
            optimiser.step()
            losses[i].append(float(output.total.detach()))
            spent[i] += time.perf_counter() - start
        if time.monotonic() - began > seconds:
            break
    differences = [abs(a - b) / abs(b) for a, b in zip(*losses)]
    return {
        "steps": len(losses[0]), "first": losses[1][0], "last": losses[1][-1], "last_cut": losses[0][-1],
        "largest_relative_difference": max(differences), "median_relative_difference": statistics.median(differences),
        "cut_seconds": spent[0], "uncut_seconds": spent[1],
    }  # fmt: skip


def spread(ratios: list[float]) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def write_pairs(source: PairSource, rows: int, folder: Path) -> Path:
    """Pictures and one caption each as open_clip's trainer and ours read them: a tab-separated file."""
    path = folder / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for i in range(min(rows, len(source))):
            image = folder / f"{i}.jpg"
            source.image(i).convert("RGB").save(image, quality=95)
            captions = source.captions(i)
            writer.writerow([str(image), captions if isinstance(captions, str) else captions[0]])
    return path


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def theirs(arguments: Any, name: str, pairs: Path, precision: str, folder: Path) -> float:
    """Pairs a second of `open_clip_train.main`, the first step left out."""
    configs = folder / "configs"  # students of ours by the same name
    configs.mkdir(exist_ok=True)
    architecture = build_student(name, seed=0).architecture
    (configs / f"{name}.json").write_text(json.dumps(architecture), encoding="utf-8")
    start = (
        "import sys, torch, open_clip; torch.set_num_threads(int(sys.argv.pop(1))); "
        "open_clip.add_model_config(sys.argv.pop(1)); from open_clip_train.main import main; "
    )
    told = run(
        [
            sys.executable, "-c", start + "main(sys.argv[1:])", str(arguments.threads), str(configs),
            "--train-data", str(pairs), "--dataset-type", "csv", "--model", name, "--device", arguments.device,
            "--batch-size", str(arguments.batch), "--epochs", "1", "--workers", "0", "--warmup", "1", "--lr", "1e-5",
            "--precision", "fp32" if precision == "fp32" else "amp_bf16", "--log-every-n-steps", "1",
            "--save-frequency", "0", "--logs", str(folder / "theirs"), "--name", f"{time.time_ns()}",
        ]
    )  # fmt: skip
    seconds = [float(found) for found in re.findall(r"Train Epoch.*?Batch \(t\): ([\d.]+)", told)][1:]
    return arguments.batch / statistics.mean(seconds)


def ours(
    arguments: Any, name: str, pairs: Path, precision: str, folder: Path, attention: str, teacher: Path | None
) -> float:
    """Pairs a second of `clipdistill train` (with a cached teacher: CLIP-RD), the first step left out."""
    out = folder / f"ours-{time.time_ns()}"
    recipe = ["--recipe", "clip"] if teacher is None else ["--recipe", "clip-rd", "--teacher", f"cache:{teacher}"]
    clipdistill(
        arguments,
        "train", *recipe, "--data", str(pairs), "--student", name, "--out", str(out),
        "--device", arguments.device, "--quiet", f"train.batch_size={arguments.batch}", "train.epochs=null",
        f"train.steps={arguments.steps}", "train.log_every=1", f"train.precision={precision}",
        "preflight.enabled=false", f"train.attention={attention}", "train.cache_samples=0",
        f"train.compile={str(arguments.compile).lower()}",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    return arguments.batch / statistics.mean(arguments.batch / row["samples_per_second"] for row in rows)


def clipdistill(arguments: Any, *words: str) -> None:
    """A command of ours, with the threads of the benchmark."""
    start = "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); from clipdistill.cli import main; "
    run([sys.executable, "-c", start + "sys.exit(main(sys.argv[1:]))", str(arguments.threads), *words])


def cached_teacher(arguments: Any, pairs: Path, folder: Path) -> Path:
    """A store of the embeddings of a teacher with random weights."""
    save_model(build_student("TinyCLIP-ViT-8M-16-Text-3M", seed=1), folder / "teacher")
    out = folder / "cache"
    clipdistill(
        arguments, "cache", "--teacher", str(folder / "teacher"), "--data", str(pairs), "--out", str(out),
        "--device", arguments.device, "--quiet",
    )  # fmt: skip
    return out


def runs(
    arguments: Any, name: str, pairs: Path, precision: str, folder: Path, attention: str, teacher: Path | None = None
) -> dict[str, Any]:
    """Whole runs of both trainers in turn."""
    found: dict[str, list[float]] = {"open_clip": [], "clipdistill": []}
    for _ in range(arguments.rounds):
        found["open_clip"].append(theirs(arguments, name, pairs, precision, folder))
        found["clipdistill"].append(ours(arguments, name, pairs, precision, folder, attention, teacher))
    ratios = [own / other for own, other in zip(found["clipdistill"], found["open_clip"])]
    medians = {trainer: statistics.median(values) for trainer, values in found.items()}
    return {**medians, "attention": attention, **spread(ratios)}


def ratio_of(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"


def markdown(results: dict[str, Any]) -> Iterator[str]:
    yield f"# Training steps\n\n{results['machine']}; {results['settings']}\n"
    rows = [(title, row) for title, row in results["runs"].items()]
    if rows:
        yield "| whole runs | pairs a second | open_clip's trainer | ratio (least to greatest) | attention |"
        yield "|---|---|---|---|---|"
        for title, row in rows:
            own, other = f"{row['clipdistill']:.1f}", f"{row['open_clip']:.1f}"
            yield f"| {title} | {own} | {other} | {ratio_of(row)} | {row['attention']} |"
    if found := results.get("curves"):
        most, median = found["largest_relative_difference"], found["median_relative_difference"]
        yield (
            f"\nLosses of {found['steps']} steps of {CURVE_STUDENT}, {CURVE_BATCH} pairs each, fp32, same seed: from "
            f"{found['first']:.5f} to {found['last']:.5f}, with captions cut {found['last_cut']:.5f}; relative "
            f"difference at most {most:.1e}, median {median:.1e}; {found['cut_seconds']:.0f} s instead of "
            f"{found['uncut_seconds']:.0f} s."
        )
    for title, found in results["parts"].items():
        yield f"\n## {title}\n"
        yield "| parts, one added after the other | s a step | against plain torch (least to greatest) |"
        yield "|---|---|---|"
        for name, row in found.items():
            yield f"| {name} | {row['seconds']:.2f} | {ratio_of(row)} |"
    for sentence in results["left_out"]:
        yield f"\nLeft out for want of time: {sentence}."


def work(arguments: Any, source: PairSource, folder: Path, results: dict[str, Any]) -> None:
    """Everything that was asked for, into `results`, in the order of its weight; no longer than allowed."""
    began, limit = time.monotonic(), QUICK_SECONDS if arguments.quick else float("inf")
    only = set(arguments.only.split(","))
    last = 0.0

    def fits(what: str) -> bool:
        # the next one may take as long as the longest so far
        if time.monotonic() - began + last > limit:
            results["left_out"].append(what)
            return False
        print(f"{time.monotonic() - began:5.0f} s  {what}", file=sys.stderr, flush=True)
        return True

    students = [entry.split(":") for entry in arguments.students.split(",")]
    pairs = write_pairs(source, arguments.batch * arguments.steps, folder) if only & {"runs", "rd"} else folder
    attention: dict[tuple[str, str], str] = {}
    teacher: Path | None = None
    for name, precision in students if only & {"runs", "rd"} else []:
        start = time.monotonic()
        if not fits(title := f"{name}, {precision}"):
            continue
        # as train.attention=auto decides by itself in longer runs
        timed = parts(arguments, source, name, precision, ("fused AdamW", "math attention"), 2)
        faster = timed["math attention"]["seconds"] < 0.95 * timed["fused AdamW"]["seconds"]
        way = attention[name, precision] = "math" if faster else "default"
        if "runs" in only:
            results["runs"][f"contrastive, {title}"] = runs(arguments, name, pairs, precision, folder, way)
        last = max(last, time.monotonic() - start)
    if "rd" in only and attention and fits("CLIP-RD with a cached teacher"):
        start = time.monotonic()
        (name, precision), way = next(iter(attention.items()))
        teacher = cached_teacher(arguments, pairs, folder)
        found = runs(arguments, name, pairs, precision, folder, way, teacher)
        results["runs"][f"CLIP-RD, cached teacher, against contrastive, {name}, {precision}"] = found
        last = max(last, time.monotonic() - start)
    if "curves" in only and fits("loss curves"):
        results["curves"] = curves(source, arguments.curve_steps, limit - (time.monotonic() - began))
    if "parts" in only:
        names = PARTS if arguments.compile else PARTS[:-1]
        for name, precision in students[:1] if arguments.quick else students:
            if fits(f"parts of {name}, {precision}"):
                turns = arguments.steps * arguments.rounds if not arguments.quick else 2
                results["parts"][f"{name}, {precision}"] = parts(arguments, source, name, precision, names, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs in any form that `clipdistill train` reads")
    parser.add_argument("--students", default=STUDENTS, help="name:precision, separated by commas")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of runs and rd")
    parser.add_argument("--compile", action="store_true", help="compiled towers too (minutes more)")
    parser.add_argument("--only", default=ONLY, help="some of runs, rd, curves, parts")
    parser.add_argument("--quick", action="store_true", help="one round of 4 steps, at most 9 minutes on two cores")
    parser.add_argument("--json", type=Path, help="results; the same as Markdown goes beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds = min(arguments.steps, 4), 1
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `clipdistill train` does; the parts share it, plain torch too
    source = open_pairs(DataConfig(path=arguments.data), default_split="train")
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {arguments.threads} threads, torch {torch.__version__}"
    settings = f"batch {arguments.batch}, {arguments.rounds} rounds of {arguments.steps} steps"
    results: dict[str, Any] = {"machine": machine, "settings": settings, "runs": {}, "parts": {}, "left_out": []}
    with ExitStack() as held:
        work(arguments, source, Path(held.enter_context(tempfile.TemporaryDirectory())), results)
    text = "\n".join(markdown(results))
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
