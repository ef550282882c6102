"""Stopping on request: the first signal asks the loop to save and leave, the second leaves at once."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [s for name in ("SIGTERM", "SIGINT", "SIGUSR1") if (s := getattr(signal, name, None)) is not None]


class StopSignal(AbstractContextManager["StopSignal"]):
    """While open, SIGTERM, SIGINT and SIGUSR1 set `received` instead of killing the process.

    The loop looks at it once a step. A second signal ends the process with 128 + its number, as a shell would report.
    Only the main thread can install handlers; elsewhere (a notebook's worker thread) nothing is installed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
