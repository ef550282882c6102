"""What the commands write beside runs, models and exports, damaged: one sentence, or what is right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from clipdistill.ablate.run import failures
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.models.exported import read_manifest
from clipdistill.models.save import read_description
from clipdistill.models.tokenizers import tokenizer_from_dict
from clipdistill.regions.box_file import open_folder
from clipdistill.report.report import write_report
from clipdistill.runs.folder import RunFolder, run_folders
from clipdistill.runtime.files import json_text, with_checksum
from clipdistill.runtime.locks import Claims, holder
from clipdistill.statistics.records import read_records
from clipdistill.train.capture import captured_steps
from clipdistill.train.opening import check_identity
from clipdistill.train.replay import _records
from tests.fuzz.mutate import mangle_json
from tests.fuzz.run_targets import KEPT, WORDS, copied_run, kept_run
from tests.fuzz.targets import Target, require

_REPORTED = ("claims.json", "bench.json", "geometry.json", "gallery.json")
PARTS = {"training data": "aa", "teacher": "bb"}
_RATIO = {"model": "student", "reference": "teacher", "tower": "pair", "backend": "torch", "dtype": "float32"}
_SPEED = {"batch": 32, "value": 20.5, "low": 19.0, "high": 22.0}
SAMPLES: dict[str, dict[str, Any]] = {
    "claims.json": {"format": 1, "source": "published", "claims": [
        {"claim": "clip-rd > clip-kd on flickr8k t2i_R@1", "verdict": "undecided", "evidence": "?"},
        {"text": "in words", "verdict": "supported", "evidence": "+0.2 points"}]},
    "bench.json": {
        "device": {"name": "CPU", "fingerprint": "ab"},
        "models": {"student": {"parameters": {"total": 10}, "flops": {"image": 3}}, "teacher": {}},
        "measurements": [{**_RATIO, **_SPEED}, {**_RATIO, **_SPEED, "model": "teacher", "noisy": True}],
        "ratios": [{**_RATIO, **_SPEED}], "failures": [], "warnings": ["batch 32: noise"], "libraries": {"torch": "2"}},
    "geometry.json": {"data": "val", "alignment": {"cka": 0.5}, "student": {
        "gap": 0.2, "positive": {"mean": 0.5, "histogram": {"edges": [0, 0.5, 1], "counts": [1, 3]}}}},
    "gallery.json": {"selection": "six queries", "thumbnails": {"a": "data:image/jpeg;base64,AA=="}, "queries": [
        {"kind": "t2i", "text": "a red bird", "truth": "a", "why": "both", "ranks": {"student": 1},
         "models": {"student": [{"key": "a", "text": "t", "score": 0.5, "hit": True}]}}]},
    "stages.json": {"format": 1, "recipe": "clip", "status": "running", "stages": [
        {"folder": "run", "status": "finished", "student": "s"}]},
    "ablation.json": {"variants": [{"name": "clip", "runs": ["run", "../run"]}]},
    "identity.json": {"format": 1, "parts": PARTS, "changes": [
        {"part": "teacher", "step": 2, "time": "2026", "before": "cc", "after": "bb"}]},
    "proposals.json": {"format": 1, "detector": "grid", "detector_sha256": "aa", "data": "scenes", "images": 3,
                       "data_sha256": open_pairs("scenes?size=3").fingerprint()},
    "failure.json": {"run": "a", "error": "InputError", "message": "m", "traceback": [], "time": "2026"},
    "step.json": {"step": 3, "rank": 0, "ranks": 1, "keys": ["a"], "captions": ["b"], "terms": {"clip": 1.0}},
    "lock.json": {"host": "here", "pid": 71, "started": "1", "space": "pid:[1]", "since": 1.8e9},
}  # fmt: skip
"""One of each file, as the commands write it."""


@cache
def _model() -> dict[str, Any]:
    return dict(json.loads((KEPT / "run" / "student" / "model.json").read_text()))


def _report(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        place = copied_run(name, data, folder)
        write_report([place.path], folder / "report.html")
        if name == "bench.json":
            for record in read_records([place.path]):
                require(math.isfinite(record.value), "a speed that is not finite")

    return run


def _folders(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_text("{}")
        (folder / name).write_bytes(data)
        for path in run_folders(folder):
            require(path.parent in (folder, folder.parent), "a run elsewhere")

    return run


def _identity(data: bytes, folder: Path) -> None:
    run = RunFolder(folder)
    run.write_facts({"status": "stopped"})
    (folder / "identity.json").write_bytes(data)
    try:
        said = check_identity(run, PARTS, 4, False)
    except InputError:
        require((folder / "identity.json").read_bytes() == data, "a fingerprint was overwritten")
        raise
    require(bool(said) == bool([*folder.glob("identity.json.damaged-*")]), "set aside in silence")
    require(check_identity(run, PARTS, 4, False) == [], "it does not end")


def _model_json(data: bytes, folder: Path) -> None:
    path = folder / "model.json"
    path.write_bytes(data)
    tokenizer_from_dict(read_description(path)["tokenizer"])("a red square")


def _manifest(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    _, spec, tokenizer, scale = read_manifest(folder, "onnx:x")
    require(0 < scale < math.inf and spec.size > 0, "a scale that is none")
    tokenizer("a red square")


def _proposals(data: bytes, folder: Path) -> None:
    (folder / "proposals.json").write_bytes(data)
    wanted = {"format": 1, "detector": "grid", "detector_sha256": "aa"}
    open_folder(folder, open_pairs("scenes?size=3"), wanted)


def _failure(data: bytes, folder: Path) -> None:
    (folder / ".failures").mkdir()
    (folder / ".failures" / "a.json").write_bytes(data)
    require(list(failures(folder)) == ["a"], "a failure is not told")


def _step(data: bytes, folder: Path) -> None:
    kept = folder / "skipped_steps"
    kept.mkdir()
    (kept / "step-00000003-rank-0.json").write_bytes(data)
    (kept / f"step-{data[:4].hex()}-rank-0.json").write_bytes(data)
    for step in captured_steps(folder):
        _records(folder, step)


def _lock(data: bytes, folder: Path) -> None:
    path = folder / "a.lock"
    path.write_bytes(data)
    require(holder(path).startswith("process"), "nobody holds it")
    Claims(folder).take("a")


def own_targets() -> list[Target]:
    """All of them."""
    kept_run()
    makers: dict[str, Callable[[bytes, Path], None]] = {
        **{name: _report(name) for name in _REPORTED},
        **{name: _folders(name) for name in ("stages.json", "ablation.json")},
        "identity.json": _identity, "proposals.json": _proposals, "failure.json": _failure, "step.json": _step,
        "lock.json": _lock, "model.json": _model_json, "manifest.json": _manifest,
    }  # fmt: skip
    model = _model()
    samples = {**SAMPLES, "model.json": model, "manifest.json": {**model, "logit_scale": 14.3, "towers": {"image": {}}}}
    return [
        Target(f"own-{name.replace('.', '-')}", [json_text(values).encode(), json_text(with_checksum(values)).encode()],
               run, WORDS, structured=(mangle_json,), weight=2 if name in _REPORTED else 3)
        for name, run in makers.items()
        for values in (samples[name],)
    ]  # fmt: skip
