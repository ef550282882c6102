"""How fast, how large, how hungry: teacher and students measured against each other on one device.

The result is plain JSON (docs/benchmarking.md describes every field): it is what `clipdistill bench --json` writes,
what a run folder keeps as bench.json and what the report reads.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipdistill.bench import endtoend
from clipdistill.bench.backends import DTYPES, Backend, Loaded, find_dtype
from clipdistill.bench.checks import check_settings
from clipdistill.bench.cost import describe_model, median_caption, peak_activation_bytes, sample_inputs
from clipdistill.bench.device import busy_warning, describe_device, describe_libraries
from clipdistill.bench.timing import UNTRUSTED, Session, TimedTask, measure, median_interval, pair_rates, ratio_interval
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError, first_line
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import TOWERS
from clipdistill.registry import BACKENDS
from clipdistill.runtime.machine import pick_device, wait_for

FORMAT = 1


def throughput(
    models: Mapping[str, ClipModel],
    *,
    device: str | torch.device | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    towers: Sequence[str] = TOWERS,
    seconds: float = 2.0,
    dtype: str | Sequence[str] = "float32",
    backends: Sequence[str] = ("eager",),
    source: PairSource | None = None,
    threads: int | None = None,
    rounds: int = 10,
    reference: str | None = None,
) -> dict[str, Any]:
    """Measure models against each other; the result can be written as JSON.

    models: name -> model; all of them alternate in all back ends and dtypes, for one batch size after the other.
    seconds: timed seconds for each model, tower, batch size, dtype and back end, after warm-up.
    source: also measure end to end (read, decode, transform, image tower; one process) on these pairs.
    threads: of torch on the CPU, for this measurement only. reference: the model that ratios refer to (default
    "teacher" if there is one, else the first).
    Raises InputError for an unknown name or a setting in which no model could be measured.
    """
    check_settings(models, batch_sizes, towers, seconds, rounds, reference, threads)
    reference = reference or ("teacher" if "teacher" in models else next(iter(models)))
    where = pick_device(device)
    formats = [find_dtype(name) for name in ([dtype] if isinstance(dtype, str) else dtype)]
    chosen = [BACKENDS.get(name) for name in backends]
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        busy = busy_warning()
        result: dict[str, Any] = {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["clipdistill", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "clipdistill" else "",
            "device": describe_device(where),
            "libraries": describe_libraries(),
            "settings": {
                "batch_sizes": list(batch_sizes),
                "towers": list(towers),
                "seconds": seconds,
                "rounds": rounds,
                "dtypes": formats,
                "backends": [backend.name for backend in chosen],
                "reference": reference,
                "data": source.name if source is not None else None,
            },
            "models": {name: describe_model(model) for name, model in models.items()},
            "measurements": [],
            "ratios": [],
            "setting_ratios": [],
            "withheld": [],
            "failures": [],
            "warnings": [busy] if busy else [],
        }
        bench = _Bench(models, where, tuple(towers), seconds, rounds, reference, source, result)
        bench.measure([(backend, name) for backend in chosen for name in formats], batch_sizes)
    finally:
        torch.set_num_threads(before)
    if not result["measurements"]:
        reasons = "; ".join(f"{f['model']} with {f['backend']}: {f['reason']}" for f in result["failures"])
        raise InputError(f"nothing could be measured ({reasons})")
    return result


_Setting = tuple[str, str]
"""Names of a back end and a number format."""


@dataclass
class _Bench:
    """The measurements of one call of `throughput`, added to `result` as they are made."""

    models: Mapping[str, ClipModel]
    device: torch.device
    towers: tuple[str, ...]
    seconds: float
    rounds: int
    reference: str
    source: PairSource | None
    result: dict[str, Any]
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of a caption of median length, by model."""

    def measure(self, settings: Sequence[tuple[Backend, str]], batch_sizes: Sequence[int]) -> None:
        """All models in all back ends and number formats, every batch size."""
        loaded: dict[_Setting, dict[str, Loaded]] = {}
        try:
            for backend, dtype in settings:
                if dtype not in backend.dtypes:
                    for name in self.models:
                        reason = f"this back end runs in {', '.join(backend.dtypes)} only"
                        self._fail(name, backend.name, dtype, reason)
                    continue
                ready = loaded[backend.name, dtype] = {}
                for name, model in self.models.items():
                    try:
                        ready[name] = backend.load(model, self.device, dtype)
                    except Exception as error:  # a back end may fail in any way; the others are still measured
                        self._fail(name, backend.name, dtype, _sentence(error))
            visible = {backend.name: backend.visible for backend, _ in settings}
            for batch in batch_sizes:
                self._batch(batch, loaded, visible)
        finally:
            for ready in loaded.values():
                for one in ready.values():
                    one.close()

    def _batch(self, batch: int, loaded: dict[_Setting, dict[str, Loaded]], visible: Mapping[str, bool]) -> None:
        tasks: list[TimedTask] = []
        peaks: dict[str, int | None] = {}
        parts: dict[str, endtoend.Pipeline] = {}
        with torch.inference_mode():
            for (backend, dtype), ready in loaded.items():
                for name in list(ready):
                    end = f"|{backend}|{dtype}"
                    try:
                        for task, peak in self._tower_tasks(name, ready[name], batch, dtype, visible[backend]):
                            task.name += end
                            tasks.append(task)
                            peaks[task.name] = peak
                        if self.source is not None and "image" in self.towers:
                            spec, encode = self.models[name].image, ready[name].towers["image"]
                            kind = DTYPES.get(dtype, torch.float32)
                            pipeline = endtoend.Pipeline(self.source, spec, encode, batch, self.device, kind)
                            pipeline()
                            parts[f"{name}|end-to-end{end}"] = pipeline
                            call = self._synchronised(pipeline)
                            tasks.append(TimedTask(f"{name}|end-to-end{end}", call, pipeline.batch))
                    except InputError:
                        raise
                    except Exception as error:  # compilation and unsupported operations fail on the first call
                        self._fail(name, backend, dtype, _sentence(error))
                        mine = [task for task in tasks if task.name.startswith(f"{name}|") and task.name.endswith(end)]
                        tasks = [task for task in tasks if task not in mine]
                        ready.pop(name).close()
            if not tasks:
                return
            for pipeline in parts.values():
                pipeline.clear()
            session = measure(tasks, seconds=self.seconds, rounds=self.rounds)
        self.result["warnings"] += [f"batch {batch}: {text}" for text in session.warnings]
        rates: dict[tuple[str, str], dict[_Setting, list[float]]] = {}
        for setting, ready in loaded.items():
            for key, values in self._record(session, setting, batch, ready, peaks, parts).items():
                rates.setdefault(key, {})[setting] = values
        self._compare_settings(rates, batch, session.noise)

    def _compare_settings(
        self, rates: Mapping[tuple[str, str], Mapping[_Setting, list[float]]], batch: int, noise: float
    ) -> None:
        """Each back end and number format of a model against the first one it was measured in."""
        for (name, tower), by_setting in rates.items():
            (first, base), *others = by_setting.items()
            for (backend, dtype), values in others:
                row = {"model": name, "tower": tower, "backend": backend, "dtype": dtype, "batch": batch}
                row |= {"against": {"backend": first[0], "dtype": first[1]}}
                self._compare("setting_ratios", row, values, base, noise)

    def _compare(
        self, where: str, row: dict[str, Any], values: Sequence[float], base: Sequence[float], noise: float
    ) -> None:
        """Add a ratio to the result's list `where`, or to the withheld ones when the noise leaves it no meaning."""
        if noise > UNTRUSTED:
            reason = f"fixed arithmetic took up to {100 * noise:.0f} % longer in some rounds"
            self.result["withheld"].append({**row, "reason": reason})
            return
        value, low, high = ratio_interval(values, base)
        self.result[where].append({**row, "value": value, "low": low, "high": high})

    def _tower_tasks(
        self, name: str, loaded: Loaded, batch: int, dtype: str, visible: bool
    ) -> list[tuple[TimedTask, int | None]]:
        found = []
        model, kind = self.models[name], DTYPES.get(dtype, torch.float32)
        work = {tower: sample_inputs(model, tower, batch, self.device, kind) for tower in self.towers}
        if "text" in work and (caption := median_caption(model, batch, self.device, self.source)) is not None:
            work["caption"] = caption
            self.lengths[name] = caption.shape[1]
        for tower, inputs in work.items():
            call = functools.partial(loaded.towers["text" if tower == "caption" else tower], inputs)
            try:
                call()
            except Exception:
                if tower != "caption":
                    raise
                continue  # what runs it takes the whole context only
            measurable = visible or self.device.type == "cuda"
            peak = peak_activation_bytes(call, self.device) if measurable else None
            found.append((TimedTask(f"{name}|{tower}", self._synchronised(call), batch), peak))
        return found

    def _synchronised(self, call: Any) -> Any:
        if self.device.type == "cpu":
            return call

        def run() -> None:
            call()
            wait_for(self.device)

        return run

    def _record(
        self,
        session: Session,
        chosen: _Setting,
        batch: int,
        loaded: Mapping[str, Loaded],
        peaks: Mapping[str, int | None],
        parts: Mapping[str, endtoend.Pipeline],
    ) -> dict[tuple[str, str], list[float]]:
        """One setting's rows of every tower, then the pair, then the ratios to the reference; returns the rates."""
        setting = {"backend": chosen[0], "dtype": chosen[1], "batch": batch}
        if session.noise > UNTRUSTED:
            setting["noisy"] = True
        rates: dict[tuple[str, str], list[float]] = {}
        for key, timing in session.timings.items():
            name, tower, *own = key.split("|")
            if tuple(own) != chosen:
                continue
            rates[name, tower] = timing.rates()
            median, p95 = timing.latency()
            activations = peaks.get(key)
            row = self._row(name, tower, setting, rates[name, tower])
            row |= {
                "median_ms": 1000 * median,
                "p95_ms": 1000 * p95,
                "calls": timing.calls,
                "first_call_ms": 1000 * timing.warm_up.first,
                "warm_up_calls": timing.warm_up.calls,
                "steady": timing.warm_up.steady,
                "drifting": key in session.drifting,
                "reruns": session.reruns,
                "peak_bytes": None if activations is None else activations + loaded[name].weight_bytes,
                "activation_bytes": activations,
            }
            if tower == "caption":
                row["length"] = self.lengths[name]
            if key in parts:
                row["parts_ms"] = parts[key].parts()
            self.result["measurements"].append(row)
        for name in loaded:
            if (name, "image") in rates and (name, "text") in rates:
                rates[name, "pair"] = pair_rates(rates[name, "image"], rates[name, "text"])
                self.result["measurements"].append(self._row(name, "pair", setting, rates[name, "pair"]))
        for (name, tower), values in rates.items():
            other = rates.get((self.reference, tower))
            if name != self.reference and other is not None:
                row = {"model": name, "reference": self.reference, "tower": tower} | setting
                self._compare("ratios", row, values, other, session.noise)
        return rates

    def _row(self, name: str, tower: str, setting: dict[str, Any], rates: list[float]) -> dict[str, Any]:
        interval = dict(zip(("value", "low", "high"), median_interval(rates)))
        return {"model": name, "tower": tower, **setting, **interval, "rounds": len(rates)}

    def _fail(self, model: str, backend: str, dtype: str, reason: str) -> None:
        self.result["failures"].append({"model": model, "backend": backend, "dtype": dtype, "reason": reason})


def _sentence(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {first_line(error)}"
