"""Commands in folders outside the package, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reliability.support import Launcher


@pytest.fixture(scope="package")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("said"))
    yield launcher
    launcher.close()
