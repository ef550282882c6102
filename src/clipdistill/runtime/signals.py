"""Stopping on request: the first signal asks the run to save and leave, the second leaves at once; limits of time."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [s for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if (s := getattr(signal, name, None))]


class Interrupted(BaseException):
    """A signal within `StopSignal.at_once`. Not an Exception, so that no reader of data takes it for bad data."""


class StopSignal(AbstractContextManager["StopSignal"]):
    """While open, SIGTERM, SIGINT, SIGUSR1 and SIGHUP (but for one that nohup ignores) set `received`, not ending it.

    The loop looks at it once a step; work that may be dropped at any point runs within `at_once`. A second signal ends
    the process with 128 + its number, as a shell would report; at a prompt or in a notebook it is a KeyboardInterrupt.
    Only the main thread can install handlers; elsewhere (a notebook's worker thread) nothing is installed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}
        self._owner = os.getpid()
        self._droppable = 0

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN:
                continue
            if signal.getsignal(number) is None:  # of the program that embeds Python, and could not be put back
                continue
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

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal (also one that came before) raises Interrupted wherever the program is.

        For work that leaves nothing behind when it is dropped: starting up, evaluating.
        """
        self._droppable += 1
        try:
            self._drop()
            yield
            self._drop()  # a library that swallows every exception does not make the request undone
        except Exception as error:
            if self.received is None:
                raise
            # compiled code in whose middle the handler raised may have made another exception of it
            raise Interrupted(self.received) from error
        finally:
            self._droppable -= 1

    def _drop(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked helper: its parent decides
        if self.received is not None:
            if hasattr(sys, "ps1"):  # a notebook or a prompt: its other work is not to be lost
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        if self.received == "SIGHUP":  # the terminal has gone: writing to it would fail before all is saved
            for descriptor in (1, 2):
                with suppress(OSError):
                    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if self._droppable:
            raise Interrupted(self.received)


class TooLongError(BaseException):
    """The time of `time_limit` is over. Not an Exception, so that no library takes it for a fault of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, TooLongError is raised after so many seconds, wherever the program is (waiting for a process included).

    Without effect outside of the main thread and on systems without such a clock. One that is running goes on after.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    late = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal late
        late = True
        raise TooLongError(f"{seconds:g} s are over")

    before, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if late:  # compiled code in whose middle it was raised may have made another exception of it
            raise TooLongError(f"{seconds:g} s are over") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
