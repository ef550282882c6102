"""Training steps against open_clip's own trainer and plain eager torch, in turns, on real captions.

    python benchmarks/train.py --data captions.json [--student ViT-T-16] [--batch 32] [--quick] [--json train.json]

For each precision: parts, one step each in turn (forward, contrastive loss, backward, AdamW), of plain torch at full
context and of the same with captions cut, fused AdamW, math attention and (--compile) compiled towers added one after
the other; and runs: `open_clip_train.main` and `clipdistill train` as they are started by hand, in turns, on the same
pictures, captions and threads, pairs a second after the first step as each writes in its log. open_clip's trainer needs
pip install 'clipdistill[benchmarks]'. Ratios are medians over rounds, with their least and greatest.
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
from clipdistill.models import build_student
from clipdistill.objective import Objective
from clipdistill.train.step import Towers, forward_backward

PARTS = ("plain", "captions cut", "fused AdamW", "math attention", "compiled")


def step_of(part: str, arguments: argparse.Namespace, source: PairSource, precision: str) -> Callable[[], float]:
    """A function that takes one step with all parts up to `part` and returns its seconds, waiting for data left out."""
    level = PARTS.index(part)
    student = build_student(arguments.student, seed=0)
    if level < 1:
        student._only_text = False  # the switch: a tower that is said to read its padding
    towers, objective = Towers(student.module.train()), Objective({"task": 1.0}, student.embed_dim, student.embed_dim)
    if level >= 4:
        towers.compile_for(arguments.batch)
    optimiser = torch.optim.AdamW(towers.parameters(), lr=1e-5, fused=level >= 2 or None)
    steps = arguments.steps * arguments.rounds + 2
    batches = iter(PairLoader(source, batch_size=arguments.batch, student=student, steps=steps, caption="random"))

    def step() -> float:
        batch = next(batches)
        began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        forward_backward(
            towers, objective, batch.student_images, batch.student_tokens, None,
            micro_batch=None, precision=precision, seed=(0, 0, 0), attention="math" if level >= 3 else "default",
        )  # fmt: skip
        optimiser.step()
        return time.perf_counter() - began

    return step


def parts(arguments: argparse.Namespace, source: PairSource, precision: str) -> dict[str, Any]:
    """Seconds of a step by part, and the ratio of plain torch to each, round by round."""
    names = PARTS if arguments.compile else PARTS[:-1]
    steps = {name: step_of(name, arguments, source, precision) for name in names}
    for step in steps.values():
        step()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.steps * arguments.rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return {
        name: {
            "seconds": statistics.median(values),
            **spread([plain / own for plain, own in zip(seconds["plain"], values)]),
        }
        for name, values in seconds.items()
    }


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


def theirs(arguments: argparse.Namespace, pairs: Path, precision: str, folder: Path) -> float:
    """Pairs a second of `open_clip_train.main`, the first step left out."""
    configs = folder / "configs"  # students of ours by the same name
    configs.mkdir(exist_ok=True)
    architecture = build_student(arguments.student, seed=0).architecture
    (configs / f"{arguments.student}.json").write_text(json.dumps(architecture), encoding="utf-8")
    start = (
        "import sys, torch, open_clip; torch.set_num_threads(int(sys.argv.pop(1))); "
        "open_clip.add_model_config(sys.argv.pop(1)); from open_clip_train.main import main; "
    )
    told = run(
        [
            sys.executable, "-c", start + "main(sys.argv[1:])", str(arguments.threads), str(configs),
            "--train-data", str(pairs), "--dataset-type", "csv", "--model", arguments.student, "--device", "cpu",
            "--batch-size", str(arguments.batch), "--epochs", "1", "--workers", "0", "--warmup", "1", "--lr", "1e-5",
            "--precision", "fp32" if precision == "fp32" else "amp_bf16", "--log-every-n-steps", "1",
            "--save-frequency", "0", "--logs", str(folder / "theirs"), "--name", f"{time.time_ns()}",
        ]
    )  # fmt: skip
    seconds = [float(found) for found in re.findall(r"Train Epoch.*?Batch \(t\): ([\d.]+)", told)][1:]
    return arguments.batch / statistics.mean(seconds)


def ours(arguments: argparse.Namespace, pairs: Path, precision: str, folder: Path, attention: str) -> float:
    """Pairs a second of `clipdistill train`, the first step left out."""
    out = folder / f"ours-{time.time_ns()}"
    start = "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); from clipdistill.cli import main; "
    run(
        [
            sys.executable, "-c", start + "sys.exit(main(sys.argv[1:]))", str(arguments.threads),
            "train", "--recipe", "clip", "--data", str(pairs), "--student", arguments.student, "--out", str(out),
            "--device", "cpu", "--quiet", f"train.batch_size={arguments.batch}", "train.epochs=null",
            f"train.steps={arguments.steps}", "train.log_every=1", f"train.precision={precision}",
            "preflight.enabled=false", f"train.attention={attention}",
            f"train.compile={str(arguments.compile).lower()}",
        ]
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    return arguments.batch / statistics.mean(arguments.batch / row["samples_per_second"] for row in rows)


def runs(arguments: argparse.Namespace, pairs: Path, precision: str, folder: Path, attention: str) -> dict[str, Any]:
    """Whole runs of both trainers in turn."""
    found: dict[str, list[float]] = {"open_clip": [], "clipdistill": []}
    for _ in range(arguments.rounds):
        found["open_clip"].append(theirs(arguments, pairs, precision, folder))
        found["clipdistill"].append(ours(arguments, pairs, precision, folder, attention))
    ratios = [own / other for own, other in zip(found["clipdistill"], found["open_clip"])]
    return {name: statistics.median(values) for name, values in found.items()} | spread(ratios)


def ratio_of(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"


def markdown(results: dict[str, Any]) -> Iterator[str]:
    yield f"# Training steps\n\n{results['machine']}; {results['settings']}\n"
    for precision, found in results["precisions"].items():
        yield f"## {precision}\n"
        yield "| parts, one added after the other | s a step | against plain torch (least to greatest) |"
        yield "|---|---|---|"
        for name, row in found["parts"].items():
            yield f"| {name} | {row['seconds']:.2f} | {ratio_of(row)} |"
        if "runs" in found:
            row = found["runs"]
            yield (
                f"\nWhole runs: {row['clipdistill']:.1f} pairs a second, open_clip's trainer {row['open_clip']:.1f}: "
                f"{ratio_of(row)} times, {found['attention']} attention.\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs in any form that `clipdistill train` reads")
    parser.add_argument("--student", default="ViT-T-16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--compile", action="store_true", help="compiled towers too (minutes more)")
    parser.add_argument("--no-runs", dest="runs", action="store_false", help="parts only: no open_clip trainer needed")
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps")
    parser.add_argument("--json", type=Path, help="results; the same as Markdown goes beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds = 3, 1
    torch.set_num_threads(arguments.threads)
    source = open_pairs(DataConfig(path=arguments.data), default_split="train")
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {arguments.threads} threads, torch {torch.__version__}"
    length = f"{arguments.rounds} rounds of {arguments.steps} steps"
    results: dict[str, Any] = {
        "machine": machine,
        "settings": f"{arguments.student}, batch {arguments.batch}, {length}",
        "precisions": {},
    }
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        pairs = write_pairs(source, arguments.batch * arguments.steps, folder) if arguments.runs else folder
        for precision in arguments.precisions.split(","):
            found: dict[str, Any] = {"parts": parts(arguments, source, precision)}
            faster = found["parts"]["math attention"]["seconds"] < 0.95 * found["parts"]["fused AdamW"]["seconds"]
            found["attention"] = "math" if faster else "default"  # as train.attention=auto decides in longer runs
            if arguments.runs:
                found["runs"] = runs(arguments, pairs, precision, folder, found["attention"])
            results["precisions"][precision] = found
    text = "\n".join(markdown(results))
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
