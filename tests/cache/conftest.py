"""One thread while the cache is tested: what is compared to the bit must not depend on how sums were split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cache.support import saved_teacher


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny teacher on disk."""
    return saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="package")
def second_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one, with another resolution and width."""
    return saved_teacher(tmp_path_factory.mktemp("second") / "second", seed=7, dim=16, image_size=48)
