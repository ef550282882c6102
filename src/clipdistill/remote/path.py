"""An object or folder behind a URL with the methods of a pathlib.Path that readers of data use."""

from __future__ import annotations

import functools
import io
import multiprocessing
import posixpath
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from clipdistill.errors import InputError, without_secrets
from clipdistill.remote.ahead import Ahead, Request, Threads, in_parallel, joined, the_ahead
from clipdistill.remote.copies import Copies, copies, copy_name, spool
from clipdistill.remote.retry import NoRanges, attempted
from clipdistill.remote.store import Info, store_of

T = TypeVar("T")
_BLOCK = 8 << 20
"""Bytes of a request when an object is copied."""
_LEAST_BLOCK, _LARGEST_BLOCK, _THROUGH = 1 << 14, 4 << 20, 1 << 18
"""A reader that goes forward reads ever larger blocks; one that jumps further than _THROUGH begins small again."""
_COPIED = (".parquet", ".pq")
"""Files whose parts are read by other libraries through an open file; of tars, copies are made by `read_range`."""
_BLOCKS = 3  # of an object that is copied, on their way at a time
_MOST = 4 * _BLOCK  # bytes of one request of a reader


@dataclass(frozen=True)
class Status:
    """What os.stat would say; the time is what the store says of the version."""

    st_size: int
    st_mtime_ns: str


class RemotePath:
    """One object or folder. What was seen of it when it was first looked at holds for all reads (also in workers)."""

    def __init__(
        self, url: str, info: Info | None = None, root: RemotePath | None = None, opened: float | None = None
    ) -> None:
        scheme, _, rest = url.partition("://")
        self.url = f"{scheme.lower()}://{rest}"
        self._info, self._root = info, root
        self._opened: float = opened or (root._opened if root is not None else time.time())
        self._below: dict[str, Info] | None = None
        self._unlisted: FileNotFoundError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None, "_below": None}

    def __str__(self) -> str:
        return self.url

    __fspath__ = None  # nothing that reads local files may take this for one

    def __repr__(self) -> str:
        return f"RemotePath({without_secrets(self.url)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url.split("/") < other.url.split("/")

    # names

    @property
    def is_web(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def _split(self) -> tuple[str, str]:
        """(URL up to the query, '?query')."""
        base, mark, query = self.url.partition("?") if self.is_web else (self.url, "", "")
        return base.rstrip("/"), mark + query

    @property
    def _pure(self) -> PurePosixPath:
        last = self._split()[0].rpartition("/")[2]
        return PurePosixPath(unquote(last, errors="surrogateescape") if self.is_web else last)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> RemotePath:
        base, query = self._split()
        above = base.rpartition("/")[0]
        top = above.endswith("/") or above.endswith(":")
        return self if top else type(self)(above + query, root=self._root)

    def with_suffix(self, suffix: str) -> RemotePath:
        return self._beside(self._pure.with_suffix(suffix).name)

    def with_name(self, name: str) -> RemotePath:
        return self._beside(name)

    def _beside(self, name: str) -> RemotePath:
        base, query = self._split()
        return RemotePath(f"{base.rpartition('/')[0]}/{self._written(name)}{query}", root=self._root)

    def _written(self, name: str) -> str:
        return quote(name, safe="/!$&'()*+,;=:@~", errors="surrogateescape") if self.is_web else name

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        """What lies below; never what lies beside or above, whatever the name says."""
        inner = posixpath.normpath("/" + str(name)).lstrip("/")
        if inner == ".":
            return self
        base, query = self._split()
        return RemotePath(f"{base}/{self._written(inner)}{query}", root=self._root or self)

    def resolve(self) -> RemotePath:
        return self

    def is_symlink(self) -> bool:
        return False

    @staticmethod
    def in_parallel(call: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """As `map`, many at a time, with a bar. Raises the first error."""
        each = list(zip(*arguments))
        known = next((one for one in each[0] if isinstance(one, RemotePath)), None) if each else None
        title = "remote objects" if known is None else f"objects of {without_secrets(known.url).rpartition('/')[0]}"
        return in_parallel([functools.partial(call, *one) for one in each], title)

    # what is there

    def _look(self) -> Info:
        """What lies there. Raises FileNotFoundError; InputError where access is refused."""
        if self._info is None or (self._info.size < 0 and not self._info.folder and self._info.ranges):
            known = self._listed()
            if known is not None and (known.size >= 0 or known.folder):
                self._info = known
            else:
                look, tries = (lambda: store_of(self.url).info(self.url)), 2 if self._root is None else 1
                self._info = attempted(self.url, look, opening=tries)
        return self._info

    def _listed(self) -> Info | None:
        """What the listing of the folder that this path was made from says of it."""
        root = self._root
        if root is None or root._below is None or not self.url.startswith(root._split()[0] + "/"):
            return None
        inner = self._split()[0].removeprefix(root._split()[0]).strip("/")
        inner = unquote(inner, errors="surrogateescape") if self.is_web else inner
        if inner in root._below:
            return root._below[inner]
        if any(name.startswith(inner + "/") for name in root._below):
            return Info(0, folder=True)
        raise FileNotFoundError(self.url)

    def exists(self) -> bool:
        if "{" in self.url:
            return False  # a pattern of several
        try:
            self._look()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        return self.exists() and not self._look().folder

    def is_dir(self) -> bool:
        return self.exists() and self._look().folder

    def stat(self) -> Status:
        info = self._look()
        size = info.size if info.size >= 0 else self._whole_copy().stat().st_size
        return Status(size, self._version)

    def iterdir(self) -> Iterator[RemotePath]:
        found = attempted(self.url, lambda: store_of(self.url).children(self.url), opening=2)
        for name, info in sorted(found):
            child = self / name
            child._info = info
            yield child

    def _tree(self) -> dict[str, Info]:
        """(path below this folder, info) of all objects; listed once. FileNotFoundError where nothing can be listed."""
        if self._unlisted is not None:
            raise self._unlisted
        if self._below is None:
            try:
                self._below = dict(attempted(self.url, lambda: store_of(self.url).tree(self.url), opening=2))
            except FileNotFoundError as error:
                self._unlisted = error
                raise
        return self._below

    def walk(self) -> Iterator[tuple[PurePosixPath, list[str], list[str]]]:
        """As os.walk, with folders relative to this one; folders may be taken out of the list."""
        inner: dict[PurePosixPath, tuple[set[str], list[str]]] = {PurePosixPath(): (set(), [])}
        for name in self._tree():
            path = PurePosixPath(name)
            for below, above in zip([path, *path.parents], path.parents):
                folders, files = inner.setdefault(above, (set(), []))
                if below is path:
                    files.append(path.name)
                else:
                    folders.add(below.name)
        waiting = [PurePosixPath()]
        while waiting:
            here = waiting.pop()
            left = sorted(inner[here][0])
            yield here, left, sorted(inner[here][1])
            waiting += [here / name for name in reversed(left)]

    def presence(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are files below this folder: by a listing, or by asking for each."""
        wanted = [name for name in dict.fromkeys(names) if not name.startswith("/") and "\0" not in name]
        try:
            below = self._tree()
            return {name for name in wanted if posixpath.normpath("/" + name).lstrip("/") in below}
        except FileNotFoundError:
            found = self.in_parallel(lambda name: (self / name).is_file(), wanted)
            return {name for name, there in zip(wanted, found) if there}

    # bytes

    def begin_to_read(self, names: Iterable[str]) -> None:
        """Say which objects below this folder are read next, whole, in this order."""
        _read_ahead([], [self / name for name in names])

    def open(
        self, mode: str = "r", encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> Any:
        """A file that reads by ranges, or a copy of it."""
        raw: Any
        if self._look().folder:
            raise IsADirectoryError(self.url)
        if self.suffix.lower() in _COPIED and (place := self._copies()) is not None:
            copy = place.fetch(self._copy_name, self._look().size, self._opened, self._write)
            if copy is not None:
                return copy.open(mode, encoding=encoding, errors=errors, newline=newline)
        raw = RemoteFile(self)
        file = io.BufferedReader(raw, 1 << 13)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        _note(self)
        found = the_ahead().take(self._opening)
        return self._read_whole() if found is None else found

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def _read_whole(self) -> bytes:
        return attempted(self.url, lambda: store_of(self.url).whole(self.url))

    def read_range(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`: of a copy, of what was asked for ahead, or by a request. Raises RemoteError."""
        _note(self, start, size)
        if (place := self._copies()) is not None:
            data = place.read(self._copy_name, start, size)
            if data is None:
                the_ahead().take((*self._opening, "copy"))
                made = place.fetch(self._copy_name, self._look().size, self._opened, self._write)
                data = place.read(self._copy_name, start, size) if made else None
            if data is not None:
                return data
        found = the_ahead().take((*self._opening, start, size))
        return self.ranged(start, start + size) if found is None else found

    def ranged(self, start: int, end: int) -> bytes:
        """One request for a range, tried again where it fails."""
        info = self._look()
        if end <= start:
            return b""
        if end <= len(info.head):
            return info.head[start:end]
        if info.ranges:
            try:
                return attempted(self.url, lambda: store_of(self.url).read(self.url, start, end, info))
            except NoRanges:
                self._info = info = Info(info.size, info.identity, ranges=False)
        with self._whole_copy().open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _requests(self, ranges: Sequence[tuple[int, int, int, Any]]) -> list[tuple[int, Request]]:
        """What to fetch for these ranges: the object as a copy where copies are kept, else joined ranges."""
        place, name = self._copies(), self._copy_name
        if place is not None and place.is_open(name):
            return []
        if place is not None and place.wants(name, self._look().size):
            first = min(number for _, _, number, _ in ranges)
            return [(first, Request(self._make_copy, {(*self._opening, "copy"): (0, None)}))]
        return joined(ranges, self.ranged)

    @property
    def _opening(self) -> tuple[str, float]:
        """Which object of which opening: what was fetched for an earlier one is never used."""
        return self.url, self._opened

    def _make_copy(self) -> bytes:
        if (place := self._copies()) is not None:
            place.fetch(self._copy_name, self._look().size, self._opened, self._write)
        return b""

    @functools.cached_property
    def _copy_name(self) -> str:
        return copy_name(self.url, self._version)

    @property
    def _version(self) -> str:
        """What tells this content from another; where the store says nothing, each opening is a version."""
        return self._look().identity or f"opened {self._opened}"

    def _copies(self) -> Copies | None:
        """Where copies of this object are kept; None without --local-cache, and where versions cannot be told."""
        place = copies()
        return place if place is not None and self._look().ranges and self._look().identity else None

    def _whole_copy(self) -> Path:
        """A copy of an object that can only be had whole."""
        info = self._look()
        for place in (copies() if info.identity else None, spool()):
            path = None if place is None else place.fetch(self._copy_name, info.size, self._opened, self._write)
            if path is not None:
                return path
        raise InputError(f"{self.url}: there is no room for a copy of {info.size} bytes")

    def _write(self, path: Path) -> None:
        """Write the whole object into a local file."""
        info = self._look()
        if not info.ranges:
            attempted(self.url, lambda: store_of(self.url).save(self.url, path))
            return
        places = range(0, info.size, _BLOCK)
        requests = [
            request for p in places for _, request in joined([(p, min(p + _BLOCK, info.size), 0, p)], self.ranged)
        ]
        blocks = Ahead(_BLOCKS, _BLOCKS)
        blocks.replace(requests)
        with path.open("r+b") as file:
            for place in places:
                file.write(blocks.take(place) or b"")


class _Noted(BaseException):
    """Ends a read that is only noted down; no handler of ordinary errors may catch it."""


_noting = threading.local()


_far: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Whether any sample of a source was seen to be an object of a store."""


def read_ahead(source: Any, indices: Sequence[int]) -> None:
    """Begin to fetch the encoded pictures of these samples, in this order.

    Each is asked for once to note down which object it reads, which is not done; a source that turns out to be on this
    machine is not asked again.
    """
    read = getattr(source, "image_bytes", None) or getattr(source, "_bytes", None)
    if read is None or not len(indices):
        return
    part = source.part(indices[0]) if hasattr(source, "part") else source  # of several sets, a batch is of one
    if _far.get(part) is False:
        return
    last = indices[-1] + 1
    if last - indices[0] == len(indices) and multiprocessing.parent_process() is None:
        # whoever goes through a set in order alone will want the next lots: no wait between them
        indices = [*indices, *range(last, min(last + 2 * len(indices), len(source)))]
    ranges: list[tuple[RemotePath, int, int]] = []
    objects: list[RemotePath] = []
    kept = getattr(source, "_pictures", ())  # decoded ones (data/memory.py)
    for i in indices:
        if i in kept:
            continue
        _noting.wish, _noting.on = None, True
        try:
            read(i)
        except _Noted:
            if _noting.wish is not None:
                path, start, size = _noting.wish
                if start is None:
                    objects.append(path)
                else:
                    ranges.append((path, start, size))
        except Exception:  # it is told when the sample is read
            continue
        finally:
            _noting.on = False
    if ranges or objects:
        _far[part] = True
        _read_ahead(ranges, objects)
    elif part not in _far and not kept:
        _far[part] = False


def _note(path: RemotePath | None = None, start: int | None = None, size: int = 0) -> None:
    if getattr(_noting, "on", False):
        _noting.wish = None if path is None else (path, start, size)
        raise _Noted


def _read_ahead(wishes: Sequence[tuple[RemotePath, int, int]], objects: Sequence[RemotePath]) -> None:
    by_object: dict[RemotePath, list[tuple[int, int, int, Any]]] = {}
    keys = [(*path._opening, start, size) for path, start, size in wishes]
    known = the_ahead().wanted([*keys, *(path._opening for path in objects)])
    for number, ((path, start, size), key) in enumerate(zip(wishes, keys)):
        if key not in known:
            by_object.setdefault(path, []).append((start, start + size, number, key))
    found = [request for path, ranges in by_object.items() for request in path._requests(ranges)]
    found.sort(key=lambda entry: entry[0])
    whole = [Request(path._read_whole, {path._opening: (0, None)}) for path in objects if path._opening not in known]
    the_ahead().replace([*(request for _, request in found), *whole], known)


class RemoteFile(io.RawIOBase):
    """Reads an object by ranges: in ever larger blocks while the reader goes forward, the next one being fetched
    meanwhile; in small ones after a jump."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path, self._at = path, 0
        self._size = path.stat().st_size
        self._start, self._data = 0, path._look().head[: self._size]
        self._block = _LEAST_BLOCK
        self._next: tuple[int, Any] | None = None
        self._threads: Threads | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        _note()
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._at, _MOST)
        if wanted <= 0:
            return 0
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            self._fetch(wanted, end)
        inner = self._at - self._start
        piece = self._data[inner : inner + wanted]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _fetch(self, wanted: int, end: int) -> None:
        gap = self._at - end
        self._block = min(2 * self._block, _LARGEST_BLOCK) if 0 <= gap <= _THROUGH else _LEAST_BLOCK
        start = self._at
        ready, self._next = self._next, None
        if ready is not None and ready[0] <= self._at < ready[0] + _LARGEST_BLOCK:
            data = ready[1].result()
            if self._at < ready[0] + len(data):
                start, self._data = ready[0], data
            else:
                self._data = self._ranged(start, max(wanted, self._block))
        else:
            self._data = self._ranged(start, max(wanted, self._block))
        self._start = start
        behind = start + len(self._data)
        if self._block >= _LARGEST_BLOCK and behind < self._size:
            self._threads = self._threads or Threads(1)
            self._next = (behind, self._threads.submit(lambda: self._ranged(behind, _LARGEST_BLOCK)))

    def _ranged(self, start: int, length: int) -> bytes:
        return self._path.ranged(start, min(start + length, self._size))
