"""Bytes that are wanted next, fetched by threads while the ones before are used."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from clipdistill.runtime.progress import Meter

T = TypeVar("T")
_THREADS = 12
_WAITING = 24
"""Requests that are on their way or waiting to be used."""
_MANY = 8
"""Calls in parallel of which more show how far they are."""
GAP, LARGEST = 1 << 16, 1 << 20
"""Ranges of one object closer than GAP bytes are one request, of at most LARGEST bytes."""


class Threads:
    """Daemon threads that work on what is handed in: a program that ends does not wait for a slow server."""

    def __init__(self, count: int = _THREADS) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._count, self._started = count, 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """`call()` in one of the threads."""
        future: Future[T] = Future()
        self._tasks.put((future, call))
        if self._started < self._count:
            self._started += 1
            threading.Thread(target=self._work, daemon=True, name=f"remote-{self._started}").start()
        return future

    def _work(self) -> None:
        while True:
            future, call = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # whoever asks for the result gets it
                    future.set_exception(error)


def in_parallel(calls: Iterable[Callable[[], T]], title: str) -> list[T]:
    """The results in order, with a bar where there are many. Raises the first error."""
    threads = Threads()
    futures = [threads.submit(call) for call in calls]
    results = []
    with Meter(title, len(futures), enabled=len(futures) > _MANY) as meter:
        for future in futures:
            results.append(future.result())
            meter.advance(1)
            if meter.due(10):
                meter.say(f"{title}  {meter.done}/{meter.total}")
    return results


@dataclass
class Request:
    """One fetch, and the places in its result (start, end) of those who want a part of it."""

    fetch: Callable[[], bytes]
    parts: dict[Hashable, tuple[int, int | None]]
    future: Future[bytes] | None = None
    left: set[Hashable] = field(default_factory=set)


class Ahead:
    """What is on its way, by key. A new list of wishes replaces the old one."""

    def __init__(self, threads: int = _THREADS, waiting: int = _WAITING) -> None:
        self.process = os.getpid()
        self._most = waiting
        self._lock = threading.Lock()
        self._threads = Threads(threads)
        self._waiting: deque[Request] = deque()
        self._wanted: dict[Hashable, Request] = {}
        self._running = 0

    def wanted(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Those of `keys` that are on their way."""
        with self._lock:
            return {key for key in keys if key in self._wanted}

    def replace(self, requests: Iterable[Request], keep: Iterable[Hashable] = ()) -> None:
        """Forget what was not taken, but for the wishes `keep`, and begin with these, in order."""
        with self._lock:
            keep, kept = set(keep), []
            for request in {id(request): request for request in self._wanted.values()}.values():
                request.left &= keep
                if request.left:
                    kept.append(request)
                elif request.future is not None:
                    request.future.cancel()
            new = list(requests)
            for request in new:
                request.left = set(request.parts)
            self._waiting = deque([*(request for request in kept if request.future is None), *new])
            self._running = sum(request.future is not None for request in kept)
            self._wanted = {key: request for request in [*kept, *new] for key in request.left}
            self._more()

    def _more(self) -> None:
        while self._waiting and self._running < self._most:
            request = self._waiting.popleft()
            if request.left and request.future is None:
                request.future = self._threads.submit(request.fetch)
                self._running += 1

    def take(self, key: Hashable) -> bytes | None:
        """The bytes of a wish, once; None for what was not wished for. Raises what fetching it raised."""
        if not self._wanted:
            return None
        with self._lock:
            request = self._wanted.pop(key, None)
            if request is None:
                return None
            if request.future is None:  # somebody reads in another order
                request.future = self._threads.submit(request.fetch)
                self._running += 1
        try:
            data = request.future.result()
        except BaseException:
            self.replace([])  # whoever reads again asks anew
            raise
        with self._lock:
            request.left.discard(key)
            if not request.left:
                self._running -= 1
                self._more()
        start, end = request.parts[key]
        return data[start:end]


_ahead: Ahead | None = None


def the_ahead() -> Ahead:
    """This process's own: threads do not survive a fork."""
    global _ahead
    if _ahead is None or _ahead.process != os.getpid():
        _ahead = Ahead()
    return _ahead


def joined(
    ranges: Iterable[tuple[int, int, int, Hashable]], read: Callable[[int, int], bytes]
) -> list[tuple[int, Request]]:
    """(lowest number, request) for wishes (start, end, number, key) of one object, neighbours in one request."""
    found: list[tuple[int, Request]] = []
    group: list[tuple[int, int, int, Hashable]] = []

    def close() -> None:
        if group:
            first, last = group[0][0], max(end for _, end, _, _ in group)
            parts: dict[Hashable, tuple[int, int | None]] = {k: (a - first, b - first) for a, b, _, k in group}
            found.append((min(n for _, _, n, _ in group), Request(lambda: read(first, last), parts)))
            group.clear()

    for entry in sorted(ranges, key=lambda wish: wish[:3]):
        if group and (entry[0] - max(g[1] for g in group) > GAP or entry[1] - group[0][0] > LARGEST):
            close()
        group.append(entry)
    close()
    return found
