"""Helpers shared by all tests."""

from __future__ import annotations

import os
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
