"""PromptKD on real photographs, base classes and new ones: class probabilities of unlabelled pictures to a projector.

    python benchmarks/prompts.py --data DATA --towers TOWERS --out runs/prompts

Protocol. The first half of a set's classes (in the set's order, the larger half where they are odd) are base, the
others new. Every other picture of a set is for training, the rest for testing (CIFAR-10: --pictures of its two files).
Stage 1: the teacher (EfficientNet-Lite0 at 224 px and two layers of MiniLM, heads trained on 2,000 pictures of
Flickr8k) is tuned on 16 labelled training pictures a base class: its image head learns one-hot class probabilities,
its text tower and so its class vectors stay. Stage 2: a student (the same network at 96 px, locked, a new linear map
behind it) learns on all training pictures, base and new, without labels, by `promptkd` with the vectors of all classes;
by `images-only` for comparison. Base accuracy: test pictures of base classes among base names; new: of new classes
among new names; H: the harmonic mean of both. Each step is skipped where its result is there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import clipdistill as cd
from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.data.labelled import LabelledSource
from clipdistill.data.open import open_labelled
from clipdistill.embed.classes import choose_templates, class_weights
from clipdistill.embed.encode import Encoder
from clipdistill.evaluate.zero_shot import classify
from clipdistill.models import load_model
from clipdistill.runs.folder import RunFolder
from clipdistill.runtime.files import write_text
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from clipdistill.vectors.files import read_embeddings
from unlabelled import halve, row

SETS = {"flowers5": "flowers5_a", "imagenette": "imagenette_val_a", "cifar10": ""}
SHOTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with flickr8k and the classification sets")
    parser.add_argument("--towers", type=Path, required=True, help="the folder with the pretrained towers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=500, help="of CIFAR-10, for training and for testing")
    parser.add_argument("--sets", default=",".join(SETS), help="which of them")
    parser.add_argument("--seeds", type=int, default=3, help="of stage 2")
    given = parser.parse_args()
    data, out = given.data, given.out
    image = f"timm:tf_efficientnet_lite0@{given.towers}/tf_efficientnet_lite0.safetensors"
    teacher, kept = out / "teacher", f"train.features_folder={out / 'features'}"
    joined = f"towers:image={image},text=hf:{given.towers / 'minilm_l6'},text_layers=2"
    train(teacher, "lit", {"student": joined, "data": data / "flickr8k" / "wds_train"}, kept, size="heads")

    rows = ["| set, model | base | new | H |", "|---|---:|---:|---:|"]
    for name in given.sets.split(","):
        if file := SETS[name]:
            first, test = halve(data / name / f"{file}.tar", out / name)
        else:
            first, test = (part_of(data / name, out / name, part, given.pictures) for part in ("train5k", "test_a"))
        vectors = out / name / "classes.npy"
        if not vectors.exists():
            cd.embed_to_file(str(teacher), classes=str(first), out=vectors, progress=False)
        tuned = tune(teacher, first, vectors, out / name)
        store = out / f"cache-{name}"
        if not store.exists():
            fill(CacheConfig(teacher=str(tuned), data={"path": str(first)}, out=store, workers=0))
        models = {"teacher": [teacher], "teacher, tuned": [tuned]}
        student = f"towers:image={image},text=whole:{tuned},size=96,head=linear"
        for recipe in ("promptkd", "images-only"):
            for seed in range(given.seeds):
                folder = out / f"{recipe}-{name}-{seed}"
                parts = {"teacher": f"cache:{store}", "student": student, "data": first}
                more = [kept, "train.lock_image=all", "train.other_tower=own", f"train.seed={seed}", "train.epochs=30"]
                more += [f"train.classes={vectors}"] if recipe == "promptkd" else []
                train(folder, recipe, parts, *more, "train.batch_size=32", "train.learning_rate=1e-3")
                models.setdefault(f"student, {recipe}", []).append(folder)
        source = open_labelled(str(test))
        for what, folders in models.items():
            found = [base_to_new(folder, source) for folder in folders]
            rows.append(row(f"{name}, {what}", list(np.mean(found, axis=0))))
            if len(found) > 1:
                rows.append(row(f"{name}, {what}, deviation over seeds", list(np.std(found, axis=0, ddof=1))))
        write_text(out / "table.md", "\n".join(rows) + "\n")
    print("\n".join(rows))


def train(folder: Path, recipe: str, parts: dict[str, Any], *assignments: str, size: str | None = None) -> None:
    if not folder.exists() or RunFolder(folder).status() != "finished":
        values = {name: str(value) for name, value in parts.items()} | {"out": str(folder)}
        more = (*assignments, "preflight.enabled=false")
        distill(resolve(recipe, values, size=size, assignments=more), quiet=True)


def base_to_new(model: Path, source: LabelledSource) -> tuple[float, float, float]:
    """(accuracy of base classes among base names, of new ones among new names, harmonic mean)."""
    names, (_, lines) = source.class_names, choose_templates(source.templates)
    encoder = Encoder(load_model(model, teacher=True), batch_size=64, progress=False)
    pictures, kept, _ = encoder.images(source)
    labels, half = np.array([source.label(i) for i in kept]), (len(names) + 1) // 2
    found = []
    for first, last in ((0, half), (half, len(names))):
        own = np.flatnonzero((labels >= first) & (labels < last))
        weights = class_weights(encoder, names[first:last], lines)
        found.append(float(classify(pictures[own], weights, labels[own] - first)[0].mean()))
    base, new = found
    return base, new, 2 * base * new / (base + new)


def tune(teacher: Path, data: Path, vectors: Path, folder: Path) -> Path:
    """Stage 1: the teacher's image head on SHOTS labelled pictures a base class.

    The labels are a teacher of their own: a picture's embedding is the vector of its class, and the multiplier of 100
    makes its class probabilities one-hot.
    """
    source, rows = open_labelled(str(data)), read_embeddings(vectors)[0]
    base = (len(rows) + 1) // 2
    shots: Counter[int] = Counter()
    chosen = []
    for i in range(len(source)):
        label = source.label(i)
        shots[label] += 1
        if label < base and shots[label] <= SHOTS:
            chosen.append(i)
    pictures = folder / "labelled"
    pictures.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05d}.png" for i in chosen]
    for i, name in zip(chosen, names, strict=True):
        source.image(i).save(pictures / name)
    np.savez(folder / "labels.npz", keys=np.array(names), image=np.stack([rows[source.label(i)] for i in chosen]))
    np.save(folder / "base.npy", rows[:base])
    lines = "".join(json.dumps({"key": name}) + "\n" for name in source.class_names[:base])
    write_text(folder / "base.jsonl", lines)
    parts = {"teacher": f"cache:{folder / 'labels.npz'}", "student": "tuned", "student_weights": teacher}
    more = [f"train.classes={folder / 'base.npy'}", "train.other_tower=own", "train.epochs=20", "train.batch_size=16"]
    train(folder / "tuned", "promptkd", parts | {"data": pictures}, *more, "train.learning_rate=1e-4")
    return folder / "tuned"


def part_of(folder: Path, out: Path, part: str, count: int) -> Path:
    """The first pictures of one file of CIFAR-10, under its class names."""
    path = out / f"{part}.npz"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        with np.load(folder / f"cifar10_{part}.npz") as known:
            np.savez(path, **{name: known[name][:count] if len(known[name]) > 100 else known[name] for name in known})
    return path


if __name__ == "__main__":
    main()
