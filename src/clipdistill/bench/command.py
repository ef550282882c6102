"""`clipdistill bench`: models by name, a table on the terminal, JSON on request."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError, nearest
from clipdistill.models.names import check_model_name
from clipdistill.registry import BACKENDS
from clipdistill.runtime.console import TextTable, say
from clipdistill.runtime.files import require_place, write_json


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
    given = vars(arguments)
    settings = {name: given[name] for name in ("seconds", "rounds", "threads", "device", "data", "split")}
    settings |= {name: given[name].split(",") for name in ("backend", "dtype", "towers")}
    try:
        batch_sizes = [int(part) for part in arguments.batch.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {arguments.batch}: expected whole numbers separated by commas") from error
    show(measured(arguments.models, **settings, batch_sizes=batch_sizes, out=arguments.json))
    return 0


def measured(
    models: Sequence[str],
    *,
    backend: Sequence[str] = ("eager",),
    data: str | None = None,
    split: str | None = None,
    out: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Load the named models, measure them against each other, and write JSON to `out` if given.

    settings: those of `throughput`. The last model is the one that ratios refer to. Raises InputError for a name that
    is nothing known and for a place that cannot be written, before anything is measured.
    """
    if out is not None:
        require_place(out, "measurements")
    for name in backend:
        if name not in BACKENDS:
            raise InputError(f"unknown back end '{name}'{nearest(name, BACKENDS.names())}")
    for name in models:
        check_model_name(name)
    source = open_pairs(data, split=split) if data is not None else None
    from clipdistill.bench.throughput import throughput
    from clipdistill.models.load import load_model

    loaded = {name: load_model(name, teacher=True) for name in dict.fromkeys(models)}
    result = throughput(loaded, backends=backend, source=source, reference=models[-1], **settings)
    if out is not None:
        write_json(out, result)
    return result


def show(result: dict[str, Any], file: TextIO | None = None) -> None:
    """The result as tables: sizes, then speed with intervals and ratios, then what to beware of."""
    say(result["device"]["label"], file)
    sizes = TextTable(["model", "parameters", "FLOPs/image", "FLOPs/text", "on disk"], title="size")
    for name, facts in result["models"].items():
        counts = facts["parameters"]["total"], facts["flops"]["image"], facts["flops"]["text"]
        sizes.rows.append([name, *map(_short, counts), _megabytes(facts["size_bytes"])])
    sizes.print(file)
    ratios = {_key(r): r for r in result["ratios"]}
    withheld = {_key(row) for row in result.get("withheld", [])}
    compared: list[dict[str, Any]] = result.get("setting_ratios", [])
    others = {_key(r): r for r in compared}
    first: dict[str, str] = compared[0]["against"] if compared else {}
    heads = ["model", "setting", "tower", "per second (95 %)", f"ratio to {result['settings']['reference']}"]
    heads += ["median", "p95", "memory", *([f"ratio to {first['backend']}, {first['dtype']}"] if first else [])]
    speed = TextTable(heads, title="speed", text=(0, 1, 2))
    for row in result["measurements"]:
        ratio = ratios.get(_key(row))
        times = "withheld: noise" if _key(row) in withheld else ""
        cells = [
            row["model"],
            f"{row['backend']}, {row['dtype']}, batch {row['batch']}",
            row["tower"],
            f"{row['value']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else times,
            *(f"{row[name]:.2f} ms" if name in row else "" for name in ("median_ms", "p95_ms")),
            _megabytes(row.get("peak_bytes")),
        ]
        if first:
            cells.append(f"{others[_key(row)]['value']:.2f}" if _key(row) in others else times)
        speed.rows.append(cells)
    speed.print(file)
    for failure in result["failures"]:
        text = f"not measured: {failure['model']} with {failure['backend']}, {failure['dtype']}: {failure['reason']}"
        say(text, file, colour="red")
    for warning in result["warnings"]:
        say(f"warning: {warning}", file, colour="yellow")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "tower", "backend", "dtype", "batch"))


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def _megabytes(value: float | None) -> str:
    return f"{value / 1e6:,.1f} MB" if value else ""
