"""Domain adaptation from unlabelled pictures, and a text tower from texts alone, before and after, on real photographs.

    python benchmarks/unlabelled.py --data ../shared/data --towers ../shared/towers --out runs/unlabelled

The teacher joins EfficientNet-Lite0 (224 px) and two layers of MiniLM, heads trained on Flickr8k. The first student is
the same network at 96 px before the teacher's text tower: its head learns 2,000 Flickr8k pictures without captions. It
then adapts, all of its image tower, to one half of a classification set without labels; the other half is classified by
name before and after. The text tower is one layer of MiniLM, taught by captions alone. Each step is skipped where its
result is there.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from clipdistill.data.open import open_labelled
from clipdistill.embed.encode import Encoder
from clipdistill.models import load_model
from clipdistill.runtime.files import write_text
from clipdistill.statistics.scores import Scores

SETS = {"flowers5": "flowers5_a", "imagenette": "imagenette_val_a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with flickr8k, flowers5 and imagenette")
    parser.add_argument("--towers", type=Path, required=True, help="the folder with the pretrained towers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="a finished run of the teacher (default: trained here)")
    given = parser.parse_args()
    data, out = given.data, given.out
    image = f"timm:tf_efficientnet_lite0@{given.towers}/tf_efficientnet_lite0.safetensors"
    pairs, encoder = data / "flickr8k" / "dataset_flickr8k.json", given.towers / "minilm_l6"
    teacher = given.teacher or out / "teacher"
    if given.teacher is None:
        joined = f"towers:image={image},text=hf:{encoder},text_layers=2"
        more = ["--size", "heads", "train.precision=bf16", f"train.features_folder={out / 'features'}"]
        train(teacher, "lit", "--student", joined, "--data", pairs, *more)

    halves = {name: halve(data / name / f"{file}.tar", out / name) for name, file in SETS.items()}
    shards, bare = data / "flickr8k" / "wds_train", "data.caption_column=null"
    cache(out / "cache-flickr8k", teacher, shards, bare)
    student = f"towers:image={image},text=whole:{teacher},size=96,head=linear"
    heads = ["--teacher", f"cache:{out / 'cache-flickr8k'}", "--student", student, "--data", shards, bare]
    train(out / "student", "images-only", *heads, "train.lock_image=all", "train.batch_size=256", "train.epochs=60")
    for name, (half, _) in halves.items():
        cache(out / f"cache-{name}", teacher, half, "--views", "4")
        adapt = ["--teacher", f"cache:{out / f'cache-{name}'}", "--student", "adapted", "--data", half]
        adapt += ["--student-weights", out / "student", "train.batch_size=32", "train.epochs=30"]
        train(out / f"adapted-{name}", "images-only", *adapt, "train.learning_rate=3e-4", "train.warmup_steps=10")

    texts = f"towers:image=whole:{teacher},text=hf:{encoder},text_layers=1,head=linear"
    alone = ["--teacher", teacher, "--student", texts, "--data", pairs, "train.warmup_steps=20"]
    train(out / "texts-begun", "text-only", *alone, "train.steps=1", "train.learning_rate=1e-9")
    train(out / "texts", "text-only", *alone, "train.steps=60", "train.learning_rate=1e-3")

    adapted = {name: out / f"adapted-{name}" for name in SETS}
    rows = ["| | by name | neighbours | as the teacher | text-to-image R@1 | R@10 |", "|---|---:|---:|---:|---:|---:|"]
    for name, (_, test) in halves.items():
        for what, model in (("teacher", teacher), ("before", out / "student"), ("adapted", adapted[name])):
            found = measure(model, test, out / "scores" / f"{name}-{what}.json")
            cells = [found["top1"], *neighbours(model, teacher, test)]
            rows.append(row(f"{name}, {what}", [*cells, *retrieval(model, pairs, out)]))
    for what in ("begun", ""):
        model = out / f"texts{what and '-' + what}"
        rows.append(row(f"texts alone{', ' + what if what else ''}", [None] * 3 + retrieval(model, pairs, out)))
    write_text(out / "table.md", "\n".join(rows) + "\n")
    print("\n".join(rows))


def row(name: str, cells: list[float | None]) -> str:
    return f"| {name} | " + " | ".join("" if cell is None else f"{100 * cell:.1f}" for cell in cells) + " |"


def retrieval(model: Path, pairs: Path, out: Path) -> list[float | None]:
    """R@1 and R@10 among the 1,000 photographs of Flickr8k's validation split."""
    found = measure(model, pairs, out / "scores" / f"{model.name}-flickr8k.json", "--split", "val")
    return [found["t2i_R@1"], found["t2i_R@10"]]


def neighbours(model: Path, teacher: Path, data: Path) -> tuple[float, float]:
    """The share of pictures whose class most of the five nearest others have, and the mean cosine with the teacher."""
    source = open_labelled(data)
    own, kept, _ = Encoder(load_model(model, teacher=True), batch_size=32, progress=False).images(source)
    labels = torch.tensor([source.label(i) for i in kept])
    found = (own @ own.T).fill_diagonal_(-1).topk(5).indices
    hits = (labels[found].mode(1).values == labels).float().mean()
    taught, _, _ = Encoder(load_model(teacher, teacher=True), batch_size=32, progress=False).images(source)
    return float(hits), float((own * taught).sum(1).mean())


def clipdistill(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "clipdistill", *map(str, words)], check=True)


def train(folder: Path, recipe: str, *words: object) -> None:
    clipdistill("train", "--recipe", recipe, "--out", folder, "--quiet", *words)


def cache(folder: Path, teacher: Path, data: Path, *words: object) -> None:
    clipdistill("cache", "--teacher", teacher, "--data", data, "--out", folder, "--quiet", *words)


def measure(model: Path, data: Path, file: Path, *words: object) -> dict[str, float]:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        clipdistill("eval", model, "--data", data, "--json", file, "--batch-size", "64", "--quiet", *words)
    return {score.metric: score.value for score in Scores.load(file)}


def halve(path: Path, folder: Path) -> tuple[Path, Path]:
    """Every other sample of a classification set into a tar of its own, the class names beside them."""
    halves = folder / "train.tar", folder / "test.tar"
    if halves[1].exists():
        return halves
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "classes.json", json.dumps(json.loads((path.parent / "classes.json").read_text())))
    with tarfile.open(path) as source, tarfile.open(halves[0], "w") as one, tarfile.open(halves[1], "w") as two:
        stems: dict[str, int] = {}
        for member in source:
            number = stems.setdefault(member.name.split(".")[0], len(stems))
            content = source.extractfile(member)
            (one, two)[number % 2].addfile(member, io.BytesIO(content.read()) if content else None)
    return halves


if __name__ == "__main__":
    main()
