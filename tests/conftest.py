"""Helpers shared by all tests."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_folder(name: str = "") -> Path:
    """The folder of development data or fixtures beside the repository; the test skips when it is absent.

    Found as ../shared beside the repository, or where the variable CLIPDISTILL_SHARED says.
    """
    path = Path(os.environ.get("CLIPDISTILL_SHARED", REPOSITORY.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"needs the shared development folder {name!r}, which is not on this machine")
    return path


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
