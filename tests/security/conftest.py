"""A fence around every test of hostile files: nothing outside may change, and no payload may have run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import refuse_connections


@dataclass(frozen=True)
class Fence:
    """inside: where hostile files lie and everything may be written; outside: must stay as it is; marker: the file
    that every payload would make (or a folder it would fill)."""

    inside: Path
    outside: Path
    marker: Path

    @property
    def payload(self) -> object:
        """An object whose unpickling runs a program that makes the marker."""
        return Payload(f"touch '{self.marker}'")


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def state_of(folder: Path) -> dict[str, bytes | str]:
    """Names, contents and link targets of everything below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


@pytest.fixture
def fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fence]:
    """The test runs inside `inside`, with home and cache folders there too; `outside` is compared at the end."""
    made = Fence(tmp_path / "inside", tmp_path / "outside", tmp_path / "marker")
    made.inside.mkdir()
    made.outside.mkdir()
    (made.outside / "secret.txt").write_text("a secret caption\n")
    (made.outside / "notes.jsonl").write_text('{"mine": 1}\n')
    (made.outside / "folder").mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "CLIPDISTILL_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(made.inside / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(made.inside)
    before = state_of(made.outside)
    yield made
    assert not made.marker.exists(), "a payload ran"
    assert state_of(made.outside) == before
    assert {path.name for path in tmp_path.iterdir()} == {"inside", "outside"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to another machine fails the test."""
    refuse_connections(monkeypatch, "127.0.0.1", "::1", "localhost")
