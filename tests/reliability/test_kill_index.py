"""A search index whose update is killed at random moments is whole each time, goes on, and keeps nothing of the kills.

CLIPDISTILL_KILLS sets how many (12 here).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from clipdistill.search.store import SearchIndex, open_index
from clipdistill.search.update import update
from tests.search.conftest import StandIn, draw

COUNT = int(os.environ.get("CLIPDISTILL_KILLS", "12"))


def opened(folder: Path) -> SearchIndex:
    return open_index(folder / "index", dict(StandIn.description))


def work(folder: Path) -> None:
    update(opened(folder), folder / "photographs", StandIn(), batch_size=2, workers=1, save_seconds=0)


def vectors(index: SearchIndex) -> dict[str, list[float]]:
    return {path: index.vector(entry.row).tolist() for path, entry in sorted(index.entries.items())}


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_an_update_killed_at_random_moments_loses_and_leaves_nothing(tmp_path: Path) -> None:
    draw(tmp_path / "photographs", 40)
    (tmp_path / "photographs" / "broken.png").write_bytes(b"nothing")
    began = time.monotonic()
    work(tmp_path)
    lasted = time.monotonic() - began
    wanted, files = vectors(opened(tmp_path)), sorted(path.name for path in tmp_path.glob("index/*/*"))
    shutil.rmtree(tmp_path / "index")
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    killed = done = 0
    while killed < COUNT:
        child = fork.Process(target=work, args=(tmp_path,))
        child.start()
        child.join(rng.random() * lasted * 1.2)
        child.kill()
        child.join()
        killed += child.exitcode != 0
        index = opened(tmp_path)
        assert index.notices == []
        found = vectors(index)
        assert len(found) >= done, "what was saved is lost"
        assert all(wanted[path] == vector for path, vector in found.items())
        done = len(found)
        if child.exitcode == 0:
            shutil.rmtree(tmp_path / "index")
            done = 0
    work(tmp_path)
    assert vectors(opened(tmp_path)) == wanted
    assert len(opened(tmp_path).bad) == 1
    parts = {f"{part.name}.safetensors" for part in opened(tmp_path)._parts}
    others = {name for name in files if not name.startswith("part-")}
    assert {path.name for path in tmp_path.glob("index/*/*")} == parts | others
