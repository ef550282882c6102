"""What deployment buys: an exported student against its teacher and against itself in torch, in one run.

    python benchmarks/deploy.py [--student ViT-T-16] [--teacher ViT-B-16] [--batch 1,32] [--seconds 10]
    python benchmarks/deploy.py --student runs/rd --data dataset_flickr8k.json      # int8 calibrated, R@1 lost measured

Random weights unless names say otherwise: they are as fast as trained ones. All models and back ends alternate in
rounds, so ratios hold on a noisy machine. Writes docs/performance/deploy.json and .md (--out). With --data both int8
exports are made within the accuracy budget, so a tower that loses too much is measured in float32 and marked so.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from clipdistill.bench.cost import sample_inputs
from clipdistill.bench.device import busy_warning, describe_device, describe_libraries
from clipdistill.bench.timing import TimedTask, measure, median_interval, ratio_interval
from clipdistill.errors import MissingExtraError
from clipdistill.export.accuracy import open_calibration, open_test
from clipdistill.export.backends import make_graphs
from clipdistill.export.graphs import Exported, export_graphs
from clipdistill.models import ClipModel, load_model
from clipdistill.models.exported import load_graph, read_exported

TARGETS = (
    # (name, what, against, at least)
    ("exported student (float32) against the teacher in torch", "float32", "teacher, torch", 15.0),
    ("exported student (float32) against the student in torch", "float32", "student, torch", 1.5),
)
INT8_TARGET, INT8_POINTS = 1.5, 1.0


def towers_of(model: ClipModel) -> dict[str, Any]:
    """The towers in torch as after load_student: evaluation mode, inference mode."""
    module = model.module.eval()

    def run(encode: Any) -> Any:
        def call(values: torch.Tensor) -> object:
            with torch.inference_mode():
                return encode(values)

        return call

    return {"image": run(module.encode_image), "text": run(module.encode_text)}


def graph_towers(files: dict[str, Path], runtime: str) -> dict[str, Any]:
    runners = {tower: load_graph(path, runtime) for tower, path in files.items()}
    return {tower: (lambda values, run=run: run(values.numpy())) for tower, run in runners.items()}


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, ClipModel], dict[str, Any]]:
    """Variant -> tower -> function, both models, and what was lost by int8 (with --data)."""
    student, teacher = load_model(arguments.student, teacher=True), load_model(arguments.teacher, teacher=True)
    variants = {"teacher, torch": towers_of(teacher), "student, torch": towers_of(student)}
    facts: dict[str, Any] = {}
    test = open_test(arguments.data, None, arguments.limit) if arguments.data else None
    for runtime in arguments.runtimes.split(","):
        try:
            if test is None:
                for precision in ("float32", "int8"):
                    place = folder / f"{runtime}-{precision}"
                    place.mkdir()
                    files = make_graphs(student, place, runtime, int8=precision == "int8", opset=arguments.opset)
                    variants[f"student, {runtime} {precision}"] = graph_towers(files, runtime)
                continue
            calibration = open_calibration(arguments.data, arguments.calibration_size)
            for precision in ("float32", "int8"):
                done = export_graphs(
                    student,
                    folder / f"{runtime}-{precision}",
                    runtime=runtime,
                    int8=precision == "int8",
                    test=test,
                    calibration=calibration,
                    opset=arguments.opset,
                )
                runners = read_exported(done.folder, "export", runtime).module.runners
                variants[f"student, {runtime} {precision}"] = {
                    tower: (lambda values, run=run: run(values.numpy())) for tower, run in runners.items()
                }
                if precision == "int8":
                    facts[runtime] = accuracy_facts(done)
        except MissingExtraError as error:
            print(f"left out: {error}")
    return variants, {"student": student, "teacher": teacher}, facts


def accuracy_facts(done: Exported) -> dict[str, Any]:
    """R@1 before and after int8, and which towers stayed in float32."""
    assert done.before is not None
    assert done.after is not None
    return {
        "before": done.before.to_json(),
        "after": done.after.to_json(),
        "points_lost": done.before.mean - done.after.mean,
        "towers": {choice.tower: choice.text() for choice in done.choices},
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "student": arguments.student,
        "teacher": arguments.teacher,
        "threads": arguments.threads,
        "opset": arguments.opset,
        "seconds": arguments.seconds,
        "device": describe_device(torch.device("cpu")),
        "libraries": describe_libraries(),
        "warnings": [busy] if (busy := busy_warning()) else [],
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        variants, models, result["int8"] = prepare(arguments, Path(temporary))
        for tower in arguments.towers.split(","):
            for batch in (int(part) for part in arguments.batch.split(",")):
                inputs = {
                    name: sample_inputs(model, tower, batch, torch.device("cpu"), torch.float32)
                    for name, model in models.items()
                }
                tasks = []
                for name, towers in variants.items():
                    values = inputs[name.partition(",")[0]]
                    tasks.append(TimedTask(name, functools.partial(towers[tower], values), batch))
                session = measure(tasks, seconds=arguments.seconds, rounds=arguments.rounds)
                result["warnings"] += [f"{tower}, batch {batch}: {text}" for text in session.warnings]
                rates = {name: timing.rates() for name, timing in session.timings.items()}
                for name in variants:
                    value, low, high = median_interval(rates[name])
                    row = {
                        "tower": tower,
                        "batch": batch,
                        "variant": name,
                        "per_second": value,
                        "low": low,
                        "high": high,
                    }
                    row["median_ms"] = 1000 * session.timings[name].latency()[0]
                    row["ratios"] = {
                        other: ratio_interval(rates[name], rates[other]) for other in variants if other != name
                    }
                    result["rows"].append(row)
    result["targets"] = targets(result)
    return result


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The best image throughput of each kind over batch sizes and runtimes, against what was to be reached."""
    found = []
    rows = [row for row in result["rows"] if row["tower"] == "image"]
    for name, kind, against, least in TARGETS:
        ratios = [(row["ratios"][against], row) for row in rows if row["variant"].endswith(kind)]
        found += _target(name, ratios, least)
    for runtime in ("onnx", "openvino"):
        full = f"student, {runtime} float32"
        ratios = [(row["ratios"][full], row) for row in rows if row["variant"] == f"student, {runtime} int8"]
        found += _target(f"{runtime}: int8 against its float32 export", ratios, INT8_TARGET)
        if runtime in result["int8"]:
            lost = result["int8"][runtime]["points_lost"]
            name = f"{runtime}: points of R@1 lost by int8"
            found.append({"name": name, "value": lost, "at_most": INT8_POINTS, "reached": lost <= INT8_POINTS})
    return found


def _target(name: str, ratios: list[tuple[Any, dict[str, Any]]], least: float) -> list[dict[str, Any]]:
    if not ratios:
        return []
    (value, low, high), row = max(ratios, key=lambda pair: pair[0][0])
    where = f"{row['variant'].partition(', ')[2]}, batch {row['batch']}"
    facts = {"value": value, "low": low, "high": high, "where": where}
    return [{"name": name, **facts, "at_least": least, "reached": value >= least}]


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# Deployment",
        "",
        f"`python benchmarks/deploy.py`: student {result['student']}, teacher {result['teacher']}, "
        f"{result['threads']} threads, {result['device']['label']}.",
        "Medians over rounds in which all variants alternate, with 95 % intervals.",
        "",
        "| target | wanted | measured |",
        "|---|---|---|",
    ]
    for t in result["targets"]:
        if "at_least" in t:
            measured = f"{t['value']:.2f} x ({t['low']:.2f} to {t['high']:.2f}), {t['where']}"
            lines.append(f"| {t['name']} | at least {t['at_least']:g} x | {measured} |")
        else:
            lines.append(f"| {t['name']} | at most {t['at_most']:g} | {t['value']:+.2f} |")
    lines += ["", "| tower | batch | variant | per second | one call | x teacher, torch | x student, torch |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        ratios = [
            f"{row['ratios'][other][0]:.2f}" if other in row["ratios"] else ""
            for other in ("teacher, torch", "student, torch")
        ]
        rate = f"{row['per_second']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        cells = (row["tower"], str(row["batch"]), row["variant"], rate, f"{row['median_ms']:.1f} ms", *ratios)
        lines.append(f"| {' | '.join(cells)} |")
    for runtime, facts in result["int8"].items():
        before, after = (facts[key] for key in ("before", "after"))
        lines += ["", f"int8 with {runtime}, {before['protocol']}: R@1 image to text / text to image"]
        lines += [
            f"{100 * before['i2t_R@1']:.2f} / {100 * before['t2i_R@1']:.2f} before, "
            f"{100 * after['i2t_R@1']:.2f} / {100 * after['t2i_R@1']:.2f} after. {'. '.join(facts['towers'].values())}."
        ]
    lines += [""] + [f"Warning: {text}" for text in result["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="ViT-T-16", help="any model name or run folder")
    parser.add_argument("--teacher", default="ViT-B-16")
    parser.add_argument("--runtimes", default="onnx,openvino")
    parser.add_argument("--towers", default="image,text")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--seconds", type=float, default=10.0, help="timed seconds for each variant and setting")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--opset", type=int, default=20, help="20, or 23 with attention as one operator")
    parser.add_argument("--data", help="pairs: int8 is calibrated on them, and R@1 before and after is measured")
    parser.add_argument("--limit", type=int, help="measure R@1 on at most so many images")
    parser.add_argument("--calibration-size", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/performance"), help="folder for deploy.json and deploy.md"
    )
    arguments = parser.parse_args()
    result = run(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "deploy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "deploy.md").write_text(page := markdown(result), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
