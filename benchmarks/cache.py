"""What stored embeddings save: training steps, filling, size, reading; in one run, the variants taking turns.

    python benchmarks/cache.py [--rounds 5] [--threads 2] [--device cpu] [--json docs/performance/cache.json]
    python benchmarks/cache.py --retrieval MODEL --data flickr8k.json --split val     R@1 of a teacher by number format

Teachers and students have random weights: speed does not depend on them. A step is what the training loop does: wait
for the batch (images are decoded and rendered in this process), forward, objective, backward, optimiser. Ratios are
medians over rounds in which every variant takes one step, so that they hold on a machine whose speed changes; on a
CPU they are given for processor time too, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdistill.cache.blocks import write_block
from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.cache.manifest import DataEntry, Manifest, TeacherEntry, write_manifest
from clipdistill.cache.rows import pack
from clipdistill.cache.samples import write_samples
from clipdistill.cache.store import CacheStore
from clipdistill.cache.stored import StoredRows
from clipdistill.data.loader import Batch, PairLoader
from clipdistill.data.memory import KeptInMemory
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, Subset
from clipdistill.data.views import EVALUATION_VIEW as EVALUATION
from clipdistill.data.views import ImageSpec, normalise, render_pixels
from clipdistill.embed.encode import encode_pairs
from clipdistill.embed.prepare import sample_digest
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models import ClipModel, build_student, load_model
from clipdistill.objective import Objective
from clipdistill.scenes.write import write_scenes
from clipdistill.train.step import Towers, forward_backward
from clipdistill.train.teacher import LiveTeacher

WEIGHTS = {"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0}
PAIRS = {"large": ("ViT-B-16", "ViT-T-16"), "small": ("scenes-teacher", "scenes-student")}


def models(pair: str, source: PairSource) -> tuple[ClipModel, ClipModel]:
    """Teacher and student of a pair with random weights."""
    captions = [caption for i in range(len(source)) for caption in source.captions(i)]
    teacher, student = PAIRS[pair]
    first = build_student(teacher, seed=0, captions=captions)
    shared = first.tokenizer if pair == "small" else None
    return first, build_student(student, seed=1, captions=captions, tokenizer=shared)


def cache_settings(source_size: int, out: Path, batch: int, device: str, teacher: str) -> CacheConfig:
    return CacheConfig(
        teacher=teacher,
        data=DataConfig(path="scenes:train", size=source_size),
        out=out,
        captions="first",
        batch_size=batch,
        device=device,
        precision="fp32" if device == "cpu" else "bf16",
        block=source_size,
    )


class Variant:
    """One kind of training step with a student, an objective and an optimiser of its own."""

    def __init__(
        self,
        student: ClipModel,
        loader: PairLoader,
        teacher: Callable[[Batch], Any] | None,
        teacher_dim: int,
        device: torch.device,
        precision: str,
    ) -> None:
        weights = WEIGHTS if teacher is not None else {"task": 1.0}
        student.module.to(device).train()
        self.towers = Towers(student.module)
        self.objective = Objective(weights, student.embed_dim, teacher_dim).to(device)
        parameters = [*student.module.parameters(), *self.objective.parameters()]
        self.optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5)
        self.batches: Iterator[Batch] = iter(loader)
        self.teacher, self.device, self.precision = teacher, device, precision

    def step(self) -> tuple[float, float]:
        """Seconds and processor seconds of one step, the wait for its batch included."""
        began = time.perf_counter(), time.process_time()
        batch = next(self.batches)
        embeddings = None if self.teacher is None else self.teacher(batch)
        self.optimiser.zero_grad(set_to_none=True)
        forward_backward(
            self.towers,
            self.objective,
            batch.student_images.to(self.device),
            batch.student_tokens.to(self.device),
            embeddings,
            micro_batch=None,
            precision=self.precision,
            seed=(0, 0, 0),
        )
        self.optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began[0], time.process_time() - began[1]


def steps(pair: str, batch: int, rounds: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Contrastive-only, live and cached steps in turn."""
    from clipdistill.cache.teacher import CachedTeacher

    source = KeptInMemory(open_pairs(DataConfig(path="scenes:train", size=4 * batch)))
    teacher, _ = models(pair, source)
    precision = "fp32" if device.type == "cpu" else "bf16"
    store = fill(
        cache_settings(4 * batch, folder / f"step-{pair}", batch, str(device), "random"),
        source=source,
        teachers=[teacher],
    ).store
    live = LiveTeacher([teacher], device, precision)
    stored = StoredRows(store, "fixed", (0,))
    cached = CachedTeacher("cached", store, stored, [live.scales[0]], device, None, [])
    common: dict[str, Any] = {"batch_size": batch, "caption": "first", "steps": rounds + 2, "device": device}
    variants: dict[str, Variant] = {}
    for name in ("contrastive", "live", "cached"):
        _, student = models(pair, source)
        extra: dict[str, Any] = (
            {"teacher": teacher} if name == "live" else {"stored": stored} if name == "cached" else {}
        )
        loader = PairLoader(source, student=student, **common, **extra)
        given = {"contrastive": None, "live": live, "cached": cached}[name]
        variants[name] = Variant(student, loader, given, teacher.embed_dim, device, precision)
    for variant in variants.values():
        variant.step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds):
        names = list(variants)
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(variants[name].step())
    return {
        "pair": " -> ".join(PAIRS[pair]),
        "batch": batch,
        "rounds": rounds,
        "seconds": {name: round(statistics.median(s for s, _ in values), 4) for name, values in times.items()},
        "processor_seconds": {
            name: round(statistics.median(c for _, c in values), 4) for name, values in times.items()
        },
        "cached_over_contrastive": ratio(times["cached"], times["contrastive"]),
        "live_over_cached": ratio(times["live"], times["cached"]),
        "live_over_contrastive": ratio(times["live"], times["contrastive"]),
    }


def ratio(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> dict[str, float]:
    """Ratios of seconds (median, least and greatest of the rounds; fastest over fastest) and of processor seconds."""
    values = sorted(x[0] / y[0] for x, y in zip(a, b))
    return {
        "median": round(statistics.median(values), 3),
        "least": round(values[0], 3),
        "greatest": round(values[-1], 3),
        "of_fastest": round(min(a)[0] / min(b)[0], 3),
        "processor_time": round(statistics.median(x[1] / y[1] for x, y in zip(a, b)), 3),
    }


def photographs(data: str | None, split: str | None, count: int, folder: Path) -> PairSource:
    """The first pairs of the data named, or as many scenes written out as JPEG files: drawing them is not filling."""
    if data is not None:
        return Subset(open_pairs(data, split=split), count)
    return open_pairs(str(write_scenes(folder, "karpathy", "train", count, 0, workers=1)), split="train")


def filling(
    pair: str,
    count: int,
    batch: int,
    rounds: int,
    device: torch.device,
    folder: Path,
    data: str | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Images a second of a whole fill (read, decode, render, tokenise, forward, write) and of the teacher alone."""
    source = photographs(data, split, count, folder / f"jpeg-{pair}")
    teacher, _ = models(pair, source)
    teacher.module.to(device).eval().requires_grad_(False)
    pixels = torch.stack(
        [torch.from_numpy(render_pixels(source.image(i), EVALUATION, teacher.image)) for i in range(count)]
    )
    images = normalise(pixels, teacher.image)
    tokens = teacher.tokenizer([source.captions(i)[0] for i in range(count)])

    def bare() -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for part, texts in zip(images.split(batch), tokens.split(batch)):
                teacher.module.encode_image(part.to(device))
                teacher.module.encode_text(texts.to(device))
            if device.type == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def whole(turn: int) -> tuple[float, float]:
        began = time.process_time()
        out = folder / f"fill-{pair}-{turn}"
        report = fill(cache_settings(count, out, batch, str(device), "random"), source=source, teachers=[teacher])
        used = time.process_time() - began
        shutil.rmtree(out)
        return report.seconds, used

    bare()
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "fill": []}
    for turn in range(rounds):
        for name in ("bare", "fill") if turn % 2 else ("fill", "bare"):
            times[name].append(bare() if name == "bare" else whole(turn))
    return {
        "teacher": PAIRS[pair][0],
        "images": count,
        "rounds": rounds,
        "bare_images_per_second": round(count / statistics.median(s for s, _ in times["bare"]), 2),
        "fill_images_per_second": round(count / statistics.median(s for s, _ in times["fill"]), 2),
        "fill_rate_over_bare": ratio(times["bare"], times["fill"]),
    }


def made_up_store(folder: Path, samples: int, dim: int, dtype: Any) -> CacheStore:
    """A store of random unit rows, one caption an image, written block by block."""
    keys = [f"shard-{i // 10_000:05d}/{i:09d}" for i in range(samples)]
    records = (
        {"key": key, "row": i, "captions": 1, "digest": sample_digest(key, ("x",)), "synthetic": None}
        for i, key in enumerate(keys)
    )
    manifest = Manifest(
        dtype=dtype,
        block=4096,
        segments=(samples,),
        samples=write_samples(folder, records),
        data=DataEntry(name="made up", path="-", fingerprint="-", samples=samples, captions=samples),
        teachers=(
            TeacherEntry(
                name="-", weights="-", transform=ImageSpec(), tokenizer="-", precision="fp32", dim=dim, logit_scale=100
            ),
        ),
    )
    write_manifest(folder, manifest)
    store = CacheStore(folder)
    generator = torch.Generator().manual_seed(0)
    for block in range(len(store.layout)):
        start, stop = store.layout.bounds(block)
        rows = torch.nn.functional.normalize(torch.randn(2 * (stop - start), dim, generator=generator), dim=-1)
        values, scale = pack(rows, dtype)
        count = stop - start
        tensors = {"image": values[:count, None], "text": values[count:], "text_start": torch.arange(count + 1)}
        tensors["valid"] = torch.ones(count, dtype=torch.uint8)
        if scale is not None:
            tensors |= {"image_scale": scale[:count, None], "text_scale": scale[count:]}
        write_block(store.path("pairs", 0, block), tensors, store.block_metadata("pairs", 0, block))
    return CacheStore(folder)


def reading(samples: int, dim: int, batch: int, folder: Path) -> list[dict[str, Any]]:
    """Random batches read cold (pages dropped from memory before) and warm, by number format."""
    found = []
    for dtype in ("fp16", "bf16", "int8"):
        store = made_up_store(folder / dtype, samples, dim, dtype)
        size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
        rng = np.random.default_rng(0)
        batches = [rng.integers(samples, size=batch).tolist() for _ in range(40)]
        seconds = {}
        for state in ("cold", "warm"):
            opened = CacheStore(store.folder)
            opened.require_fields()
            if state == "cold":
                for path in store.folder.rglob("*.safetensors"):
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                opened = CacheStore(store.folder)
            else:
                for indices in batches:
                    opened.read(0, indices, [0] * batch, [0] * batch)
            times, used = [], time.process_time()
            for indices in batches:
                began = time.perf_counter()
                opened.read(0, indices, [0] * batch, [0] * batch)
                times.append(time.perf_counter() - began)
            seconds[state] = times
            processor = (time.process_time() - used) / len(batches)
        found.append(
            {
                "dtype": dtype,
                "samples": samples,
                "dim": dim,
                "bytes_per_pair": round(size / samples, 1),
                "batch": batch,
                "cold_first_batch_ms": round(1000 * seconds["cold"][0], 2),
                "cold_pairs_per_second": round(batch * len(batches) / sum(seconds["cold"])),
                "warm_batch_ms": round(1000 * statistics.median(seconds["warm"]), 2),
                "warm_batch_processor_ms": round(1000 * processor, 2),
                "warm_pairs_per_second": round(batch / statistics.median(seconds["warm"])),
            }
        )
    return found


def by_format(name: str, data: str, split: str | None, device: torch.device, folder: Path) -> dict[str, Any]:
    """R@K of a teacher live and from a store of each number format, all captions."""
    source = open_pairs(data, split=split)
    model = load_model(name, teacher=True)
    encoded = encode_pairs(model, source, device=device, progress=False)
    scores = {"live fp32": retrieval(encoded.image, encoded.text, encoded.text_to_image)}
    cosines = {}
    for dtype in ("fp16", "bf16", "int8"):
        config = CacheConfig(
            teacher=name,
            data=DataConfig(path=data, split=split),
            out=folder / dtype,
            dtype=dtype,
            device=str(device),
            precision="fp32",
        )
        store = fill(config).store
        keys = {store.samples.key(i): i for i in range(len(store))}
        images = [keys[key] for key in encoded.keys]
        image, _ = store.read(0, images, [0] * len(images), [0] * len(images))
        owners = [images[row] for row in encoded.text_to_image.tolist()]
        _, text = store.read(0, owners, encoded.caption_indices.tolist(), [0] * len(owners))
        scores[dtype] = retrieval(image, text, encoded.text_to_image)
        similar = torch.nn.functional.cosine_similarity(
            torch.cat([image, text]), torch.cat([encoded.image, encoded.text])
        )
        cosines[dtype] = round(float(similar.min()), 6)
    kept = ("i2t_R@1", "t2i_R@1", "i2t_R@10", "t2i_R@10")
    return {
        "model": Path(name).name,
        "data": source.name,
        "images": len(encoded.image),
        "captions": len(encoded.text),
        "least_cosine": cosines,
        "scores": {form: {k: round(100 * float(values[k]), 3) for k in kept} for form, values in scores.items()},
        "R@1_change_points": {
            form: round(max(abs(100 * float(scores[form][k] - scores["live fp32"][k])) for k in kept[:2]), 3)
            for form in cosines
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch", type=int, default=16, help="of the large pair; the small one takes eight times as many"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", default="large,small", help="which pairs of models")
    parser.add_argument("--samples", type=int, default=200_000, help="of the store whose reading is measured")
    parser.add_argument("--photographs", metavar="DATA", help="pairs to fill from (default: scenes as JPEG files)")
    parser.add_argument("--parts", default="steps,fill,read", help="what to measure")
    parser.add_argument("--retrieval", metavar="MODEL", help="measure R@1 of this model by number format instead")
    parser.add_argument("--data", default="scenes:val")
    parser.add_argument("--split")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    chosen = given.pairs.split(",")
    report: dict[str, Any] = {}
    if given.json and given.json.exists():
        report = json.loads(given.json.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.retrieval:
            report["retrieval"] = by_format(given.retrieval, given.data, given.split, device, folder)
        else:
            report["machine"] = {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
                "threads": given.threads,
                "torch": torch.__version__,
            }
            for part in given.parts.split(","):
                if part == "steps":
                    sizes = {"large": given.batch, "small": 8 * given.batch}
                    report["steps"] = [steps(pair, sizes[pair], given.rounds, device, folder) for pair in chosen]
                elif part == "fill":
                    counts = {"large": 2 * given.batch, "small": 32 * given.batch}
                    report["fill"] = [
                        filling(
                            pair,
                            counts[pair],
                            given.batch,
                            given.rounds,
                            device,
                            folder,
                            given.photographs,
                            given.split,
                        )
                        for pair in chosen
                    ]
                elif part == "read":
                    report["read"] = reading(given.samples, 512, 1024, folder)
                write(report, given.json)
        write(report, given.json)
    print(json.dumps(report, indent=1))


def write(report: dict[str, Any], path: Path | None) -> None:
    """Keep what is known so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
