"""Claims on blocks, so that several processes fill one store without doing the same work.

A claim is a file made with O_EXCL. It is stale when its process is gone (same machine) or it has not been touched for
`LEASE` seconds. A claim only saves work: blocks are written atomically and always with the same content, so two
processes that fill the same block do no harm.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

LEASE = 900.0
"""Seconds without a sign of life after which a claim of another machine is taken over."""


class Claims:
    """The claims of this process in the folder `locks/` of a store."""

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self.folder = folder
        self.lease = lease
        self.held: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def take(self, name: str) -> bool:
        """Claim `name`; False when a living process holds it."""
        path = self._path(name)
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if not self._stale(path):
                    return False
                # renamed before it is removed: of several that find it stale, one gets the file
                aside = path.with_suffix(f".stale-{os.getpid()}-{time.monotonic_ns()}")
                with suppress(FileNotFoundError):
                    path.rename(aside)
                    aside.unlink()
                continue
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
                json.dump(owner, file)
            self.held.add(name)
            return True
        return False

    def _stale(self, path: Path) -> bool:
        try:
            age = time.time() - path.stat().st_mtime
            text = path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return True  # given back in the meantime
        try:
            owner = json.loads(text)
            host, process, started = str(owner["host"]), int(owner["pid"]), owner["started"]
        except (ValueError, KeyError, TypeError):
            return age > 5  # its owner died between making and writing it, or is about to write
        here = host == socket.gethostname()
        if here and (not _alive(process) or _started(process) != started):
            return True
        return age > self.lease

    def renew(self) -> None:
        """Show that this process is alive."""
        for name in self.held:
            with suppress(FileNotFoundError):
                os.utime(self._path(name))

    def give_back(self, name: str) -> None:
        """End a claim."""
        self.held.discard(name)
        self._path(name).unlink(missing_ok=True)

    def give_back_all(self) -> None:
        for name in list(self.held):
            self.give_back(name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(process: int) -> str:
    """When a process began, as the system counts it ('' where that cannot be told): tells a reused number apart."""
    try:
        # after the name in parentheses, which may hold anything; the start time is the 22nd field of the whole line
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return ""
