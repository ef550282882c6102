"""The list of bad samples of a run: one JSON line each, counted by reason, with a budget that stops the run."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clipdistill.data.problems import Problems, reason_class
from clipdistill.errors import BudgetError, InputError

ALLOWANCE = 10
"""Bad samples that any budget above 0 tolerates, so that one bad file in the first batch does not end a run."""
_log = logging.getLogger(__name__)


class BadSampleLedger:
    """Appends bad samples to `path` (JSON lines: key, reason, shard) and stops above the budget.

    budget: the fraction of samples seen that may be bad; `max(ALLOWANCE, budget * seen)` are tolerated, none when the
    budget is 0. A sample is written once however often it is met; every meeting counts. Reopening continues the file;
    `damaged` is the number of its lines that cannot be read (they stay as they are). Raises InputError when the file
    cannot be opened.
    """

    def __init__(
        self, path: Path, budget: float, shard_of: Callable[[str], str | None] | None = None, allowance: int = ALLOWANCE
    ) -> None:
        self.path = path
        self.budget = budget
        self.allowance = allowance if budget > 0 else 0
        self.seen = 0
        self.bad = 0
        self.by_reason: Counter[str] = Counter()
        self._shard_of = shard_of
        self._written, self.damaged = _read_written(path)
        if self.damaged:
            _log.warning("%s: %d damaged lines are left as they are", path, self.damaged)

    @property
    def tolerated(self) -> int:
        """Bad samples tolerated at the number of samples seen so far."""
        return max(self.allowance, math.floor(self.budget * self.seen))

    @property
    def exceeded(self) -> bool:
        return self.bad > self.tolerated

    def record(self, problems: Iterable[tuple[str, str]], seen: int) -> None:
        """Add the bad samples (key, reason) among `seen` samples. Raises BudgetError above the budget."""
        problems = list(problems)
        self._add(problems, seen, len(problems), Counter(reason_class(reason) for _, reason in problems))

    def record_opening(self, problems: Problems, total: int) -> None:
        """List what opening the data found; of `total` samples, `problems.dropped` were left out and count as bad."""
        self._add(problems.rows, total, problems.dropped, problems.counts)

    def _add(self, rows: Iterable[tuple[str, str]], seen: int, bad: int, reasons: Counter[str]) -> None:
        self.seen += seen
        self.bad += bad
        self.by_reason.update(reasons)
        self._write(rows)
        if self.exceeded:
            raise BudgetError(self.message())

    def message(self) -> str:
        """What was found, in one sentence."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.by_reason.most_common(5))
        return (
            f"{self.bad} of {self.seen} samples are bad ({reasons}); the budget is {self.budget:.3%}, at least "
            f"{self.allowance}: look at {self.path}, then mend the data or raise data.bad_sample_budget"
        )

    def state(self) -> dict[str, object]:
        """The counters, ready for JSON, for a checkpoint."""
        return {"seen": self.seen, "bad": self.bad, "by_reason": dict(self.by_reason)}

    def restore(self, state: Any) -> None:
        """Continue from `state()`. Raises InputError for what is no such state."""
        try:
            counts = int(state["seen"]), int(state["bad"])
            reasons = Counter({str(k): int(v) for k, v in state["by_reason"].items()})
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"the count of bad samples kept for {self.path} is damaged: {state!r:.100}") from error
        (self.seen, self.bad), self.by_reason = counts, reasons

    def _write(self, problems: Iterable[tuple[str, str]]) -> None:
        lines = []
        for key, reason in problems:
            if (key, reason) in self._written:
                continue
            self._written.add((key, reason))
            shard = self._shard_of(key) if self._shard_of else None
            row = {"key": key, "reason": reason, **({"shard": shard} if shard else {})}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if lines:
            # one write in append mode: lines of several ranks do not mix, and a kill cuts at most the last line
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))


def _read_written(path: Path) -> tuple[set[tuple[str, str]], int]:
    """What a file of an interrupted run lists, and its damaged lines; an unfinished last line is closed."""
    written: set[tuple[str, str]] = set()
    damaged = 0
    try:
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")
    except OSError as error:
        raise InputError(f"{path}: the list of bad samples cannot be opened ({error.strerror or error})") from error
    for line in content.split(b"\n"):
        if not line:
            continue
        try:
            row = json.loads(line)
            written.add((row["key"], row["reason"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    return written, damaged
