"""What the tests of runs that are stopped share."""

from __future__ import annotations

import os
import signal

from clipdistill.train import loop
from tests.reliability.support import lines, require_same_run

__all__ = ["COUNT", "lines", "require_same_run", "signal_at", "stop_after"]

COUNT = 24
"""Pictures in the folder `photographs`."""


def stop_after(monkeypatch, step):
    """Within this process a run is asked to stop after a step; `monkeypatch.undo()` ends it."""
    calls, original = [], loop.any_rank

    def stopping(flag, device):
        calls.append(1)
        return original(flag, device) or len(calls) == 2 * step  # asked twice a step: finite?, stop?

    monkeypatch.setattr(loop, "any_rank", stopping)


def signal_at(monkeypatch, step):
    """The first run of this process that is done with a step gets SIGTERM there."""
    real, done = loop.Loop.tell, []

    def tell(self, event, **changes):
        real(self, event, **changes)
        if event == "on_step" and self.progress.step == step and not done:
            done.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Loop, "tell", tell)
