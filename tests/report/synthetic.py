"""Made-up run folders that look like real ones: the demo's teacher and three students, with all a report reads."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from clipdistill.statistics.protocol import Protocol
from clipdistill.statistics.scores import Queries, Score, Scores

PROTOCOL = Protocol(
    name="standard",
    task="retrieval",
    dataset="scenes",
    split="val",
    images=1000,
    captions=4000,
    captions_per_image="all",
    positives="any caption of the image",
    transform="64 px, shortest, bicubic",
    dtype="float32",
    keys_sha256="5f1d" * 16,
    model_fingerprint="",
)
ZERO_SHOT = Protocol(
    name="zero-shot",
    task="zero-shot",
    dataset="scenes:zeroshot",
    images=1200,
    classes=24,
    templates="scenes",
    transform="64 px, shortest, bicubic",
    dtype="float32",
    keys_sha256="77aa" * 16,
    model_fingerprint="",
)

METHODS = {
    # t2i R@1, i2t R@1, top-1
    "contrastive": (0.312, 0.351, 0.402),
    "clip-kd": (0.431, 0.462, 0.561),
    "clip-rd": (0.437, 0.459, 0.572),
}
TEACHER = (0.522, 0.548, 0.674)
TERMS = {
    "contrastive": ["task"],
    "clip-kd": ["task", "crd", "icl", "fd"],
    "clip-rd": ["task", "crd", "icl", "fd", "vrd_kl", "vrd_ce", "xrd"],
}


def interval(value: float, n: int) -> tuple[float, float]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return value - half, value + half


def score(metric: str, value: float, n: int, protocol: Protocol, model: str, fingerprint: str) -> Score:
    low, high = interval(value, n)
    return Score(metric, value, n, protocol.model_copy(update={"model_fingerprint": fingerprint}), low, high, model)


def scores_of(model: str, values: tuple[float, float, float], fingerprint: str) -> list[Score]:
    t2i, i2t, top1 = values
    rows = []
    for direction, first, n in (("i2t", i2t, 1000), ("t2i", t2i, 4000)):
        for metric, share in (("R@1", 0.0), ("R@5", 0.55), ("R@10", 0.75), ("mAP@10", 0.3), ("MRR", 0.32)):
            rows.append(score(f"{direction}_{metric}", first + (1 - first) * share, n, PROTOCOL, model, fingerprint))
    rows.append(score("top1", top1, 1200, ZERO_SHOT, model, fingerprint))
    rows.append(score("top5", top1 + (1 - top1) * 0.7, 1200, ZERO_SHOT, model, fingerprint))
    return rows


def write_scores(path: Path, rows: list[Score], queries: dict[str, np.ndarray] | None = None) -> None:
    """scores.json as evaluate writes it; `queries`: the student's per-query results of metrics under PROTOCOL."""
    scores = Scores(rows)
    if queries is not None:
        student = next(row.protocol for row in rows if row.model == "student" and row.protocol.task == "retrieval")
        scores.queries["student", student.question()] = Queries(queries, {})
    scores.save(path)


def distribution(mean: float) -> dict[str, Any]:
    """One distribution of cosines as clipdistill.evaluate.geometry describes it."""
    edges = [round(-0.3 + 0.02 * i, 2) for i in range(61)]
    counts = [int(10_000 * math.exp(-(((e + 0.01 - mean) / 0.13) ** 2))) for e in edges[:-1]]
    return {"count": sum(counts), "mean": mean, "std": 0.1, "histogram": {"edges": edges, "counts": counts}}


def shape(matched: float) -> dict[str, Any]:
    return {
        "images": 1000,
        "positive": distribution(matched),
        "negative": distribution(0.05),
        "gap": matched - 0.05,
        "hard_negative": {"image": 0.3, "text": 0.31},
        "modality_gap": {"distance": 0.42, "cosine": 0.1},
    }


def write_geometry(path: Path, matched: float) -> None:
    """geometry.json of a run: student, teacher and their alignment."""
    alignment = {
        "cka": {"image": 0.8, "text": 0.85},
        "neighbour_overlap": {"image_to_text": {"10": 0.41}, "text_to_image": {"10": 0.43}},
        "discrepancy": {"vrd": 0.12, "xrd": 0.21, "scale": 14.3},
    }
    path.write_text(json.dumps({"student": shape(matched), "teacher": shape(0.55), "alignment": alignment}))


def write_run(
    folder: Path,
    method: str = "clip-rd",
    *,
    name: str | None = None,
    seed: int = 0,
    shift: float = 0.0,
    teacher: str = "scenes-teacher",
    samples: int = 96_000,
    log_rows: int = 40,
    **facts: Any,
) -> Path:
    """A finished run folder of one method; `shift` moves all its scores."""
    rng = np.random.default_rng([seed, len(method)])
    folder.mkdir(parents=True, exist_ok=True)
    base = METHODS.get(method, METHODS["clip-kd"])
    values = (base[0] + shift, base[1] + shift, base[2] + shift)
    steps = samples // 128
    run = {
        "format": 1,
        "name": name or folder.name,
        "recipe": method,
        "method": method,
        "teacher": None if method == "contrastive" else teacher,
        "student": "tiny-vit",
        "data": "scenes/train",
        "seed": seed,
        "device": "x86_64 CPU, 2 threads",
        "dtype": "float32",
        "parameters": {"image": 1_210_000, "text_transformer": 560_000, "text_total": 690_000, "total": 1_900_001},
        "teacher_parameters": {"image": 7_900_000, "text_total": 3_100_000, "total": 11_000_001},
        "steps": steps,
        "samples_seen": samples,
        "seconds": 61.5 + 6 * len(TERMS.get(method, [])),
        "status": "finished",
        "versions": {"clipdistill": "0.1.0", "python": "3.12.1", "torch": "2.9.0"},
        "command": f"clipdistill train --recipe {method} --data scenes --student tiny-vit --out runs/{folder.name}",
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text(
        f"recipe: {method}\ntrain:\n  seed: {seed}\n  batch_size: 128\nout: {folder.name}\n"
    )
    with (folder / "log.jsonl").open("w") as file:
        for step in range(0, steps, max(1, steps // log_rows)):
            share = step / steps
            terms = {
                term: (2 + i) * (0.25 + 0.75 * math.exp(-4 * share)) * (1 + 0.03 * rng.standard_normal())
                for i, term in enumerate(TERMS.get(method, ["task"]))
            }
            row = {
                "step": step,
                "epoch": share * 3,
                "samples": step * 128,
                "total": sum(terms.values()),
                "terms": terms,
                "learning_rate": 1e-3 * (1 - share),
                "grad_norm": 1.0,
                "logit_scale": 20.0,
                "samples_per_second": 1500.0,
                "data_wait": 0.04,
                "seconds": step * 0.08,
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "eval.jsonl").open("w") as file:
        for i in range(1, 9):
            grown = [v * (1 - math.exp(-3.2 * i / 8)) / (1 - math.exp(-3.2)) for v in values]
            found = {"t2i_R@1": grown[0], "i2t_R@1": grown[1]}
            file.write(json.dumps({"step": steps * i // 8, "samples": samples * i // 8, "scores": found}) + "\n")
    rows = scores_of("student", values, f"{method}-{seed}-weights")
    if method != "contrastive":
        rows += scores_of("teacher", TEACHER, "teacher-weights")
    write_scores(folder / "scores.json", rows)
    with (folder / "bad_samples.jsonl").open("w") as file:
        for key, reason in (("scene-00017", "truncated image: 812 of 2,113 bytes"), ("scene-00403", "empty caption")):
            file.write(json.dumps({"key": key, "reason": reason}) + "\n")
    return folder


def measurement(model: str, tower: str, batch: int, value: float) -> dict[str, Any]:
    latency = 1000 * batch / value
    return {
        "model": model,
        "tower": tower,
        "backend": "eager",
        "dtype": "float32",
        "batch": batch,
        "value": value,
        "low": value * 0.97,
        "high": value * 1.02,
        "median_ms": latency,
        "p95_ms": latency * 1.2,
        "peak_bytes": 41_000_000,
    }


def write_bench(path: Path, rates: dict[str, tuple[float, float]], device: str = "Example CPU, 2 threads") -> Path:
    """A bench.json with images/s and texts/s at batch 32 of each model (batch 1 at a third of the rate)."""
    rows, models = [], {}
    for model, (image, text) in rates.items():
        for batch, factor in ((1, 0.33), (32, 1.0)):
            rows.append(measurement(model, "image", batch, image * factor))
            rows.append(measurement(model, "text", batch, text * factor))
            rows.append(measurement(model, "pair", batch, factor / (1 / image + 1 / text)))
        big = model == "teacher"
        models[model] = {
            "fingerprint": "teacher-weights" if big else "",
            "architecture": "",
            "parameters": {"image": 7.9e6, "text_total": 3.1e6, "total": 11e6}
            if big
            else {"image": 1.2e6, "total": 1.9e6},
            "flops": {"image": 1.1e9 if big else 1.4e8, "text": 2.1e8 if big else 4e7},
            "size_bytes": 44e6 if big else 7.6e6,
        }
    bench = {
        "format": 1,
        "device": {"label": device, "fingerprint": f"print of {device}"},
        "libraries": {"torch": "2.9.0", "python": "3.12.1"},
        "models": models,
        "measurements": rows,
        "failures": [],
        "warnings": [],
        "command": "clipdistill bench teacher runs/clip-rd",
    }
    path.write_text(json.dumps(bench))
    return path


def picture(seed: int) -> Image.Image:
    """A small scene of coloured shapes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (160, 120), tuple(int(v) for v in rng.integers(150, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, r = (int(v) for v in (rng.integers(20, 140), rng.integers(20, 100), rng.integers(10, 26)))
        colour = tuple(int(v) for v in rng.integers(0, 230, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - r, y - r, x + r, y + r), fill=colour)
    return image


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


CAPTIONS = [
    "a large red circle above a small striped square on a pale ground",
    "two green triangles, the left one dotted",
    "a tiny blue star to the right of a yellow ring",
    "an orange square half hidden behind a purple circle",
]


def write_gallery(path: Path, models: list[str]) -> Path:
    """A gallery of six queries over twenty pictures."""
    rng = np.random.default_rng(3)
    keys = [f"scene-{i:05d}" for i in range(20)]
    queries: list[dict[str, Any]] = []
    for q, caption in enumerate(CAPTIONS):
        answers, ranks = {}, {}
        for m, model in enumerate(models):
            order = [int(i) for i in rng.permutation(20)]
            order.remove(q)
            order.insert(0 if m == 0 else int(rng.integers(0, 8)), q)
            answers[model] = [{"key": keys[i], "score": 0.4 - 0.03 * j, "hit": i == q} for j, i in enumerate(order[:5])]
            ranks[model] = order.index(q) + 1
        why = "drawn at random" if q < 2 else "models disagree"
        queries.append(
            {"kind": "t2i", "text": caption, "truth": keys[q], "why": why, "models": answers, "ranks": ranks}
        )
    for q in (4, 5):
        answers = {
            model: [{"text": c, "score": 0.4 - 0.03 * j, "hit": j == m} for j, c in enumerate(CAPTIONS)]
            for m, model in enumerate(models)
        }
        ranks = {model: m + 1 for m, model in enumerate(models)}
        queries.append({"kind": "i2t", "image": keys[q], "why": "drawn at random", "models": answers, "ranks": ranks})
    thumbnails = {key: data_uri(picture(i)) for i, key in enumerate(keys)}
    selection = "Half of the queries were drawn at random (seed 0), half are those on which the models disagree most."
    path.write_text(json.dumps({"format": 1, "selection": selection, "queries": queries, "thumbnails": thumbnails}))
    return path


def write_demo(folder: Path) -> list[Path]:
    """What the demo leaves: three runs, a benchmark, a gallery, geometry and claims beside them."""
    runs = [write_run(folder / method, method, log_rows=375) for method in METHODS]
    students = {method: (4200.0 + 40 * i, 9100.0) for i, method in enumerate(METHODS)}
    write_bench(folder / "bench.json", {"teacher": (610.0, 2400.0), **students})
    write_gallery(folder / "gallery.json", ["teacher", *METHODS])
    for i, run in enumerate(runs):
        write_geometry(run / "geometry.json", 0.32 + 0.07 * i)
    claims = [
        {
            "claim": "Relational terms improve text-to-image retrieval over CLIP-KD",
            "verdict": "undecided",
            "evidence": "+0.6 points, 3 seeds",
        },
        {
            "claim": "Distillation beats contrastive training at the same budget",
            "verdict": "supported",
            "evidence": "+11.9 points",
        },
        {"claim": "The student keeps 90 % of the teacher", "verdict": "contradicted", "evidence": "84 % (81 to 87)"},
    ]
    (folder / "claims.json").write_text(json.dumps({"format": 1, "claims": claims}))
    return runs


SVG_EVIL = "data:image/svg+xml;base64," + base64.b64encode(b"<svg onload='alert(1)'/>").decode()


def write_evil(folder: Path) -> Path:
    """A run whose every text tries to be markup, and whose thumbnails try to be something else."""

    def attack(where: str) -> str:
        return f"</title></pre></td>\"'><script>alert('{where}')</script><img src=x onerror=alert('{where}')>"

    write_run(folder, attack("method"), name=attack("name"), teacher=attack("teacher"))
    run = json.loads((folder / "run.json").read_text())
    for key in ("student", "data", "device", "command", "status"):
        run[key] = attack(key)
    run["versions"] = {attack("library"): attack("version")}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text(attack("recipe"))
    (folder / "bad_samples.jsonl").write_text(json.dumps({"key": attack("key"), "reason": attack("reason")}))
    named = PROTOCOL.model_copy(update={"dataset": attack("dataset"), "split": attack("split")})
    rows = [
        score(metric, 0.4, 100, named, "student", attack("fingerprint")) for metric in ("t2i_R@1", attack("metric"))
    ]
    write_scores(folder / "scores.json", [*rows, score("t2i_R@1", 0.5, 100, named, "teacher", "t")])
    with (folder / "log.jsonl").open("a") as file:
        for step in (10**6, 10**6 + 1):
            row = {"step": step, "samples": step, "total": 1.0, "terms": {attack("term"): 1.0}}
            file.write(json.dumps(row) + "\n")
    write_bench(folder / "bench.json", {"teacher": (1.0, 1.0), attack("model"): (2.0, 2.0)}, attack("device"))
    path = write_gallery(folder / "gallery.json", ["teacher", "student", attack("model")])
    gallery = json.loads(path.read_text())
    gallery["selection"] = attack("selection")
    gallery["queries"][0] |= {"text": attack("caption"), "why": attack("why")}
    gallery["thumbnails"] |= {"scene-00000": SVG_EVIL, attack("picture"): data_uri(picture(1))}
    gallery["queries"][1]["truth"] = attack("picture")
    path.write_text(json.dumps(gallery))
    write_geometry(folder / "geometry.json", 0.4)
    claims = [{"claim": attack("claim"), "verdict": attack("verdict"), "evidence": attack("evidence")}]
    (folder / "claims.json").write_text(json.dumps({"claims": claims}))
    return folder
