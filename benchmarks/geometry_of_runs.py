"""Geometry of the students of an ablation, by variant, and whether any figure of it goes with R@1.

    python benchmarks/geometry_of_runs.py runs/ablation-pretrained --data captions.json --split val --out geometry.md

Each finished run's student embeds the pairs (`clipdistill eval --geometry` does one run). The table has means over
seeds with 95 % intervals (Student's t); its last line the Spearman correlation of each figure with R@1 over the
variants' means, and p of a permutation test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from clipdistill.data.open import open_pairs
from clipdistill.embed.encode import encode_pairs
from clipdistill.evaluate.geometry import geometry
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models import load_model
from clipdistill.runs.folder import RunFolder, run_folders
from clipdistill.runtime.files import write_json, write_text

FIGURES = {
    "R@1": lambda g, s: 100 * s["t2i_R@1"],
    "positive": lambda g, s: g["positive"]["mean"],
    "negative": lambda g, s: g["negative"]["mean"],
    "gap": lambda g, s: g["gap"],
    "gap / deviation of negatives": lambda g, s: g["gap"] / g["negative"]["std"],
    "hardest negative": lambda g, s: g["hard_negative"]["text"],
    "modality gap": lambda g, s: g["modality_gap"]["distance"],
    "image-image": lambda g, s: g["image_image"]["mean"],
    "text-text": lambda g, s: g["text_text"]["mean"],
    "uniformity": lambda g, s: s["uniformity"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    source = open_pairs(given.data, split=given.split)
    rows: dict[str, dict[str, list[float]]] = {}
    for folder in run_folders(given.ablation):
        run = RunFolder(folder)
        if run.status() != "finished":
            continue
        encoded = encode_pairs(load_model(folder / "student"), source, progress=False)
        scores = dict(retrieval(encoded.image, encoded.text, encoded.text_to_image, ks=(1,)))
        cosines = encoded.image @ encoded.image.T  # Wang and Isola 2020, over pictures
        away = cosines[~np.eye(len(cosines), dtype=bool)]
        scores["uniformity"] = float((2 * 2 * (away - 1)).exp().mean().log())
        found = geometry(encoded)["student"]
        own = rows.setdefault(folder.name.rpartition(".seed-")[0], {name: [] for name in FIGURES})
        for name, figure in FIGURES.items():
            own[name].append(float(figure(found, scores)))
    write_json(given.out.with_suffix(".json"), rows)
    write_text(given.out, table(rows))
    print(table(rows))


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown of the means, their intervals, and the correlations."""
    lines = ["| variant | seeds | " + " | ".join(FIGURES) + " |", "|---|---:|" + "---:|" * len(FIGURES)]
    for variant, own in rows.items():
        cells = []
        for name in FIGURES:
            values = np.array(own[name])
            half = (
                stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
            )
            cells.append(f"{values.mean():.{2 if name == 'R@1' else 3}f} ± {half:.{2 if name == 'R@1' else 3}f}")
        lines.append(f"| {variant} | {len(own['R@1'])} | " + " | ".join(cells) + " |")
    means = {name: np.array([np.mean(own[name]) for own in rows.values()]) for name in FIGURES}
    generator, cells = np.random.default_rng(0), []
    for name in FIGURES:
        if name == "R@1":
            cells.append("")
            continue
        rho = float(stats.spearmanr(means[name], means["R@1"]).statistic)
        others = [stats.spearmanr(generator.permutation(means[name]), means["R@1"]).statistic for _ in range(2000)]
        cells.append(f"{rho:+.2f} (p {(1 + sum(abs(o) >= abs(rho) - 1e-12 for o in others)) / 2001:.3f})")
    lines.append(f"| Spearman's correlation with R@1 over {len(rows)} variants | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
