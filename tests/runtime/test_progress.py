"""The progress meter: a live bar on a terminal, plain lines elsewhere, and names that are no markup."""

from __future__ import annotations

import importlib

import pytest

from clipdistill.runtime import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch):
    """The module as it is where the error stream is a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    yield importlib.reload(progress)
    monkeypatch.undo()
    importlib.reload(progress)


@pytest.mark.parametrize("name", ["images of a[/b]", "images of [bold]x", "images of lr[/0.1]"])
def test_a_name_on_the_bar_is_no_markup(name: str, terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Meter(name, 2) as meter:
        meter.advance(2)
    assert name in capsys.readouterr().err


def test_one_meter_stands_below_another_while_it_is_open(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Meter("grid", 3, clock=False, transient=False) as grid:
        with terminal.Meter("run [a]", 10, within=grid) as run:
            assert run.live
            run.set(10, note="loss 0.5")
            assert not run.due(0)
        grid.set(1, note="about 2 min")
        grid.say("a line [/above]")
    shown = capsys.readouterr().err
    assert "run [a]" in shown
    assert "about 2 min" in shown
    assert "a line [/above]" in shown


def test_without_a_terminal_lines_are_due_now_and_then() -> None:
    with progress.Meter("filling", 4) as meter:
        assert not meter.live
        assert not meter.due(60)
        assert meter.due(60, at_once=True)
        assert not meter.due(60, at_once=True)
        meter.set(4)
        assert meter.due(60, at_once=True)
        assert meter.left() == 0


def test_a_meter_that_is_off_says_nothing(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Meter("filling", 4, enabled=False) as meter:
        meter.advance(4)
        meter.say("done")
        assert not meter.due(0)
    assert capsys.readouterr().err == ""
