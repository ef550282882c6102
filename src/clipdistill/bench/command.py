"""`clipdistill bench`: models by name, a table on the terminal, JSON on request."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.bench.measure import bench, show
from clipdistill.errors import InputError, listed
from clipdistill.registry import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="runs, model folders, ViT-B-16, hf:owner/name ...; ratios refer to the last",
    )
    add(
        "--backend",
        default="eager",
        help=f"one or several, separated by commas: {', '.join(BACKENDS.names())} (default: eager)",
    )
    add("--dtype", default="float32", help="float32, bf16, fp16, of exports int8 too (default: float32)")
    add("--batch", default="1,32", help="batch sizes, separated by commas (default: 1,32)")
    add("--towers", default="image,text", help="image, text, or both (default: image,text)")
    add("--seconds", type=float, default=2.0, help="timed seconds for each model, tower and setting (default: 2)")
    add("--rounds", type=int, default=10, help="rounds in which the models alternate (default: 10)")
    add("--threads", type=int, help="threads of torch on the CPU (default: torch's)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")
    add("--data", help="also measure end to end on these pairs: read, decode, transform, image tower")
    add("--split", help="split of the data, where the format has splits")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything here (bench.json in a run folder enters its reports)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    given = vars(arguments)
    settings = {name: given[name] for name in ("seconds", "rounds", "threads", "device", "data", "split")}
    settings |= {name: listed(given[name], f"--{name}") for name in ("dtype", "towers")}
    backends = listed(arguments.backend, "--backend")
    try:
        batch_sizes = [int(part) for part in arguments.batch.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {arguments.batch}: expected whole numbers separated by commas") from error
    show(bench(arguments.models, backends=backends, batch_sizes=batch_sizes, out=arguments.json, **settings))
    return 0
