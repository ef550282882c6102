"""Lock files: one process at a time in a run's folder, on a block of a cache, on a run of an ablation.

A lock file is made with O_EXCL and says who made it. It is stale when its process is gone (same machine), or when its
time, which a living holder renews, is older than the lease or in the future (a clock that was set back), reckoned by
the disk's own clock. Of several that find a lock stale, one gets it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from clipdistill.errors import InputError
from clipdistill.runtime.files import FUTURE, disk_time

LEASE = 900.0
"""Seconds without a sign of life after which a lock of another machine is taken over."""


class Claims:
    """The locks of this process in one folder, by name. For work that may be done twice without harm, or never is."""

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self.folder = folder
        self.lease = lease
        self.held: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def take(self, name: str) -> bool:
        """Claim `name`; False when a living process holds it."""
        if not _take(self._path(name), self.lease):
            return False
        self.held.add(name)
        return True

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


class FolderLock(AbstractContextManager["FolderLock"]):
    """The lock file `path`, held and renewed until it is left.

    Raises InputError on entering when a living process holds it: `what`, then who, where and since when.
    """

    def __init__(self, path: Path, what: str, lease: float = LEASE) -> None:
        self.path, self.what, self.lease = path, what, lease
        self._ended = threading.Event()

    def __enter__(self) -> FolderLock:
        if not _take(self.path, self.lease):
            raise InputError(f"{self.what} ({holder(self.path)}): wait for its end, or give another place")
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def _renew(self) -> None:
        while not self._ended.wait(self.lease / 10):
            with suppress(OSError):
                os.utime(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with suppress(OSError):
            if _owner(self.path).get("pid") == os.getpid():
                self.path.unlink()


def holder(path: Path) -> str:
    """Who holds a lock: 'process 71 on node-3 since 2026-11-29 11:02:30'."""
    owner = _owner(path)
    since, when = owner.get("since"), ""
    with suppress(OverflowError, ValueError, OSError, TypeError):  # a time that no calendar has, or none
        when = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(since)) if since is not None else ""
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')}{when}"


def _take(path: Path, lease: float) -> bool:
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            found = _identity(path)
            if not _stale(path, lease):
                return False
            # renamed before it is removed: of several that find it stale, one gets the file
            aside = path.with_name(f"{path.name}.stale-{os.getpid()}-{time.monotonic_ns()}")
            with suppress(FileNotFoundError):
                path.rename(aside)
                if _identity(aside) != found:  # another took it over in between: this is its new file
                    with suppress(OSError):
                        os.link(aside, path)
                aside.unlink()
            continue
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
                json.dump({**owner, "space": _space(), "since": time.time()}, file)
        except OSError as error:  # a full disk: an empty lock would hold others up
            path.unlink(missing_ok=True)
            error.filename = str(path)
            raise
        return True
    return False


def _identity(path: Path) -> tuple[int, int]:
    """Which file a name stands for, as it was written last."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return 0, 0


def _owner(path: Path) -> dict[str, Any]:
    """What a lock file says, {} when it says nothing that can be read."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _stale(path: Path, lease: float) -> bool:
    try:
        age = disk_time(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return True  # given back in the meantime
    owner = _owner(path)
    process = owner.get("pid")
    if not isinstance(process, int) or isinstance(process, bool) or process < 1 or "host" not in owner:
        return not -FUTURE <= age <= 5  # its owner died between making and writing it, or is about to write
    if owner["host"] == socket.gethostname() and owner.get("space", _space()) == _space():
        return not _alive(process) or _started(process) != owner.get("started")
    return not -FUTURE <= age <= lease


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return _status(process)[:1] != ["Z"]  # ended, and its parent has not looked yet


def _started(process: int) -> str:
    """When a process began, as the system counts it ('' where that cannot be told): tells a reused number apart."""
    fields = _status(process)
    return fields[19] if len(fields) > 19 else ""


def _status(process: int) -> list[str]:
    """The fields of /proc/N/stat after the name in parentheses, which may hold anything; [] where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []


def _space() -> str:
    """The process numbers that are seen from here: containers of one name may each have their own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    return ""
