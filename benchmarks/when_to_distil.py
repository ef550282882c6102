"""One picture: the gain of distillation over contrastive training, over steps, a line for each number of pictures.

    python benchmarks/when_to_distil.py runs/ablation-curves --out docs/images/when-to-distil.svg

From the claims `gain-NxS` (N training pictures, S steps) of benchmarks/ablation_pretrained_curves.yaml or
ablation_scratch.yaml; points are hollow where the interval holds zero.
"""

from __future__ import annotations

import argparse
import re
from importlib import resources
from pathlib import Path

from clipdistill.report.svg import Axis, Chart, figure, text
from clipdistill.runtime.files import read_json, write_text

COLOURS = {1000: 3, 3000: 7, 6000: 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    gains: dict[int, list[tuple[int, float, float, float]]] = {}
    ablation, metric = read_json(given.ablation / "ablation.json"), ""
    for claim in ablation["claims"]:
        found = re.fullmatch(r"gain-(\d+)x(\d+)", claim["id"])
        if found and claim["effect"] is not None:
            pictures, steps = map(int, found.groups())
            metric = claim["claim"].split("t2i_")[1]
            low, high = (claim[end] if claim[end] is not None else claim["effect"] for end in ("low", "high"))
            gains.setdefault(pictures, []).append((steps, *(100 * v for v in (claim["effect"], low, high))))
    values = [v for points in gains.values() for _, *numbers in points for v in numbers]
    y = Axis(min(0.0, *values), max(values), f"gain in text-to-image {metric}, points", show=lambda v: f"{v:g}")
    chart = Chart(
        Axis(90, 1800, f"steps of {ablation['setting']['batch_size']} pairs", log=True),
        y,
        "gain of distillation",
        width=720,
        height=360,
    )
    chart.path([80, 1900], [0, 0], "zero")
    for place, (pictures, points) in enumerate(sorted(gains.items())):
        points.sort()
        shift = 1.06 ** (place - 1)  # whiskers beside each other
        chart.line([s * shift for s, *_ in points], [g for _, g, _, _ in points], COLOURS[pictures], "")
        for steps, gain, low, high in points:
            hollow = low <= 0 <= high
            chart.point(
                steps * shift, gain, COLOURS[pictures], f"{gain:+.2f}", y_range=(low, high), focus=False, hollow=hollow
            )
        steps, gain, *_ = points[-1]
        chart.label(steps * 1.15, gain, f"{pictures:,} pictures", COLOURS[pictures])
    style = resources.files("clipdistill.ablate").joinpath("picture.css").read_text(encoding="utf-8")
    words = "whiskers: 95 % over seeds and queries; hollow: undecided"
    write_text(given.out, figure(720, 384, chart.name, [chart.render((0, 0)), text(360, 378, words, "middle")], style))


if __name__ == "__main__":
    main()
