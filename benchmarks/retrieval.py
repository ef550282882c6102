"""Speed and memory of the retrieval engine against CLIP_benchmark's functions, at COCO's size, in one run.

    python benchmarks/retrieval.py [--images 5000] [--captions 5] [--dimensions 512] [--threads 2] [--json out.json]

Needs the package clip-benchmark (its functions only:  pip install --no-deps clip-benchmark tqdm). The two take turns,
ours twice for each run of theirs, and best and median are reported. Memory is the peak above the embeddings,
sampled from the process. On a busy machine  --clock cpu --threads 1  compares processor time instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipdistill.evaluate.retrieval import retrieval

KS = (1, 5, 10)


def embeddings(images: int, captions: int, dimensions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows that retrieve like a CLIP does on COCO (t2i R@1 near 0.4): captions are noisy copies of images."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(images, dimensions, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(captions)
    noise = torch.randn(len(owner), dimensions, generator=generator) / dimensions**0.5
    return image, torch.nn.functional.normalize(image[owner] + 6.3 * noise, dim=1), owner


def clip_benchmark(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """R@K as CLIP_benchmark's `evaluate` computes it from embeddings (its default batch size of 64)."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text @ image.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True
    result = {}
    for k in KS:
        found = batchify(recall_at_k, scores, positive, 64, "cpu", k=k) > 0
        result[f"t2i_R@{k}"] = found.float().mean().item()
        found = batchify(recall_at_k, scores.T, positive.T, 64, "cpu", k=k) > 0
        result[f"i2t_R@{k}"] = found.float().mean().item()
    return result


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(function: Callable[[], dict[str, Any]], clock: Callable[[], float]) -> tuple[float, float, dict[str, Any]]:
    """Seconds on `clock`, peak extra memory in MB, and the result of one call."""
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = clock()
    result = function()
    seconds = clock() - start
    done.set()
    watcher.join()
    return seconds, max(0, peak[0] - before) / 1e6, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="turns: one run of theirs and two of ours")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    image, text, owner = embeddings(arguments.images, arguments.captions, arguments.dimensions)

    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    # the first call is the one whose memory counts (nothing is allocated yet), and also the warm-up
    ours = [measure(lambda: retrieval(image, text, owner, ks=KS), clock)]
    theirs = []
    for _ in range(arguments.repeats):
        theirs.append(measure(lambda: clip_benchmark(image, text, owner), clock))
        ours += [measure(lambda: retrieval(image, text, owner, ks=KS), clock) for _ in range(2)]
    seconds, their_seconds = [run[0] for run in ours], [run[0] for run in theirs]
    expected, found = theirs[0][2], ours[0][2]
    report = {
        "images": len(image),
        "texts": len(text),
        "dimensions": image.shape[1],
        "threads": arguments.threads,
        "clock": arguments.clock,
        "ours_seconds": round(min(seconds), 3),
        "ours_seconds_median": round(statistics.median(seconds), 3),
        "ours_peak_extra_mb": round(ours[0][1], 1),
        "clip_benchmark_seconds": round(min(their_seconds), 3),
        "clip_benchmark_seconds_median": round(statistics.median(their_seconds), 3),
        "clip_benchmark_peak_extra_mb": round(max(run[1] for run in theirs), 1),
        "speedup": round(min(their_seconds) / min(seconds), 1),
        "speedup_median": round(statistics.median(their_seconds) / statistics.median(seconds), 1),
        "largest_difference_of_R@K": max(abs(expected[name] - found[name]) for name in expected),
        "scores": {name: round(value, 5) for name, value in found.items()},
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
