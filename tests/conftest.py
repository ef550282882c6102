"""Helpers shared by all tests."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.reliability.support import Launcher

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_folder(name: str = "") -> Path:
    """The folder of development data or fixtures beside the repository; the test skips when it is absent.

    Found as ../shared beside the repository, or where the variable CLIPDISTILL_SHARED says.
    """
    path = Path(os.environ.get("CLIPDISTILL_SHARED", REPOSITORY.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"needs the shared development folder {name!r}, which is not on this machine")
    return path


def refuse_connections(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let any attempt to connect fail the test, but for `hosts` and for UNIX sockets, by which workers hand over
    their tensors."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and str(address[0]) not in hosts:
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One warm process that forks commands: each has a process of its own and finds everything loaded."""
    from tests.reliability.support import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("said"))
    launcher.warm("eval", "scenes-teacher", "--data", "scenes:val?size=8")
    yield launcher
    launcher.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `sampled(n)` all but each n-th case are slow; a case that is asked for alone runs."""
    seen: Counter[str] = Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Say how a worker of pytest-xdist ended: its exit code (negative: a signal), which is lost otherwise."""
    process = getattr(getattr(getattr(node, "gateway", None), "_io", None), "popen", None)
    if error and process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code, most = process.wait(5), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(
                f"\nworker ended with {code}; the largest process of the tests so far had {most >> 10} MiB", flush=True
            )
