"""The files of our own runs, damaged: what reads them says one sentence, or goes on with what is right."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdistill.regions.store import RegionStore
from clipdistill.report.report import write_report
from clipdistill.runs.folder import RunFolder, read_lines
from clipdistill.search.store import open_index
from clipdistill.statistics.scores import Scores
from clipdistill.train.checkpoint import read_checkpoint, save_checkpoint
from tests.fuzz.mutate import mangle_json
from tests.fuzz.targets import Target, require

KEPT = Path(__file__).parent.parent / "kept"
_MODEL = KEPT / "search" / "index" / "0123456789abcdef"
_REGIONS = KEPT / "regions" / "regions-e00312df5cd7da54"
_LINES = ("log.jsonl", "eval.jsonl", "bad_samples.jsonl")
WORDS = (b"null", b"[]", b"-1", b"1e999", b"NaN", b"true", b"\\ud800", b"\0\0\0\0", b"[/b]", b"!!python/object")


@cache
def kept_run() -> Path:
    """The kept run with its scores saved anew: by this version, with checksums."""
    folder = Path(tempfile.mkdtemp(prefix="clipdistill-fuzz-run-")) / "run"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(KEPT / "run", folder)
    Scores.load(folder / "scores.json").save(folder / "scores.json")
    (folder / "bad_samples.jsonl").write_text('{"key": "a", "shard": null, "reason": "corrupt image"}\n')
    return folder


def copied_run(name: str, data: bytes, folder: Path) -> RunFolder:
    shutil.copytree(kept_run(), folder / "run", ignore=shutil.ignore_patterns("student"))
    (folder / "run" / name).write_bytes(data)
    return RunFolder(folder / "run")


def _run_file(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        place = copied_run(name, data, folder)
        write_report([place.path], folder / "report.html")
        lines = read_lines(place / name) if name.endswith("l") else None
        place.mend()
        if lines is not None:
            require(read_lines(place / name).values == lines.values, "mending changed a line")
            require(not place.mend(), "mending does not end")

    return run


def _run_scores(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        found, whole = Scores.of_run(copied_run(name, data, folder).path), Scores.of_run(kept_run())
        assert found is not None
        assert whole is not None
        require(found.to_json() == whole.to_json(), f"a changed {name} is believed")

    return run


@cache
def _checkpoint() -> Path:
    optimiser = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    state = {"step": 3, "samples": 48, "window": {}, "ledger": {"seen": 1, "bad": 0, "by_reason": {}}}
    return save_checkpoint(kept_run().parent / "checkpoints", None, {}, optimiser, state, 1)


def _run_state(data: bytes, folder: Path) -> None:
    kept = folder / _checkpoint().name
    shutil.copytree(_checkpoint(), kept)
    (kept / "state.json").write_bytes(data)
    require(read_checkpoint(kept).state == read_checkpoint(_checkpoint()).state, "a changed state is believed")


def _run_index(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        shutil.copytree(KEPT / "search" / "index", folder / "index")
        (folder / "index" / _MODEL.name / name).write_bytes(data)
        index = open_index(folder / "index", _described())
        for path, entry in index.entries.items():
            require(bool(np.isfinite(index.vector(entry.row)).all()), f"{path}: a vector that is not finite")

    return run


@cache
def _described() -> dict[str, Any]:
    return dict(json.loads((_MODEL / "index.json").read_text())["model"])


def _run_regions(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        shutil.copytree(_REGIONS, folder / _REGIONS.name)
        (folder / _REGIONS.name / name).write_bytes(data)
        batch = RegionStore(folder / _REGIONS.name).read(range(5))
        require(bool(batch.embeddings.isfinite().all()), "a region that is not finite")

    return run


def run_targets() -> list[Target]:
    """All of them."""
    makers: list[tuple[str, Path, Callable[[bytes, Path], None]]] = [
        *((f"run-{name}", kept_run() / name, _run_file(name)) for name in ("run.json", "recipe.yaml", *_LINES)),
        *((f"run-{name}", kept_run() / name, _run_scores(name)) for name in ("scores.json", "scores.npz")),
        ("run-state.json", _checkpoint() / "state.json", _run_state),
        *((f"search-{name}", _MODEL / name, _run_index(name)) for name in ("index.json", "part-00000001.json")),
        *((f"regions-{name}", _REGIONS / name, _run_regions(name)) 
          for name in ("regions.json", "block-00000.safetensors")),
    ]  # fmt: skip
    return [
        Target(name.replace(".", "-"), [path.read_bytes()], run, WORDS,
               structured=(mangle_json,) if path.suffix == ".json" else (),
               weight=2 if name in ("run-run.json", "run-recipe.yaml") or name.endswith("jsonl") else 3)
        for name, path, run in makers
    ]  # fmt: skip
