"""One picture: R@1 of an ablation's variants over the time of a picture, exported, the image towers taking turns.

    python benchmarks/accuracy_over_speed.py runs/ablation-sizes --exports export --teacher export/teacher=22.5 \\
        --out docs/images/accuracy-over-speed.svg --json accuracy-over-speed.json

`--exports`: a folder with one ONNX export for each variant, by its name; variants without one are left out.
`--teacher`: the teacher's export and its text-to-image R@1 in per cent. Names are METHOD-SIZEpx: a line for each
method. Times are the least of the rounds, pictures of noise, whiskers the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from importlib import resources
from pathlib import Path

import numpy as np
import onnxruntime

from clipdistill.report.svg import Axis, Chart, figure, text
from clipdistill.runtime.files import read_json, write_json, write_text

COLOURS = {"clip": 3, "clipdistill": 1}


def session(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """Of the image tower of an export."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(folder / "image.onnx", options, providers=["CPUExecutionProvider"])


def milliseconds(exports: dict[str, Path], batch: int, threads: int, rounds: int) -> dict[str, float]:
    """A picture's time by each export."""
    sessions = {name: session(folder, threads) for name, folder in exports.items()}
    best = dict.fromkeys(exports, float("inf"))
    for number in range(rounds + 1):  # the first warms up
        for name, one in sessions.items():
            (given,) = one.get_inputs()
            shape = [batch, *given.shape[1:]]
            pictures = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            began = time.perf_counter()
            one.run(None, {given.name: pictures})
            if number:
                best[name] = min(best[name], (time.perf_counter() - began) / batch * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--teacher", metavar="FOLDER=R@1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    variants = read_json(given.ablation / "ablation.json")["variants"]
    exports = {v["name"]: given.exports / v["name"] for v in variants if (given.exports / v["name"]).is_dir()}
    recall, spread = {}, {}
    for variant in variants:
        (seeds,) = (s["by_seed"] for s in variant["scores"] if s["metric"] == "t2i_R@1")
        recall[variant["name"]] = 100 * statistics.mean(seeds)
        spread[variant["name"]] = 100 * statistics.stdev(seeds) if len(seeds) > 1 else 0.0
    if given.teacher:
        folder, _, percent = given.teacher.rpartition("=")
        exports["teacher"], recall["teacher"], spread["teacher"] = Path(folder), float(percent), 0.0
    took = milliseconds(exports, given.batch, given.threads, given.rounds)
    for name, ms in took.items():
        print(f"{name:24} {ms:7.2f} ms a picture   R@1 {recall[name]:5.2f} +- {spread[name]:.2f}")
    if given.json:
        rows = [{"name": n, "milliseconds": ms, "t2i_R@1": recall[n], "sd": spread[n]} for n, ms in took.items()]
        write_json(given.json, {"batch": given.batch, "threads": given.threads, "rounds": given.rounds, "rows": rows})

    lines: dict[str, list[tuple[float, str]]] = {}
    for name, ms in took.items():
        lines.setdefault(re.sub(r"-\d+px$", "", name), []).append((ms, name))
    x = Axis(min(took.values()), max(took.values()), "ms a picture, exported to ONNX", log=True)
    y = Axis(
        min(recall[n] for n in took), max(recall[n] for n in took), "text-to-image R@1, %", show=lambda v: f"{v:g}"
    )
    chart = Chart(x, y, "accuracy over speed", width=720, height=360)
    for method, points in lines.items():
        colour = COLOURS.get(method, 0)
        points.sort()
        chart.line([ms for ms, _ in points], [recall[name] for _, name in points], colour, "")
        for ms, name in points:
            at, reach = recall[name], spread[name]
            tip = f"{name}: {at:.1f} % at {ms:.1f} ms"
            chart.point(ms, at, colour, tip, y_range=(at - reach, at + reach) if reach else None, focus=False)
        chart.label(points[-1][0] * 1.04, recall[points[-1][1]], method, colour)
    style = resources.files("clipdistill.ablate").joinpath("picture.css").read_text(encoding="utf-8")
    words = f"{given.batch} pictures at once, {given.threads} threads; whiskers: standard deviation over seeds"
    write_text(given.out, figure(720, 384, chart.name, [chart.render((0, 0)), text(360, 378, words, "middle")], style))


if __name__ == "__main__":
    main()
