"""Rows of many callers through one function together: a queue, a thread, and each caller's own rows back in order.

A batch is taken when it is full or its first row has waited long enough; rows of one caller may be spread over several
batches. A batch that fails is run again caller by caller, so that nobody's input is another's error.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

import numpy as np


class _Call:
    """One caller's rows (n, ...) and the place for what becomes of them."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.future: Future[np.ndarray] = Future()
        self.since = time.monotonic()
        self.taken = 0
        self.done = 0
        self.out: np.ndarray | None = None

    def deliver(self, begin: int, found: np.ndarray) -> None:
        if self.out is None:
            self.out = np.empty((len(self.rows), *found.shape[1:]), dtype=found.dtype)
        self.out[begin : begin + len(found)] = found
        self.done += len(found)
        if self.done == len(self.rows) and not self.future.done():
            self._end(lambda: self.future.set_result(self.out))  # type: ignore[arg-type]

    def fail(self, error: Exception) -> None:
        self._end(lambda: self.future.set_exception(error))

    def _end(self, end: Callable[[], None]) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller has left, or an earlier part of it failed
            end()


_Part = tuple[_Call, int, int]
"""A call, and the first and last (exclusive) of its rows that go into a batch."""


class Batcher:
    """Runs `function` on at most `most` rows at a time, in a thread of its own, until `close`.

    wait: seconds that the first row waits for more; turn: a lock that functions sharing a processor take in turns;
    seen: told of each batch (rows, seconds).
    """

    def __init__(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        most: int,
        wait: float,
        *,
        turn: threading.Lock | None = None,
        seen: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._function, self._most, self._wait, self._seen = function, most, wait, seen
        self._turn = turn or threading.Lock()
        self._calls: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches")
        self._thread.start()

    def submit(self, rows: np.ndarray) -> Future[np.ndarray]:
        """What the function makes of `rows` (n, ...), at least one, in their order; cancel it to take them back."""
        call = _Call(rows)
        with self._changed:
            if self._closing:
                raise RuntimeError("this queue is closed")
            self._calls.append(call)
            self._changed.notify()
        return call.future

    def stuck(self, seconds: float) -> bool:
        """Whether the thread has ended or one batch has been running for longer than that."""
        since = self._busy_since
        return not self._thread.is_alive() or (since is not None and time.monotonic() - since > seconds)

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while parts := self._next():
            self._busy_since = time.monotonic()
            self._run(parts)
            self._busy_since = None

    def _next(self) -> list[_Part]:
        """The rows of the next batch; none when closed and empty."""
        with self._changed:
            while True:
                while self._calls and self._calls[0].future.done():
                    self._calls.popleft()
                if not self._calls and self._closing:
                    return []
                left = self._calls[0].since + self._wait - time.monotonic() if self._calls else None
                full = sum(len(call.rows) - call.taken for call in self._calls) >= self._most
                if left is not None and (left <= 0 or full or self._closing):
                    return self._taken()
                self._changed.wait(left)

    def _taken(self) -> list[_Part]:
        parts: list[_Part] = []
        room = self._most
        while room and self._calls:
            call = self._calls[0]
            if not call.future.done():
                begin, call.taken = call.taken, min(call.taken + room, len(call.rows))
                parts.append((call, begin, call.taken))
                room -= call.taken - begin
            if call.future.done() or call.taken == len(call.rows):
                self._calls.popleft()
        return parts

    def _run(self, parts: list[_Part]) -> None:
        try:
            rows = np.concatenate([call.rows[begin:end] for call, begin, end in parts])
            with self._turn:
                began = time.monotonic()
                found = self._function(rows)
            if len(found) != len(rows):
                raise RuntimeError(f"{len(found)} rows came back for {len(rows)}")
            self._seen(len(rows), time.monotonic() - began)
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    self._run([part])
            else:
                parts[0][0].fail(error)
            return
        for call, begin, end in parts:
            call.deliver(begin, found[: end - begin])
            found = found[end - begin :]
