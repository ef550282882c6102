"""What a large run costs in disk and hours, from formulas: `python benchmarks/scaling.py --data CC12M`.

With `--measure 2000000` so many pairs are made up (tars of 10,000, hard links of one), opened twice, each time in a
process of its own, beside a twentieth of them: what is found are the memory that each further pair takes, and the time
of the first opening, of the next, of the fingerprint and of an epoch's order, in seconds of the processor.

Otherwise prints the table of docs/scaling.md. FLOPs are counted on the models themselves; speed and utilisation of the
device are what the command line says, and the hours are only as good as those.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 10_000
CAPTION = "a photograph of {:06d} things beside a lake at evening"

DATA = {
    "CC3M": (2_890_000, 1),
    "CC12M": (9_970_000, 1),
    "CC3M+CC12M": (12_860_000, 1),
    "COCO": (113_287, 5),
    "100M": (100_000_000, 1),
}
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


def write_shard(path: Path) -> None:
    """SHARD samples: an image of some bytes that no decoder is asked to read, and a caption of 53 letters."""
    with tarfile.open(path, "w") as tar:
        for number in range(SHARD):
            for ending, content in (("jpg", b"\xff\xd8" + bytes(98)), ("txt", CAPTION.format(number).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def opened(pattern: str) -> dict[str, float]:
    """Open a set; seconds and bytes. Called in a process of its own."""
    from clipdistill.data.open import open_pairs
    from clipdistill.data.sampler import StepSampler

    open_pairs("scenes:val?size=2")
    before, start = resident(), time.process_time()
    source = open_pairs(pattern)
    found: dict[str, float] = {"pairs": len(source), "open": time.process_time() - start}
    found["bytes"], found["peak"] = (
        resident() - before,
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    )
    start = time.process_time()
    source.fingerprint()
    found["fingerprint"], start = time.process_time() - start, time.process_time()
    before = resident()
    sampler = StepSampler(len(source), 4096, seed=0)
    sampler.indices(0)
    found["order"], found["order bytes"] = time.process_time() - start, resident() - before
    start = time.process_time()
    for step in range(100):
        sampler.indices(step)
    found["step"] = (time.process_time() - start) / 100
    picked = np.random.default_rng(0).integers(len(source), size=1000)
    start = time.process_time()
    for i in picked:
        source.captions(i), source.image_bytes(i)
    found["pair"] = (time.process_time() - start) / len(picked)
    return found


def measure(pairs: int) -> None:
    """Print the figures of docs/scaling.md."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "shard.tar")
        few, many = max(1, pairs // SHARD // 20), pairs // SHARD
        for number in range(many):
            for count, place in ((few, "few"), (many, "many")):
                (folder / place).mkdir(exist_ok=True)
                if number < count:
                    os.link(folder / "shard.tar", folder / place / f"{number:05d}.tar")
        environment = {**os.environ, "CLIPDISTILL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for turn in ("first", "next"):
            both = []
            for place, count in (("few", few), ("many", many)):
                command = [sys.executable, __file__, "--opened", f"{folder}/{place}/{{00000..{count - 1:05d}}}.tar"]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
                both.append(json.loads(done.stdout))
            small, large = both
            more = large["pairs"] - small["pairs"]
            row, peak = ((large[kind] - small[kind]) / more for kind in ("bytes", "peak"))
            order = large["order bytes"] / large["pairs"]
            lines = (
                f"{turn} opening: {large['pairs']:,.0f} pairs in {large['open']:.1f} s",
                f"memory of each further pair: {row:.0f} bytes, at most {peak:.0f} while opening",
                f"fingerprint {large['fingerprint']:.1f} s",
                f"an epoch's order {large['order']:.2f} s, {order:.0f} bytes a pair",
                f"4,096 samples of a step {1e6 * large['step']:.0f} us, a pair's bytes {1e6 * large['pair']:.0f} us",
            )
            print(*lines, sep="\n  ")


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
    parser.add_argument("--price", type=float, default=2.0, help="of an hour of one GPU")
    parser.add_argument("--measure", type=int, metavar="PAIRS", help="open so many pairs that are made up")
    parser.add_argument("--opened", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.opened:
        print(json.dumps(opened(chosen.opened)))
        return
    if chosen.measure:
        measure(chosen.measure)
        return
    from clipdistill.bench.cost import count_flops
    from clipdistill.models import build_student

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
    for what, time_taken in (("live teacher", live), ("cached teacher and its cache", cached + filling)):
        print(f"price, {what}: {time_taken * chosen.gpus * chosen.price:,.0f}")


if __name__ == "__main__":
    main()
