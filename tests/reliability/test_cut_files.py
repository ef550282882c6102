"""A file of ours that is cut by hand while a process has it mapped: one sentence, not the end of the process.

Without the checks these tests end their own process with SIGBUS.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipdistill.cache.store import CacheStore
from clipdistill.errors import InputError
from clipdistill.models import build_student
from clipdistill.regions.store import RegionStore
from clipdistill.search.find import ExactFinder
from clipdistill.search.store import open_index
from clipdistill.train.checkpoint import read_checkpoint, restore, save_checkpoint
from tests.reliability.test_own_files import KEPT


def _cache(folder: Path) -> Callable[[], Any]:
    shutil.copytree(KEPT / "cache", folder)
    store = CacheStore(folder)
    return lambda: [store.read(0, [0, 1], [0, 0], [0, 0]), store.samples.key(0), store.samples.rows.sum()]


def _regions(folder: Path) -> Callable[[], Any]:
    shutil.copytree(next((KEPT / "regions").glob("regions-*")), folder)
    store = RegionStore(folder)
    return lambda: [store.read(range(len(store))), store.counts()]


def _search(folder: Path) -> Callable[[], Any]:
    index = open_index(folder, {"name": "m", "fingerprint": "ab" * 32, "embed_dim": 8})
    index.add([(f"{i}.png", 1, 1, f"{i}") for i in range(2000)], np.ones((2000, 8), dtype=np.float32))
    index.save()
    finder = ExactFinder(index)
    return lambda: [finder.search(np.ones(8, dtype=np.float32), 3), index.vector(1999), index.living()]


KINDS = {
    "cache": (_cache, ("teacher-0/**/*.safetensors", "samples-*.arrow")),
    "regions": (_regions, ("*.safetensors",)),
    "search index": (_search, ("*/*.safetensors",)),
}


@pytest.mark.parametrize("left", [0, 100, -1])
@pytest.mark.parametrize(("kind", "pattern"), [(kind, pattern) for kind in KINDS for pattern in KINDS[kind][1]])
def test_a_mapped_file_that_is_cut_is_one_sentence(kind: str, pattern: str, left: int, tmp_path: Path) -> None:
    use = KINDS[kind][0](tmp_path / "store")
    use()
    paths = sorted((tmp_path / "store").glob(pattern))
    assert paths
    for path in paths:
        os.truncate(path, left % path.stat().st_size)
    with pytest.raises(InputError, match="was cut while it was read"):
        use()


def test_a_resumed_run_keeps_nothing_of_the_checkpoint_mapped(tmp_path: Path) -> None:
    model = build_student("scenes-student", seed=0, captions=["a red circle"])
    optimiser = torch.optim.AdamW(model.module.parameters(), fused=True)
    for parameter in model.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    checkpoint = read_checkpoint(save_checkpoint(tmp_path, model, {}, optimiser, {"step": 3}, 1))
    restore(checkpoint, model.module, {}, optimiser)
    for path in checkpoint.folder.rglob("*.safetensors"):
        os.truncate(path, 0)
    assert all(bool(state["exp_avg"].isfinite().all()) for state in optimiser.state.values())
    optimiser.step()
