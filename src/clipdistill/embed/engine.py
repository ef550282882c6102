"""Choosing what runs a tower when a set is encoded: torch as it is, compiled, or a graph of another runtime.

Another engine is taken only where its rows on a first batch agree with the eager tower's in float32; what cannot be
converted stays with torch, and one line says so. `auto` times what is installed, if the set is long enough to pay for
the conversion.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdistill.embed.names import FORMATS, NEEDS, installed
from clipdistill.errors import InputError, first_line
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.parameters import evaluation_mode
from clipdistill.registry import BACKENDS
from clipdistill.runtime.machine import free_memory, wait_for

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}
"""How near the rows of an engine must be to the eager tower's in float32."""
CONVERSION_PAYS = 60.0
COMPILATION_PAYS = {"cpu": 1800.0, "cuda": 300.0}
"""Seconds that torch would take for the set, from which `auto` tries other engines."""
GAIN = 1.1
"""How many times as fast as torch an engine must be for `auto` to take it."""
BATCH = {"image": 16, "text": 64}
"""Items on which engines are timed and compared."""

Tower = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TowerEngine:
    """What runs one tower. agreement: least cosine with the eager tower in float32 on the first batch (None: it is the
    eager tower in float32, or nothing was compared); seconds: for an item where it was timed."""

    name: str = "torch"
    run: Tower | None = None
    agreement: float | None = None
    seconds: float | None = None


def choose_engine(
    model: ClipModel,
    tower: str,
    wanted: str,
    eager: Tower,
    batch: Tensor,
    *,
    dtype: str,
    items: int,
    say: Callable[[str], None] = lambda line: None,
) -> TowerEngine:
    """The engine for `tower` ("image", "text") of a model that is on its device.

    wanted: one of ENGINES; eager: the tower by torch in the number format `dtype` (its full name); batch: prepared
    images (n, 3, H, W) or tokens (n, L) on the device; items: how many are to be encoded; say: gets what was chosen.
    """
    batch = batch[: BATCH[tower]]
    with evaluation_mode(model.module), torch.inference_mode(False), torch.no_grad():
        batch = batch.clone()  # a tensor made in inference mode cannot be exported with
        if "exported" in model.architecture:
            if wanted not in ("auto", "torch"):
                raise InputError(f"'{model.name}' is an export and runs as it is: leave --engine {wanted} out")
            return TowerEngine()
        plain = eager
        if dtype != "float32":

            def plain(rows: Tensor) -> Tensor:
                encode: Tower = getattr(model.module, f"encode_{tower}")
                return encode(rows)

        few = batch[: max(2, len(batch) // 8)]
        eager(few)  # the first call sets things up
        seconds = min(_timed(eager, few) for _ in range(2)) / len(few)
        names = _candidates(model, dtype, batch.device, seconds * items) if wanted == "auto" else [wanted]
        best = TowerEngine(seconds=seconds)
        if not names or (names == ["torch"] and dtype == "float32"):
            return best
        reference = plain(batch).float()
        if dtype != "float32":
            best = TowerEngine(agreement=_cosine(eager(batch), reference), seconds=seconds)
            if best.agreement is not None and best.agreement < LEAST_COSINE[dtype]:
                say(f"{tower} tower: {dtype} is coarse for this model, cosine with float32 {best.agreement:.5f}")
        times = {"torch": min(_timed(eager, batch) for _ in range(2)) / len(batch)}
        limit = times["torch"] / GAIN if wanted == "auto" else float("inf")
        with tempfile.TemporaryDirectory(prefix="clipdistill-engine-") as folder:
            for name in (name for name in names if name != "torch"):
                try:
                    run = _converted(name, model, tower, eager, dtype, batch.device, Path(folder))
                    agreement = _cosine(run(batch), reference)
                    if not agreement >= LEAST_COSINE[dtype]:
                        raise InputError(f"its rows differ from torch's, least cosine {agreement:.5f}")
                    times[name] = min(_timed(run, batch) for _ in range(2)) / len(batch)
                except Exception as error:  # exporters, runtimes and compilers raise many kinds
                    say(f"{tower} tower: {name} does not run it, torch does ({first_line(error)})")
                    continue
                if times[name] < limit:
                    best, limit = TowerEngine(name, run, agreement, times[name]), times[name]
    if best.name != "torch":
        say(
            f"{tower} tower: {best.name}, {dtype}, {times['torch'] / times[best.name]:.1f} times as fast as torch, "
            f"cosine with it at least {best.agreement:.7f}"
        )
    return best


def _candidates(model: ClipModel, dtype: str, device: torch.device, seconds: float) -> list[str]:
    """Engines worth trying for work that takes torch so many seconds; "torch" first where others are tried."""
    found: list[str] = []
    if device.type == "cpu" and seconds >= CONVERSION_PAYS:
        weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
        free = free_memory()
        if free is None or free > 8 * weights:  # a copy, the graph, and what a runtime makes of it
            found = [name for name in NEEDS if dtype in FORMATS[name] and installed(name)]
    if seconds >= COMPILATION_PAYS.get(device.type, float("inf")):
        found.append("compile")
    return ["torch", *found] if found else []


def _converted(
    name: str, model: ClipModel, tower: str, eager: Tower, dtype: str, device: torch.device, folder: Path
) -> Tower:
    if name == "compile":
        compiled = torch.compile(eager)

        def run(rows: Tensor) -> Tensor:
            for axis in range(1 if tower == "image" else 2):  # one graph for all batches and lengths
                torch._dynamo.maybe_mark_dynamic(rows, axis)
            return compiled(rows)

        return run
    backend: Any = BACKENDS.get(name)
    loaded = backend.load(model, device, dtype, towers=(tower,), folder=folder)
    call: Callable[[Tensor], Any] = loaded.towers[tower]
    return lambda rows: torch.from_numpy(call(rows))


def _cosine(rows: Tensor, reference: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(rows.cpu().double(), reference.cpu().double()).min())


def _timed(run: Tower, batch: Tensor) -> float:
    began = time.perf_counter()
    run(batch)
    wait_for(batch.device)
    return time.perf_counter() - began
