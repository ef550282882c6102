"""What the tests of runs that are stopped share."""

from __future__ import annotations

from clipdistill.train import loop
from tests.reliability.support import lines, require_same_run

__all__ = ["COUNT", "lines", "require_same_run", "stop_after"]

COUNT = 24
"""Pictures in the folder `photographs`."""


def stop_after(monkeypatch, step):
    """Within this process a run is asked to stop after a step; `monkeypatch.undo()` ends it."""
    calls, original = [], loop.any_rank

    def stopping(flag, device):
        calls.append(1)
        return original(flag, device) or len(calls) == 2 * step  # asked twice a step: finite?, stop?

    monkeypatch.setattr(loop, "any_rank", stopping)
