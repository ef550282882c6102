"""DCLIP at one budget: three meta-teachers and their leak, four students, before and after.

    python benchmarks/dclip.py --clip runs/flickr-teacher --data flickr8k/dataset_flickr8k.json --boxes grid:1+2 \\
        --zero-shot imagenette/imagenette_val_a.tar --out runs/dclip
    python benchmarks/dclip.py --clip runs/flickr-teacher --data coco_mini/annotations/captions_train2017.json \\
        --validation coco_mini/annotations/captions_val_a.json --boxes coco_mini/annotations/instances_train2017.json \\
        --validation-boxes coco_mini/annotations/instances_val_a.json --out runs/dclip-coco

Meta-teachers: as described, as released, free of the caption; each measured with `regions measure`. Students start from
the CLIP, see the same pairs and train the image tower: contrastive alone (control), and with each meta-teacher. Printed
as Markdown and written to OUT/dclip.json. Interrupted, the same command goes on. In seconds, to see that it runs:

    python benchmarks/dclip.py --clip scenes-teacher --data scenes --limit 64 --boxes grid:2 --teacher-steps 3 \\
        --steps 2 --batch-size 16 --out /tmp/try
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.regions.measure import METRICS, measure
from clipdistill.regions.meta_teacher import read_meta_teacher
from clipdistill.regions.retention import before_after
from clipdistill.regions.teacher import open_store
from clipdistill.runtime.machine import pick_device
from clipdistill.train.config import resolve
from clipdistill.train.region_config import RegionsConfig
from clipdistill.train.run import distill

TEACHERS = {
    "described": "dclip-teacher",
    "released": "dclip-teacher-released",
    "caption-free": "dclip-teacher-caption-free",
}


def main() -> None:
    """Train and measure everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="the CLIP that is frozen, and that the students start from")
    parser.add_argument("--data", required=True, help="pairs with a train and a val split, or training pairs")
    parser.add_argument("--validation", help="validation pairs, where they are a file of their own")
    parser.add_argument("--boxes", required=True, help="a boxes file or a detector")
    parser.add_argument("--validation-boxes", help="boxes of the validation pairs, where they are a file of their own")
    parser.add_argument("--zero-shot", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teachers", default=",".join(TEACHERS))
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--teacher-learning-rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--limit", type=int, help="with --data scenes: so many pictures")
    parser.add_argument("--pairs", type=int, default=200, help="images whose every pair is scored")
    options = parser.parse_args()
    names = options.teachers.split(",")
    measured = {name: train_teacher(options, name) for name in names}
    students = {name: train_student(options, name) for name in ["control", *names]}
    result = {"settings": {k: str(v) for k, v in vars(options).items()}, "teachers": measured, "students": students}
    (options.out / "dclip.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_teachers(measured)
    print_students(students)


def data_settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The training and the validation pairs."""
    if options.data == "scenes":
        return {
            "data": {"path": "scenes:train", "size": options.limit},
            "validation": {"path": "scenes:val", "size": options.limit},
        }
    if options.validation is not None:
        return {"data": {"path": options.data}, "validation": {"path": options.validation}}
    return {"data": {"path": options.data, "split": "train"}, "validation": {"path": options.data, "split": "val"}}


def regions(options: argparse.Namespace) -> dict[str, str]:
    """Boxes of the training pairs, and the store that all runs share."""
    return {"boxes": options.boxes, "store": str(options.out / "store")}


def train_teacher(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train one meta-teacher; its scores by condition on the validation pairs."""
    data = data_settings(options)
    settings = {
        "data": data["data"],
        "teacher": options.clip,
        "out": str(options.out / f"teacher-{name}"),
        "regions": regions(options),
        "train": {
            "steps": options.teacher_steps,
            "batch_size": options.batch_size,
            "learning_rate": options.teacher_learning_rate,
            "schedule": "cosine",
            "warmup_steps": options.teacher_steps // 20,
            "log_every": 20,
            "checkpoint_every": 50,
        },
    }
    run = distill(resolve(TEACHERS[name], settings))
    kept = run.folder / "measured.json"
    if not kept.exists():
        teacher, source = read_meta_teacher(run.student), open_pairs(DataConfig(**data["validation"]))
        config = RegionsConfig(boxes=options.validation_boxes or options.boxes, store=options.out / "store")
        device = pick_device(None)
        store = open_store(config, source, teacher.clip, teacher.config, run.folder, device)
        found = measure(teacher, source, store, pairs=options.pairs, device=device)
        kept.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def train_student(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Fine-tune the CLIP's image tower with one meta-teacher (or none) and compare it with what it was."""
    data = data_settings(options)
    control = name == "control"
    settings = {
        "data": data["data"],
        "teacher": options.clip if control else str(options.out / f"teacher-{name}"),
        "student_weights": options.clip,
        "out": str(options.out / f"student-{name}"),
        "regions": None if control else regions(options),
        "objective": {"weights": {"task": 1, "cosine": 0 if control else 1}},
        "preflight": {"enabled": False},
        "train": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "log_every": 10,
            "checkpoint_every": 50,
        },
    }
    run = distill(resolve("dclip", settings))
    kept = run.folder / "before_after.json"
    if not kept.exists():
        sets = [DataConfig(**data["validation"]), *(open_labelled(path) for path in options.zero_shot)]
        changes = before_after(options.clip, run.student, sets)
        kept.write_text(json.dumps(changes.to_json(), indent=1) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def print_teachers(measured: dict[str, dict[str, Any]]) -> None:
    """One row a condition, percent."""
    print(f"\n| meta-teacher | image embedding | images | {' | '.join(METRICS)} |")
    print(f"|---|---|{'---:|' * (1 + len(METRICS))}")
    for name, found in measured.items():
        for condition, scores in found["scores"].items():
            values = " | ".join(f"{100 * scores[m]:.1f}" if m in scores else "" for m in METRICS)
            print(f"| {name} | {condition} | {found['images'][condition]} | {values} |")


def print_students(students: dict[str, dict[str, Any]]) -> None:
    """One row a student and metric: before, after, difference with interval, share kept."""
    print(
        "\n| student | data | metric | before | after | difference [95 %] | kept |\n|---|---|---|---:|---:|---:|---:|"
    )
    for name, found in students.items():
        for change in found["changes"]:
            if not change["metric"].endswith(("R@1", "MRR", "mAP@10", "top1")):
                continue
            value, low, high = (100 * v for v in change["difference"])
            kept = "" if change["kept"] is None else f"{100 * change['kept'][0]:.1f} %"
            cells = [name, change["data"], change["metric"], f"{100 * change['before']:.1f}"]
            cells += [f"{100 * change['after']:.1f}", f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", kept]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
