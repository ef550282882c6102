"""The commands of docs/phone.md at a small size, each with its seconds: from a ViT-B/16 teacher to files for a phone.

    python benchmarks/phone.py --data dataset_flickr8k.json [--images 64] [--steps 10] [--out docs/performance/phone]

The teacher is ViT-B-16 with random weights unless --teacher names another: it costs what a trained one costs, and the
student learns nothing from it. Targets whose extra is missing are left out. Wall and processor seconds (of all threads)
are given; the second hold on a busy machine too. Data in Karpathy's form.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from clipdistill.bench.device import describe_device, describe_libraries
from clipdistill.runtime.console import file_size, say
from clipdistill.runtime.files import write_json, write_text

STUDENT = "TinyCLIP-ViT-8M-16-Text-3M"
TARGETS = (
    ("onnx", "", "onnxruntime"),
    ("litert", "", "litert_torch"),
    ("litert", "--int8", "litert_torch"),
    ("executorch", "--int8", "executorch"),
    ("coreml", "--fp16", "coremltools"),
)


def small_data(source: Path, folder: Path, images: int) -> Path:
    """`images` training and a quarter as many test (else val) images of `source`, with its pictures beside it."""
    values = json.loads(source.read_text(encoding="utf-8"))
    parts = {split: [i for i in values["images"] if i["split"] == split] for split in ("train", "val", "test")}
    wanted = [*parts["train"][:images], *(parts["test"] or parts["val"])[: max(4, images // 4)]]
    for beside in source.resolve().parent.iterdir():
        if beside.is_dir():
            (folder / beside.name).symlink_to(beside)
    write_json(folder / "pairs.json", {**values, "images": wanted})
    return folder / "pairs.json"


def commands(arguments: argparse.Namespace, data: Path, work: Path) -> list[tuple[str, list[str]]]:
    """(what it does, the command line) of each step of the page."""
    run, test = str(work / "run"), ["--data", str(data)]
    cache = ["cache", "--teacher", arguments.teacher, "--data", str(data), "--split", "train", "--out"]
    train = ["train", "--recipe", "clip-rd", "--teacher", f"cache:{work / 'cache'}", "--student", arguments.student]
    train += ["--data", str(data), "--split", "train", "--out", run, "train.batch_size=32"]
    train += [f"train.steps={arguments.steps}", "train.warmup_steps=2"]
    if arguments.teacher == "ViT-B-16":  # training refuses a teacher that knows nothing
        train.append("preflight.allow_weak_teacher=true")
    steps = [("the teacher's embeddings", [*cache, str(work / "cache")]), ("training", train)]
    steps.append(("scores", ["eval", run, *test]))
    exports = []
    for target, option, package in TARGETS:
        if importlib.util.find_spec(package) is None:
            say(f"left out: --to {target} needs {package}")
            continue
        out = str(work / f"{target}{option}")
        more = [] if target == "coreml" and sys.platform != "darwin" else test
        more = [*([option] if option else []), *more]
        more += ["--budget", "100"] if option == "--int8" else []  # a handful of pictures says nothing about a loss
        steps.append((f"export to {target} {option}".strip(), ["export", run, "--to", target, "--out", out, *more]))
        exports.append(out)
    steps.append(("the report", ["report", run, *exports, "--out", str(work / "report.html")]))
    return steps


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "teacher": arguments.teacher,
        "student": arguments.student,
        "images": arguments.images,
        "steps": arguments.steps,
        "device": describe_device(torch.device("cpu")),
        "libraries": describe_libraries(),
        "load": os.getloadavg()[0],
        "rows": [],
        "exports": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = small_data(arguments.data, work, arguments.images)
        for what, command in commands(arguments, data, work):
            begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-m", "clipdistill", *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{what}: {done.stderr[-1000:]}")
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            row = {"what": what, "seconds": time.perf_counter() - begin, "processor_seconds": busy}
            result["rows"].append(row)
            say(f"{what}: {row['seconds']:.0f} s, of a processor {busy:.0f} s")
        for manifest in sorted(work.glob("*/manifest.json")):
            values = json.loads(manifest.read_text(encoding="utf-8"))
            if "towers" in values and "kind" in values:
                size = sum(facts["bytes"] for facts in values["towers"].values())
                result["exports"].append(
                    {"target": manifest.parent.name, "bytes": size, "latency": values.get("latency")}
                )
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# From a teacher to a phone",
        "",
        f"`python benchmarks/phone.py`: teacher {result['teacher']}, student {result['student']}, {result['images']} "
        f"pictures with their captions, {result['steps']} steps of 32 pairs; {result['device']['label']}, load "
        f"{result['load']:.0f}.",
        "",
        "| step | seconds | of a processor |",
        "|---|---|---|",
        *(f"| {row['what']} | {row['seconds']:.0f} | {row['processor_seconds']:.0f} |" for row in result["rows"]),
        "",
        "| export | both towers | ms a picture (torch) | ms a caption (torch) |",
        "|---|---|---|---|",
    ]
    for export in result["exports"]:
        times = export["latency"] or {}
        cells = [
            f"{times[tower]['ms']:.1f} ({times[tower]['torch_ms']:.1f})" if tower in times else "not run here"
            for tower in ("image", "text")
        ]
        lines.append(f"| {export['target'].replace('--', ' ')} | {file_size(export['bytes'])} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    return "\n".join([*lines, "", versions, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", default="ViT-B-16")
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/performance/phone"))
    arguments = parser.parse_args()
    result = run(arguments)
    write_json(arguments.out.with_suffix(".json"), result)
    write_text(arguments.out.with_suffix(".md"), page := markdown(result))
    print(page)


if __name__ == "__main__":
    main()
