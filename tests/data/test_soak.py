"""The soak of the data path in small, and that it would notice what it looks for."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipdistill.data.loader import Batch, PairLoader
from clipdistill.data.open import open_pairs
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    specification = importlib.util.spec_from_file_location("soak", REPOSITORY / "benchmarks" / "soak.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["soak"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def run(soak: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> dict[str, Any]:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(folder / "cache"))
    settings = {
        "passes": 3,
        "workers": 0,
        "batch": 8,
        "size": 16,
        "exact": False,
        "say": False,
        "samples": 56,
        **changes,
    }
    source = open_pairs(f"scenes:train?size={settings.pop('samples')}&pixels=64")
    where, faults = getattr(soak, f"write_{kind}")(source, folder / kind, random.Random(1))
    assert faults.spoiled
    assert faults.absent
    return dict(soak.soak(where, faults, **settings))


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_nothing_is_lost_repeated_or_changed(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    result = run(soak, tmp_path, monkeypatch, kind)
    assert [c for c in soak.verdict(result, 0.02) if "grew" not in c] == []
    assert result["samples"] < 56
    assert len(result["passes"]) == 3
    assert sum(result["opening"].values()) > 0


def test_a_sample_that_is_lost_or_changed_is_noticed(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = PairLoader._assemble

    def careless(self: PairLoader, step: int, chunks: list[dict[str, Any]]) -> Batch:
        made = assemble(self, step, chunks)
        if step == 8:
            made.indices[0] = made.indices[1]
        if step == 9:
            made.student_images[0] += 1
        if step == 10:
            made.problems.append(("000000.jpg", "invented"))
        return made

    monkeypatch.setattr(PairLoader, "_assemble", careless)
    said = " ".join(soak.verdict(run(soak, tmp_path, monkeypatch, "files"), 0.02))
    for word in ("1 samples lost", "1 samples repeated", "samples changed", "samples misreported"):
        assert word in said


def test_growth_is_noticed(soak: ModuleType) -> None:
    row = dict.fromkeys(("lost", "repeated", "changed", "unwanted", "misreported"), 0)
    rows = [{**row, "memory": memory, "files": 50, "threads": 4} for memory in (90, 100, 101, 103)]
    result = {"passes": rows, "left_out": [], "too_many": False}
    assert soak.verdict(result, 0.02) == ["memory grew by 3.0% from pass 2 to pass 4"]
    assert soak.verdict(result, 0.04) == []
    assert result["files_growth"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "tars"])
def test_ten_passes_with_workers(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    result = run(soak, tmp_path, monkeypatch, kind, passes=10, workers=2, samples=700, batch=50, size=64)
    assert soak.verdict(result, 0.02) == []
