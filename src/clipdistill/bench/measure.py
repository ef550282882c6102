"""`clipdistill.bench(...)`: models by name, measured against each other, and the result as tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from clipdistill.arguments import checked
from clipdistill.bench.checks import check_settings
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError, nearest
from clipdistill.models.names import check_model_name
from clipdistill.registry import BACKENDS
from clipdistill.runtime.console import Shown, TextTable, compact, file_size, say
from clipdistill.runtime.files import require_place, write_json

if TYPE_CHECKING:
    import torch


class Measurements(Shown, dict[str, Any]):
    """What `bench` measured, JSON-able as `clipdistill bench --json` writes it; shows itself as tables with intervals.

    Keys: "models" (parameters, FLOPs, bytes), "measurements" and "ratios" (lists of rows with value, low, high: images
    or texts a second, 95 %), "device", "settings", "failures", "warnings".
    """

    def __repr__(self) -> str:
        text = io.StringIO()
        show(self, text)
        return text.getvalue().rstrip()


@checked
def bench(
    models: str | Path | Sequence[str | Path],
    *,
    backends: Sequence[str] = ("eager",),
    dtype: str | Sequence[str] = "float32",
    batch_sizes: Sequence[int] = (1, 32),
    towers: Sequence[str] = ("image", "text"),
    seconds: float = 2.0,
    rounds: int = 10,
    threads: int | None = None,
    device: str | torch.device | None = None,
    data: str | None = None,
    split: str | None = None,
    out: str | Path | None = None,
) -> Measurements:
    """Speed, latency and size of models, alternating in one session; ratios refer to the last one named.

    models: names; backends: "eager", "compile", "onnx", "openvino", "litert", "executorch"; dtype: "float32", "bf16",
    "fp16", of exports "int8" too; batch_sizes: images (texts) a call; towers: "image", "text"; seconds: timed for each
    model, tower and setting, in `rounds` rounds; threads: of torch on the CPU (None: torch's); device: None is a GPU
    where there is one; data, split: pairs to measure end to end too (read, decode, transform, image tower); out: a JSON
    file for the result.

    Returns Measurements: images or texts a second with 95 % intervals over rounds, milliseconds, bytes. Raises
    InputError for unknown names, and for a place that cannot be written, before anything is measured.
    """
    names = [str(name) for name in ([models] if isinstance(models, str | Path) else models)]
    if out is not None:
        require_place(out, "measurements", (b'"libraries"', b'"measurements"'))
    for name in backends:
        if name not in BACKENDS:
            raise InputError(f"unknown back end '{name}'{nearest(name, BACKENDS.names())}")
    for name in names:
        check_model_name(name)
    if len(set(names)) < len(names):
        raise InputError(f"{next(m for m in names if names.count(m) > 1)}: named twice; every model is measured once")
    if data is not None and "image" not in towers:
        raise InputError("--data is measured through the image tower, which --towers leaves out: leave out one of them")
    if split is not None and data is None:
        raise InputError("--split names a part of --data: give --data as well")
    check_settings(names, batch_sizes, towers, seconds, rounds, None, threads)
    source = open_pairs(data, split=split) if data is not None else None
    from clipdistill.bench.backends import find_dtype
    from clipdistill.bench.throughput import throughput
    from clipdistill.models.load import load_model
    from clipdistill.runtime.machine import pick_device

    pick_device(device)
    for name in [dtype] if isinstance(dtype, str) else dtype:
        find_dtype(name)
    result = throughput(
        {name: load_model(name, teacher=True) for name in dict.fromkeys(names)}, reference=names[-1], backends=backends,
        dtype=dtype, batch_sizes=batch_sizes, towers=towers, seconds=seconds, rounds=rounds, threads=threads,
        device=device, source=source,
    )  # fmt: skip
    if source is not None and source.problems:
        result["warnings"].append(source.problems.sentence(source.name))
    if out is not None:
        write_json(out, result, checked=True)
    return Measurements(result)


def show(result: dict[str, Any], file: TextIO | None = None) -> None:
    """The result as tables: sizes, then speed with intervals and ratios, then what to beware of."""
    say(result["device"]["label"], file)
    sizes = TextTable(["model", "parameters", "FLOPs/image", "FLOPs/text", "on disk"], title="size")
    for name, facts in result["models"].items():
        counts = facts["parameters"]["total"], facts["flops"]["image"], facts["flops"]["text"]
        sizes.rows.append([name, *map(compact, counts), file_size(facts["size_bytes"])])
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
            f"text, {row['length']} tokens" if "length" in row else row["tower"],
            f"{row['value']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else times,
            *(f"{row[name]:.2f} ms" if name in row else "" for name in ("median_ms", "p95_ms")),
            file_size(row["peak_bytes"]) if row.get("peak_bytes") else "",
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
