"""Where a student starts from: random weights, manual and automatic inheritance, at one budget, with two objectives.

    python benchmarks/inheritance_flickr8k.py --data flickr8k/dataset_flickr8k.json --out runs/inheritance

First a teacher, a small ViT, is trained on the same pairs (or named with --teacher), then each start with each recipe
and seed sees the same number of pairs. Printed and written to OUT/inheritance.json: R@1 on the validation split, size,
and the pairs seen until the mean R@1 (and R@10) of both directions first reaches the from-scratch student's final one.
Interrupted, the same command goes on where it stopped. In seconds, to see that it runs:

    python benchmarks/inheritance_flickr8k.py --data scenes --limit 64 --steps 8 --teacher scenes-teacher --out /tmp/try
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.models import build_student, build_words_tokenizer, load_model, save_model
from clipdistill.models.inheritance.cut import inherit
from clipdistill.models.inheritance.masks import reference_counts
from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.train.config import resolve
from clipdistill.train.run import Run, distill

SIZES = "layers=3,width=128,text_layers=2,text_width=128,depth=even"
SMALL = "layers=2,width=64,text_layers=1,text_width=64,depth=even"  # of the demo's teacher
TEACHER = {
    "embed_dim": 256,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 112, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 8192, "width": 192, "heads": 3, "layers": 3},
}


def main() -> None:
    """Train everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs with a train and a val split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", help="a ViT teacher (default: one is trained on the data)")
    parser.add_argument("--teacher-epochs", type=float, default=15)
    parser.add_argument("--sizes", help=f"what manual inheritance keeps (default: {SIZES})")
    parser.add_argument("--recipes", default="tinyclip,clip-rd")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--limit", type=int, help="with --data scenes: so many pictures")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of all student runs")
    options = parser.parse_args()
    teacher = options.teacher or str(train_teacher(options).student)
    sizes = options.sizes or (SMALL if teacher == "scenes-teacher" else SIZES)
    rows = []
    for recipe in options.recipes.split(","):
        for seed in range(options.seeds):
            runs = {start: train_student(options, recipe, start, seed, teacher, sizes) for start in STARTS}
            rows += [describe(recipe, seed, start, run, runs["scratch"]) for start, run in runs.items()]
    report(rows)
    (options.out / "inheritance.json").write_text(
        json.dumps({"teacher": teacher, "sizes": sizes, "runs": rows}, indent=1)
    )


def data_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The training and the validation split."""
    scenes = {"size": options.limit} if options.limit else {}
    train, val = ({"path": options.data, "split": split, **scenes} for split in ("train", "val"))
    if options.data == "scenes":
        train, val = ({"path": f"scenes:{split}", **scenes} for split in ("train", "val"))
    return {"data": train, "validation": val}


def train_teacher(options: argparse.Namespace) -> Run:
    """A small ViT CLIP trained on the pairs alone."""
    data = data_settings(options)
    start = options.out / "teacher-start"
    if not start.exists():
        source = open_pairs(DataConfig(**data["data"]), default_split="train")
        captions = (caption for i in range(len(source)) for caption in source.captions(i))
        model = build_student(TEACHER, seed=0, tokenizer=build_words_tokenizer(captions, 32, max_size=8188))
        save_model(model, start)
    settings = {**data, "student": "vit-teacher", "student_weights": str(start), "out": str(options.out / "teacher")}
    changes = [f"train.epochs={options.teacher_epochs}", f"train.precision={options.precision}"]
    return distill(resolve("clip", settings, size="flickr-teacher", assignments=changes))


STARTS = ("scratch", "manual", "automatic")


def train_student(options: argparse.Namespace, recipe: str, start: str, seed: int, teacher: str, sizes: str) -> Run:
    """One run: equal pairs, order, batch and learning rate for every start."""
    settings = {
        **data_settings(options),
        "teacher": teacher,
        "student": {
            "scratch": f"inherit:{sizes},weights=random",
            "manual": f"inherit:{sizes}",
            "automatic": "inherit:all",
        }[start],
        "out": str(options.out / f"{recipe}-{start}-{seed}"),
        "train": {
            "seed": seed,
            "steps": options.steps,
            "batch_size": min(options.batch_size, options.limit or options.batch_size),
            "learning_rate": options.learning_rate,
            "warmup_steps": options.steps // 20,
            "clip_grad_norm": 1.0,
            "keep_in_memory": True,
            "precision": options.precision,
            "log_every": 10,
            "evaluate_every": max(options.steps // 12, 1),
            "checkpoint_every": max(options.steps // 6, 1),
        },
    }
    if start == "automatic":
        # a quarter of the run with masks, closing as many weights as the manual student lacks
        quarter = max(options.steps // 4, 1)
        settings["train"]["masks"] = {
            "sparsity": round(lacking(teacher, sizes), 4),
            "prune_step": quarter,
            "warmup_steps": max(quarter // 2, 1),
            "learning_rate": min(0.02 * 3000 / quarter, 2.5),  # as far as the released 3000 steps go
        }
    return distill(resolve(recipe, settings, assignments=options.settings))


def lacking(teacher: str, sizes: str) -> float:
    """Share of the teacher's attention and MLP weights that a manual student does not have."""
    whole = load_model(teacher)
    student = inherit(whole, sizes)
    towers = ("image", "text")
    counts = [sum(reference_counts(m.module, m.architecture, towers).values()) for m in (student, whole)]
    return 1 - counts[0] / counts[1]


def describe(recipe: str, seed: int, start: str, run: Run, scratch: Run) -> dict[str, Any]:
    """One row of the table."""
    curve, goals = (read_lines(folder / "eval.jsonl") for folder in (run.folder, scratch.folder))

    def reached(k: int) -> int | None:
        goal = mean_recall(goals[-1]["scores"], k)
        return next((line["samples"] for line in curve if mean_recall(line["scores"], k) >= goal), None)

    scores = {s.metric: s.value for s in run.scores or () if s.model == "student"}
    parameters = json.loads((run.folder / "run.json").read_text())["parameters"]["total"]
    return {
        "recipe": recipe,
        "seed": seed,
        "start": start,
        "parameters": parameters,
        **{metric: scores[metric] for metric in ("t2i_R@1", "i2t_R@1", "t2i_R@10", "i2t_R@10")},
        "samples": curve[-1]["samples"],
        "samples_to_scratch": {k: reached(k) for k in (1, 10)},
    }


def mean_recall(scores: dict[str, float], k: int) -> float:
    """Mean R@k of both directions."""
    return (scores[f"t2i_R@{k}"] + scores[f"i2t_R@{k}"]) / 2


def report(rows: list[dict[str, Any]]) -> None:
    """The table."""
    metrics = ("t2i_R@1", "i2t_R@1", "t2i_R@10", "i2t_R@10")
    print(
        f"{'recipe':<12}{'start':<12}{'seed':>5}{'parameters':>12}"
        + "".join(f"{m:>10}" for m in metrics)
        + f"{'pairs to scratch, R@1':>24}{'R@10':>14}"
    )
    for row in rows:
        reached = ["not reached" if n is None else f"{n:,}" for n in row["samples_to_scratch"].values()]
        print(
            f"{row['recipe']:<12}{row['start']:<12}{row['seed']:>5}{row['parameters']:>12,}"
            + "".join(f"{row[m]:>10.1%}" for m in metrics)
            + f"{reached[0]:>24}{reached[1]:>14}"
        )


if __name__ == "__main__":
    main()
