"""Time left of a grid whose runs are of different lengths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from clipdistill.ablate import progress
from clipdistill.ablate.progress import GridDisplay


def run_of(name: str, **train: Any) -> Any:
    return SimpleNamespace(name=name, config=SimpleNamespace(train=SimpleNamespace(**train)))


RESULT: Any = SimpleNamespace(scores=None)


@pytest.mark.parametrize(
    ("lengths", "left"),
    [
        ([{"steps": 100}, {"steps": 300}, {"steps": 1000}], "21 min 40 s"),
        ([{"epochs": 1.0}, {"epochs": 3.0}, {"epochs": 10.0}], "21 min 40 s"),
        ([{"steps": 100}, {"epochs": 3.0}, {"steps": 1000}], "3 min 20 s"),  # not to be compared: all alike
    ],
    ids=["steps", "epochs", "both"],
)
def test_long_runs_count_for_what_they_are(lengths: list[dict[str, Any]], left: str) -> None:
    runs = [
        run_of(f"run{i}", **{"steps": None, "epochs": None, "batch_size": 8} | one) for i, one in enumerate(lengths)
    ]
    display = GridDisplay(runs, done=0, enabled=False)
    assert display.left_in_words() == ""
    display.begin(runs[0])
    display.end(runs[0], RESULT, seconds=100.0)
    assert left in display.left_in_words()
    display.begin(runs[1])
    display.failed(runs[1], ValueError("broken"))
    assert ("16 min 40 s" if "21" in left else "1 min 40 s") in display.left_in_words()


def test_the_first_run_foretells_from_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of("short", steps=100, epochs=None, batch_size=8), run_of("long", steps=900, epochs=None, batch_size=8)]
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = GridDisplay(runs, done=2, enabled=False)
    display.begin(runs[0])
    now[0] = 10.0
    assert display.left_in_words(0.01) == ""
    assert "3 min 10 s" in display.left_in_words(0.5)


def test_of_a_run_that_goes_on_only_the_rest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of(name, steps=100, epochs=None, batch_size=8) for name in ("stopped", "whole")]
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = GridDisplay(runs, done=0, enabled=False)
    display.begin(runs[0])
    display.line("stopped", total=100, start=80, enabled=False)
    now[0] = 10.0
    assert "1 min 50 s" in display.left_in_words(0.9)  # a second a step: 10 of this run, 100 of the other
    display.end(runs[0], RESULT, seconds=20.0)
    assert "1 min 40 s" in display.left_in_words()
