"""The list of bad samples of a run: one JSON line each, counted by reason, with a budget that stops the run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from clipdistill.data.problems import Problems, reason_class
from clipdistill.errors import BudgetError

ALLOWANCE = 10
"""Bad samples that any budget above 0 tolerates, so that one bad file in the first batch does not end a run."""


class BadSampleLedger:
    """Appends bad samples to `path` (JSON lines: key, reason, shard) and stops above the budget.

    budget: the fraction of samples seen that may be bad; `max(ALLOWANCE, budget * seen)` are tolerated, none when the
    budget is 0. A sample is written once however often it is met; every meeting counts. Reopening continues the file.
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
        self._written = _read_written(path)

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
        self.seen += seen
        self.bad += len(problems)
        self.by_reason.update(reason_class(reason) for _, reason in problems)
        self._write(problems)
        if self.exceeded:
            raise BudgetError(self.message())

    def record_opening(self, problems: Problems, total: int) -> None:
        """List what opening the data found; of `total` samples, `problems.dropped` were left out and count as bad."""
        self.seen += total
        self.bad += problems.dropped
        self.by_reason.update(problems.counts)
        self._write(problems.rows)
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

    def restore(self, state: dict[str, object]) -> None:
        """Continue from `state()`."""
        self.seen, self.bad = int(str(state["seen"])), int(str(state["bad"]))
        reasons = state["by_reason"]
        assert isinstance(reasons, dict)
        self.by_reason = Counter({str(k): int(v) for k, v in reasons.items()})

    def _write(self, problems: Iterable[tuple[str, str]]) -> None:
        lines = []
        for key, reason in problems:
            if (key, reason) in self._written:
                continue
            self._written.add((key, reason))
            row: dict[str, str] = {"key": key, "reason": reason}
            shard = self._shard_of(key) if self._shard_of else None
            if shard:
                row["shard"] = shard
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if lines:
            # one write in append mode: lines of several ranks do not mix, and a kill cuts at most the last line
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))


def _read_written(path: Path) -> set[tuple[str, str]]:
    """What a file of an interrupted run lists; its unfinished last line is closed so that the next one stands alone."""
    written: set[tuple[str, str]] = set()
    if not path.exists():
        return written
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # not splitlines: captions and names may hold other line separators
        try:
            row = json.loads(line)
            written.add((row["key"], row["reason"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return written
