"""Tiny models, and a run of theirs that nothing happened to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cache.support import saved_teacher
from tests.reliability.support import Launcher, training


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `teacher` and a `student` of another width."""
    folder = tmp_path_factory.mktemp("models")
    saved_teacher(folder / "teacher", seed=1)
    saved_teacher(folder / "student", seed=2, dim=16)
    return folder


@pytest.fixture(scope="session")
def undisturbed(launcher: Launcher, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher.start(*training(models, out)).finish()
    return out
