"""Which lines and steps between lines of some source files have run; small, and enough to guide a fuzzer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_WATCHED = 1000


class Coverage:
    """Records lines and edges (pairs of consecutive lines) inside functions of `files` while `recording()`."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]
        self.lines: set[tuple[str, int]] = set()
        self.edges: set[tuple[str, int, int]] = set()
        self._wanted = frozenset(self.files)
        self._mine: dict[CodeType, bool] = {}
        self._quiet: dict[CodeType, int] = {}  # calls of a function since it did something new
        self._last = 0
        self._new = False

    @contextmanager
    def recording(self, watched: bool = True) -> Iterator[None]:
        """Record what runs in this thread inside the `with`, where it is `watched`."""
        self._new, self._last = False, 0
        sys.settrace(self._enter if watched else None)
        try:
            yield
        finally:
            sys.settrace(None)

    @property
    def found_new(self) -> bool:
        """Whether the last recording met an edge that none before had met."""
        return self._new

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        mine = self._mine.get(code)
        if mine is None:
            mine = self._mine[code] = code.co_filename in self._wanted and code.co_name != "<module>"
        if not mine:
            return None
        self._quiet[code] = quiet = self._quiet.get(code, 0) + 1
        # tracing costs more than running: functions that have long done nothing new are watched now and then
        return self._line if quiet < _WATCHED or quiet % 8 == 0 else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            name, number = frame.f_code.co_filename, frame.f_lineno
            edge = (name, self._last, number)
            if edge not in self.edges:
                self.edges.add(edge)
                self.lines.add((name, number))
                self._new = True
                self._quiet[frame.f_code] = 0
            self._last = number
        return self._line

    def summary(self) -> dict[str, tuple[int, int]]:
        """(lines run, lines there are) inside the functions of each file."""
        result = {}
        for file in self.files:
            there = _lines_of_functions(Path(file))
            result[file] = (len({n for f, n in self.lines if f == file} & there), len(there))
        return result


def _lines_of_functions(file: Path) -> set[int]:
    """Numbers of the lines inside functions: what runs at import is no merit of a fuzzer."""
    found: set[int] = set()

    def walk(code: CodeType, inside: bool) -> None:
        if inside:
            # the first entry is the `def` itself
            found.update(line for *_, line in code.co_lines() if line is not None and line != code.co_firstlineno)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                # a class body has no fast locals; comprehensions and lambdas belong to what is around them
                walk(constant, inside or bool(constant.co_flags & 0x1))

    walk(compile(file.read_bytes(), str(file), "exec"), False)
    return found
