"""Bringing an index up to date: new and changed files are encoded, removed ones dropped, nothing is done twice.

A file counts as unchanged when path, size and time of change are the same. Otherwise its content decides (SHA-256): a
file that was only touched, moved or copied keeps the vector it has. What is done is saved every few seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample
from clipdistill.errors import Preempted
from clipdistill.search.encoder import SearchModel
from clipdistill.search.photographs import Photograph, read_photograph, scan
from clipdistill.search.store import SearchIndex

SAVE_SECONDS = 15.0
_SAVE_ROWS = 8192


@dataclass
class Update:
    """What an update did, in files; `bad` are all files of the folder that are no readable image, (path, reason);
    `unlisted` are sub-folders that could not be read; seconds and `rate` count the newly encoded files."""

    photographs: int = 0
    encoded: int = 0
    recognised: int = 0
    unchanged: int = 0
    removed: int = 0
    seconds: float = 0.0
    bad: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Newly encoded files a second."""
        return self.encoded / self.seconds if self.seconds > 0 else 0.0


@dataclass
class _Prepared:
    """A file that was read: its pixels, or the row of a vector that is known for its content, or why it is bad."""

    photograph: Photograph
    sha256: str = ""
    pixels: np.ndarray | None = None
    row: int | None = None
    reason: str = ""


def update(
    index: SearchIndex,
    folder: Path,
    model: SearchModel,
    *,
    batch_size: int = 64,
    workers: int = 2,
    rehash: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    save_seconds: float = SAVE_SECONDS,
) -> Update:
    """Bring `index` up to date with the photographs in `folder`.

    workers: threads that read and decode; rehash: look at the content of every file, also of those whose size and time
    are unchanged; progress: called with (files done since the last call, files to do); stop: asked after each batch.
    Raises Preempted when `stop` said so (all that was done is saved), InputError while another process updates it.
    """
    with index.lock():
        index.refresh()
        found, unlisted = scan(folder)
        wanted = [p for p in found if rehash or not _unchanged(index, p)]
        done = Update(unchanged=len(found) - len(wanted), unlisted=unlisted)
        work = _Work(index, model, done, batch_size)
        model.expect(len(wanted))
        count, shown, saved = 0, 0, time.monotonic()
        for prepared in _prepared(folder, model, wanted, index, workers, 2 * batch_size):
            work.take(prepared)
            count += 1
            if count % batch_size and count < len(wanted):
                continue
            if progress is not None:
                progress(count - shown, len(wanted))
                shown = count
            stopped = stop()
            if stopped or time.monotonic() - saved > save_seconds or len(work.ready) >= _SAVE_ROWS:
                work.save()
                saved = time.monotonic()
            if stopped:
                raise Preempted(
                    f"stopped on request: {len(index.entries):,} photographs are in the index; "
                    "the same command continues"
                )
        work.save()
        # last, so that a file that was moved is recognised by its old row
        present = {photograph.path for photograph in found}
        for path in [path for path in (*index.entries, *index.bad) if path not in present]:
            done.removed += path in index.entries
            index.drop(path)
        index.save(compact=True)
        index.remove_leftovers()
        done.photographs = len(index.entries)
        done.bad = [(path, reason) for path, (_, _, reason) in sorted(index.bad.items())]
        return done


def _unchanged(index: SearchIndex, photograph: Photograph) -> bool:
    facts = (photograph.size, photograph.modified)
    entry = index.entries.get(photograph.path)
    if entry is not None:
        return facts == (entry.size, entry.modified)
    bad = index.bad.get(photograph.path)
    return bad is not None and facts == bad[:2]


class _Work:
    """Prepared files on their way into the index: pixels wait for a full batch, vectors for the next save."""

    def __init__(self, index: SearchIndex, model: SearchModel, done: Update, batch_size: int) -> None:
        self.index, self.model, self.done, self.batch_size = index, model, done, batch_size
        self.waiting: list[_Prepared] = []
        self.ready: list[tuple[_Prepared, np.ndarray]] = []
        self._counted = 0
        self._since = time.monotonic()

    def take(self, prepared: _Prepared) -> None:
        """One more file."""
        photograph = prepared.photograph
        if prepared.pixels is not None:
            self.waiting.append(prepared)
            if len(self.waiting) == self.batch_size:
                self._encode()
        elif prepared.row is not None:
            self.ready.append((prepared, self.index.vector(prepared.row)))
            self.done.recognised += 1
        else:
            self.index.drop(photograph.path)
            self.index.bad[photograph.path] = (photograph.size, photograph.modified, prepared.reason)

    def save(self) -> None:
        """Everything taken so far is in the index on disk."""
        self._encode()
        now = time.monotonic()
        if self.done.encoded > self._counted:
            self.done.seconds += now - self._since
            self.index.cost.files += self.done.encoded - self._counted
            self.index.cost.seconds += now - self._since
            self.index.cost.device = str(self.model.device)
        self._counted, self._since = self.done.encoded, now
        if self.ready:
            files = [(p.photograph.path, p.photograph.size, p.photograph.modified, p.sha256) for p, _ in self.ready]
            self.index.add(files, np.stack([vector for _, vector in self.ready]))
            self.ready.clear()
        self.index.save()

    def _encode(self) -> None:
        if self.waiting:
            vectors = self.model.images(np.stack([p.pixels for p in self.waiting if p.pixels is not None]))
            self.ready += zip(self.waiting, vectors, strict=True)
            self.done.encoded += len(self.waiting)
            self.waiting = []


def _prepared(
    folder: Path, model: SearchModel, wanted: Sequence[Photograph], index: SearchIndex, workers: int, ahead: int
) -> Iterator[_Prepared]:
    """Files read, hashed and decoded by threads (Pillow and hashlib work outside the interpreter lock), in order."""
    known = {entry.sha256: entry.row for entry in index.entries.values()} if wanted else {}

    def prepare(photograph: Photograph) -> _Prepared:
        try:
            data = read_photograph(folder / photograph.path)
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in known:
                return _Prepared(photograph, sha256, row=known[sha256])
            return _Prepared(photograph, sha256, model.pixels(decode(data, at_least=model.at_least())))
        except BadSample as error:
            return _Prepared(photograph, reason=error.reason)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: deque[Future[_Prepared]] = deque()
        rest = iter(wanted)
        try:
            for photograph in rest:
                waiting.append(pool.submit(prepare, photograph))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
