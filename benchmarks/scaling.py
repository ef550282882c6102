"""What a large run costs in disk and hours, from formulas: `python benchmarks/scaling.py --data CC12M`.

Prints the table of docs/scaling.md. FLOPs are counted on the models themselves; speed and utilisation of the device are
what the command line says, and the hours are only as good as those.
"""

from __future__ import annotations

import argparse

from clipdistill.bench.cost import count_flops
from clipdistill.models import build_student

DATA = {"CC3M": (2_890_000, 1), "CC12M": (9_970_000, 1), "CC3M+CC12M": (12_860_000, 1), "COCO": (113_287, 5)}
"""Images, captions an image."""
BYTES_AN_IMAGE = 24_000
"""A photograph with a shorter side of 256 pixels as JPEG of quality 95: the mean over 150 of Flickr8k was 23.6 kB."""
TAR_OVERHEAD = 3_000
"""Headers, padding and description of a sample in img2dataset's tars."""


def disk(images: int, captions: int, dimensions: int, views: int) -> dict[str, float]:
    """Gigabytes of shards, of the embedding cache (fp16, docs/cache.md), and of checkpoints of a ViT-T/16 student."""
    shards = images * (BYTES_AN_IMAGE + TAR_OVERHEAD)
    cache = images * ((1 + views + captions) * 2 * dimensions + 35 * views + 64)
    # weights and Adam's two moments in fp32, of a student of 46.1 M parameters; two checkpoints are kept
    checkpoints = 2 * 46.1e6 * 4 * 3
    return {"shards": shards / 1e9, "cache": cache / 1e9, "checkpoints": checkpoints / 1e9}


def hours(pairs: float, student: float, teacher: float, gpus: int, tflops: float, utilisation: float) -> float:
    """Hours for `pairs` pairs seen: forward and backward of the student (3 x its FLOPs), forward of the teacher."""
    return pairs * (3 * student + teacher) / (gpus * tflops * 1e12 * utilisation) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DATA), default="CC12M")
    parser.add_argument("--student", default="ViT-T-16")
    parser.add_argument("--teacher", default="ViT-B-16")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of one GPU in bf16 (312: A100)")
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the peak that is reached")
    parser.add_argument("--views", type=int, default=0, help="stored views of the cache")
    parser.add_argument("--dimensions", type=int, default=512, help="of the teacher's embedding")
    chosen = parser.parse_args()
    images, captions = DATA[chosen.data]
    flops = {}
    for role, name in (("student", chosen.student), ("teacher", chosen.teacher)):
        model = build_student(name, seed=0)
        flops[role] = sum(count_flops(model, tower) for tower in ("image", "text"))
        print(f"{role} {name}: {flops[role] / 1e9:.1f} GFLOPs a pair")
    for name, size in disk(images, captions, chosen.dimensions, chosen.views).items():
        print(f"{name}: {size:,.1f} GB")
    device = (chosen.gpus, chosen.tflops, chosen.utilisation)
    seen = float(images) * chosen.epochs
    live = hours(seen, flops["student"], flops["teacher"], *device)
    cached = hours(seen, flops["student"], 0, *device)
    filling = hours(images * (1 + chosen.views), 0, flops["teacher"], *device)
    print(f"training, live teacher: {live:.1f} h, needs {seen / live / 3600:,.0f} pairs/s from the loader")
    print(f"training, cached teacher: {cached:.1f} h, needs {seen / cached / 3600:,.0f} pairs/s from the loader")
    print(f"filling the cache: {filling:.1f} h")


if __name__ == "__main__":
    main()
