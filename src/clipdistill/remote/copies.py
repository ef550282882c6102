"""Copies of shards on a local disk (--local-cache), the least recently used ones leaving first.

A copy is a file named after the object's URL and version, there whole or not at all, with the time of its last use. The
rule for room: a set may push out copies that were last used before the set was opened, never its own, so a set that is
larger than the room keeps what fits and reads the rest by ranges. Locks (flock) are released when a process dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from clipdistill.errors import InputError, storage_error
from clipdistill.runtime.files import FUTURE, WRITING, make_folder, new_file, remove_leftovers, sync

FOLDER, SIZE = "CLIPDISTILL_LOCAL_CACHE", "CLIPDISTILL_LOCAL_CACHE_SIZE"
_ENDING = ".copy"
_OPEN_FILES = 64  # per process
_USED = 60.0
"""Seconds after which a copy in use is marked as used again."""
_ASKED_AGAIN = 30.0
"""Seconds for which a shard for which there was no room is not asked for again."""
_PATIENCE = 600.0
"""Seconds to wait for another process that makes the copy; then the object is read by ranges."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def local_cache(folder: str | Path | None, size: str | int | None = None) -> None:
    """Keep copies of remote shards in `folder`, of at most `size` bytes ("200GB") together (None: nine tenths of what
    is free), for this process and those that it starts. Raises InputError for a size that is none."""
    if size is not None:
        _bytes(str(size))
        os.environ[SIZE] = str(size)
    if folder is not None:
        os.environ[FOLDER] = str(make_folder(Path(folder).expanduser(), "copies of shards").absolute())
    elif size is not None and FOLDER not in os.environ:
        raise InputError(f"--local-cache-size {size}: say where the copies go with --local-cache DIR")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if not 0 < value < 2**63:
        raise InputError(f"--local-cache-size {text}: write a size such as 200GB, 1.5TB or 500MB")
    return value


class Copies:
    """The copies in one folder, as this process sees them. limit: bytes, None for nine tenths of what is free."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit, self.process = folder, limit, os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._no_room: dict[str, float] = {}
        make_folder(folder, "copies of shards")

    def read(self, name: str, start: int, size: int) -> bytes | None:
        """Bytes of a copy; None where there is none, or a damaged one."""
        with self._lock:  # no other thread closes the file as the oldest
            descriptor = self._open(name)
            if descriptor is None:
                return None
            data = os.pread(descriptor, size, start)
            if len(data) < size:
                os.close(self._files.pop(name)[0])
            return data if len(data) == size else None

    def _open(self, name: str) -> int | None:
        now = time.time()
        found = self._files.get(name)
        if found is None:
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                return None
            found = (descriptor, 0.0)
        if abs(now - found[1]) > _USED:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name, (now, now))
            found = (found[0], now)
        self._files[name] = found
        self._files.move_to_end(name)
        if len(self._files) > _OPEN_FILES:
            _, (oldest, _) = self._files.popitem(last=False)
            os.close(oldest)
        return found[0]

    def is_open(self, name: str) -> bool:
        """Whether this process reads the copy already."""
        return name in self._files

    def fetch(self, name: str, size: int, since: float, write: Callable[[Path], None]) -> Path | None:
        """The copy, made by `write` where it is missing; None where there is no room for `size` bytes.

        write: fills the file, whose length is taken already and must not be given back on the way.
        since: the time from which on copies that were used are not pushed out. Other processes wait for the one that
        makes it. Raises StorageError on a full disk.
        """
        path = self.folder / name
        if self._whole(path, size):
            return path
        if not self.wants(name, size):
            return None
        try:
            with _locked(self.folder / f".{name}.lock", _PATIENCE) as mine:
                if self._whole(path, size):
                    return path
                if not mine:
                    return None
                remove_leftovers(self.folder, name)
                with contextlib.ExitStack() as made:
                    with _locked(self.folder / ".lock"):  # the room is taken before anybody else looks for some
                        if not self._make_room(path, size, since):
                            self._no_room[name] = time.monotonic()
                            return None
                        temporary = made.enter_context(new_file(path))
                        if size > 0:
                            os.truncate(temporary, size)
                    write(temporary)
                    sync(temporary)
                    with _locked(self.folder / ".lock"):  # nobody who adds up misses both of its names
                        made.close()
                return path
        except OSError as error:
            full = storage_error(error, "make room, or give a smaller --local-cache-size")
            if full is None:
                raise
            raise full from error

    def wants(self, name: str, size: int) -> bool:
        """Whether the copy is here, or there was room for it when it was last asked for."""
        asked = time.monotonic() - self._no_room.get(name, -_ASKED_AGAIN) >= _ASKED_AGAIN
        return asked or self._whole(self.folder / name, size)

    @staticmethod
    def _whole(path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size or size < 0
        except FileNotFoundError:
            return False

    def _make_room(self, path: Path, size: int, since: float) -> bool:
        """Under the folder's lock: remove the least recently used copies until `size` bytes fit; False, and nothing
        removed, if they cannot. A time in the future, of a clock that was set back, holds no copy."""
        used, others, latest = 0, [], time.time() + FUTURE
        for entry in os.scandir(self.folder):
            if entry.name.endswith(_ENDING):
                with contextlib.suppress(FileNotFoundError):
                    if WRITING in entry.name and self._abandoned(entry.name):
                        continue
                    status = entry.stat()
                    used += status.st_size
                    idle = not since <= status.st_mtime <= latest
                    if WRITING not in entry.name and idle and entry.name != path.name:
                        others.append((status.st_mtime, status.st_size, entry.name))
        limit = self.limit
        if limit is None:
            limit = used + shutil.disk_usage(self.folder).free * 9 // 10
        if used + max(size, 0) - sum(entry[1] for entry in others) > limit:
            return False
        for _, length, name in sorted(others):
            if used + max(size, 0) <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
                (self.folder / f".{name}.lock").unlink(missing_ok=True)
            used -= length
        return True

    def _abandoned(self, name: str) -> bool:
        """Whether nobody writes this copy any more; it is removed then."""
        with _locked(self.folder / f"{name.partition(WRITING)[0]}.lock", 0) as free:
            if free:
                (self.folder / name).unlink(missing_ok=True)
            return free


def copy_name(url: str, identity: str) -> str:
    """The file name of a copy of one version of an object."""
    return hashlib.sha256(f"{url}\0{identity}".encode("utf-8", "surrogatepass")).hexdigest()[:40] + _ENDING


@contextlib.contextmanager
def _locked(path: Path, patience: float | None = None) -> Iterator[bool]:
    """Within, no other process or thread holds the lock file `path`; False where it stays held for `patience` s."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    mine, pause, end = False, 0.01, time.monotonic() + (patience or 0)
    try:
        while not mine:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if patience is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(pause)
                pause = min(0.5, 1.5 * pause)
        yield mine
    finally:
        os.close(descriptor)


_known: dict[tuple[str, str | None, int], Copies] = {}
_spool: tuple[int, str] | None = None


def copies() -> Copies | None:
    """Where --local-cache says copies are kept; None without it."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    size = os.environ.get(SIZE)
    key = (folder, size, os.getpid())
    if key not in _known:
        _known[key] = Copies(Path(folder), None if size is None else _bytes(size))
    return _known[key]


def spool() -> Copies:
    """A folder for what can only be had whole, that goes when the program ends; shared with the processes it starts."""
    global _spool
    if _spool is None:
        import atexit

        folder = tempfile.mkdtemp(prefix="clipdistill-whole-")
        _spool = (os.getpid(), folder)
        atexit.register(_remove_spool)
    key = (_spool[1], None, os.getpid())
    if key not in _known:
        _known[key] = Copies(Path(_spool[1]), None)
    return _known[key]


def _remove_spool() -> None:
    if _spool is not None and _spool[0] == os.getpid():
        shutil.rmtree(_spool[1], ignore_errors=True)
