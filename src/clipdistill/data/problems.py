"""What went wrong with single samples: an exception for one that cannot be used, a tally for what opening found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ROWS_KEPT = 1000
"""Rows remembered per reason; the counts are always complete."""


def valid_text(text: str) -> str:
    """`text` with what is no Unicode (bytes of file names that are not UTF-8) written out, as in 'caf\\udce9.jpg'."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


class BadSample(Exception):
    """One sample cannot be used (undecodable, truncated, missing): the loader skips, counts and lists it.

    `reason` is a short class such as "truncated image", optionally followed by ': detail'; counts are per class.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.reason, self.key)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


def reason_class(reason: str) -> str:
    """The part of a reason that is counted: everything before the first ': '."""
    return reason.partition(": ")[0]


@dataclass
class Problems:
    """What opening a data set found: counts per reason, the first rows of each, and how many samples were left out."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0

    def add(self, reason: str, key: str, *, dropped: bool = False, times: int = 1) -> None:
        """Count `reason` (its class) `times`; `dropped` says that a whole sample was left out because of it."""
        name = reason_class(reason)
        if self.counts[name] < ROWS_KEPT:
            self.rows.append((valid_text(key), valid_text(reason)))
        self.counts[name] += times
        self.dropped += dropped

    def merge(self, other: Problems) -> None:
        """Add everything that `other` counted."""
        self.counts.update(other.counts)
        self.rows.extend(other.rows)
        self.dropped += other.dropped

    @property
    def total(self) -> int:
        """Everything counted, over all reasons."""
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def sentence(self, name: str) -> str:
        """'flickr: found when it was opened: 3 empty caption' for the user; '' when there was nothing."""
        return f"{name}: found when it was opened: {self.summary()}" if self.counts else ""

    def summary(self) -> str:
        """For example '3 empty caption, 1 missing image file'; '' when there was nothing."""
        return ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items()))
