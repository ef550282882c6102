"""`clipdistill bench`: models by name, a table on the terminal, JSON on request."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipdistill.bench.backends import BACKENDS
from clipdistill.bench.throughput import TOWERS, throughput
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.models import load_model


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
        help=f"one or several, separated by commas: {', '.join(BACKENDS)} (default: eager)",
    )
    add("--dtype", default="float32", help="float32, bf16, fp16; several separated by commas (default: float32)")
    add("--batch", default="1,32", help="batch sizes, separated by commas (default: 1,32)")
    add("--towers", default="image,text", help="image, text or both (default: image,text)")
    add("--seconds", type=float, default=2.0, help="timed seconds for each model, tower and setting (default: 2)")
    add("--rounds", type=int, default=10, help="rounds in which the models alternate (default: 10)")
    add("--threads", type=int, help="threads of torch on the CPU (default: torch's)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA when there is one)")
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
    try:
        batch_sizes = [int(part) for part in arguments.batch.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {arguments.batch}: expected whole numbers separated by commas") from error
    run_bench(
        arguments.models,
        backends=arguments.backend.split(","),
        dtypes=arguments.dtype.split(","),
        batch_sizes=batch_sizes,
        towers=arguments.towers.split(","),
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        threads=arguments.threads,
        device=arguments.device,
        data=arguments.data,
        split=arguments.split,
        out=arguments.json,
    )
    return 0


def run_bench(
    models: Sequence[str],
    *,
    backends: Sequence[str] = ("eager",),
    dtypes: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 32),
    towers: Sequence[str] = TOWERS,
    seconds: float = 2.0,
    rounds: int = 10,
    threads: int | None = None,
    device: str | None = None,
    data: str | None = None,
    split: str | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Load the named models, measure them against each other, print a table and write JSON to `out` if given.

    The last model is the one that ratios refer to. Raises InputError for a name that is nothing known.
    """
    if out is not None and out.is_dir():
        raise InputError(f"{out}: this is a folder; name the file to write, for example {out / 'bench.json'}")
    source = open_pairs(data, split=split) if data is not None else None
    loaded = {name: load_model(name, teacher=True) for name in dict.fromkeys(models)}
    result = throughput(
        loaded,
        device=device,
        batch_sizes=batch_sizes,
        towers=towers,
        seconds=seconds,
        dtype=dtypes,
        backends=backends,
        source=source,
        threads=threads,
        rounds=rounds,
        reference=models[-1],
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
        temporary.replace(out)
    show(result, console or Console())
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """The result as tables: sizes, then speed with intervals and ratios, then what to beware of."""
    console.print(f"{result['device']['label']}", markup=False)
    sizes = Table("model", "parameters", "FLOPs/image", "FLOPs/text", "on disk", title="size")
    for name, facts in result["models"].items():
        flops = facts["flops"]
        row = (
            _short(facts["parameters"]["total"]),
            _short(flops["image"]),
            _short(flops["text"]),
            _megabytes(facts["size_bytes"]),
        )
        sizes.add_row(_plain(name), *row)
    console.print(sizes)
    ratios = {_key(r): r for r in result["ratios"]}
    compared: list[dict[str, Any]] = result.get("setting_ratios", [])
    others = {_key(r): r for r in compared}
    first: dict[str, str] = compared[0]["against"] if compared else {}
    reference = result["settings"]["reference"]
    speed = Table(
        "model",
        "setting",
        "tower",
        "per second (95 %)",
        f"ratio to {_plain(reference)}",
        "median",
        "p95",
        "memory",
        *([f"ratio to {first['backend']}, {first['dtype']}"] if first else []),
        title="speed",
    )
    for row in result["measurements"]:
        ratio = ratios.get(_key(row))
        times = f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
        speed.add_row(
            _plain(row["model"]),
            f"{row['backend']}, {row['dtype']}, batch {row['batch']}",
            row["tower"],
            f"{row['value']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})",
            times,
            f"{row['median_ms']:.2f} ms" if "median_ms" in row else "",
            f"{row['p95_ms']:.2f} ms" if "p95_ms" in row else "",
            _megabytes(row.get("peak_bytes")),
            *([f"{others[_key(row)]['value']:.2f}" if _key(row) in others else ""] if first else []),
        )
    console.print(speed)
    for failure in result["failures"]:
        text = f"not measured: {failure['model']} with {failure['backend']}, {failure['dtype']}: {failure['reason']}"
        console.print(text, style="red", markup=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "tower", "backend", "dtype", "batch"))


def _plain(text: str) -> str:
    """Text without meaning as console markup."""
    return text.replace("[", r"\[")


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def _megabytes(value: float | None) -> str:
    return f"{value / 1e6:,.1f} MB" if value else ""
