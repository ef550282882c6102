"""The one progress meter: a live line on a terminal, plain lines now and then elsewhere, nothing when it is off."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""Text of the user is never taken for markup, and lines are wrapped by the terminal alone: a file gets them whole."""


class Meter:
    """`done` of `total` items, with a note behind the bar. Used in a `with` statement.

    within: another meter, below whose line this one stands while it is open. clock: whether the bar reckons the time
    left. transient: the line vanishes at the end.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        done: int = 0,
        *,
        enabled: bool = True,
        within: Meter | None = None,
        clock: bool = True,
        transient: bool = True,
    ) -> None:
        self.title, self.total, self.done, self.enabled = title, total, done, enabled
        self._began, self._first, self._said = time.monotonic(), done, 0.0
        self._own = within is None
        self._bar: Progress | None = None if within is None else within._bar
        if within is None and enabled and console.is_terminal:
            name, note = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[note]"))
            columns = [name, BarColumn(bar_width=24), MofNCompleteColumn(), *([TimeRemainingColumn()] if clock else [])]
            self._bar = Progress(*columns, note, console=console, transient=transient)

    @property
    def live(self) -> bool:
        """Whether there is a line that moves."""
        return self.enabled and self._bar is not None

    def __enter__(self) -> Self:
        if self._bar is not None and self.enabled:
            self._row = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
            if self._own:
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None and self.enabled:
            if self._own:
                self._bar.stop()
            else:
                self._bar.remove_task(self._row)

    def set(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """So many are done; `total` and `note` stay as they are where none is given."""
        self.done, self.total = done, self.total if total is None else total
        if self._bar is not None and self.enabled:
            extra: dict[str, Any] = {} if note is None else {"note": note}
            self._bar.update(self._row, completed=done, total=self.total, **extra)

    def advance(self, count: int, total: int | None = None) -> None:
        """`count` more are done; the note is how many a second."""
        done = self.done + count
        self.set(done, total, f"{(done - self._first) / max(time.monotonic() - self._began, 1e-9):,.0f}/s")

    def due(self, seconds: float, at_once: bool = False) -> bool:
        """Whether it is time for a plain line: there is no live one, and the last, or the start, is so long ago.

        at_once: the first line is due immediately, and so is one when all is done.
        """
        now, last = time.monotonic(), self._said or (float("-inf") if at_once else self._began)
        if self.live or not self.enabled or (now - last < seconds and not (at_once and self.done == self.total)):
            return False
        self._said = now
        return True

    def left(self) -> float:
        """Seconds that the rest will take at the pace so far."""
        return (time.monotonic() - self._began) / max(self.done - self._first, 1) * ((self.total or 0) - self.done)

    def say(self, text: str) -> None:
        """A line above the live one."""
        if self.enabled:
            console.print(text)
