"""Rows 15 and 17: runs that are killed or asked to stop at random moments end as if nothing had happened.

The full count is 50 of each; CLIPDISTILL_KILLS sets another.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.support import Child, Launcher, newest_step, require_same_run, training, wait_for

COUNT = int(os.environ.get("CLIPDISTILL_KILLS", "50"))


class Torment:
    """A run that is disturbed again and again until it ends; then the next one is begun."""

    def __init__(self, launcher: Launcher, models: Path, folder: Path, undisturbed: Path, seed: int) -> None:
        self.launcher, self.models, self.folder, self.undisturbed = launcher, models, folder, undisturbed
        self.rng = random.Random(seed)
        self.runs, self.out = 0, folder / "run-0"
        self.expected: int | None = None
        self.lasted = 1.0
        self.writing = 0
        """How many times a checkpoint was half written."""
        self.codes: dict[int, int] = {}

    def measure(self) -> None:
        """How long an undisturbed run takes on this machine now."""
        began = time.monotonic()
        self.finish()
        self.lasted = time.monotonic() - began

    def start(self) -> Child:
        workers = self.rng.choice([0, 0, 1])
        return self.launcher.start(*training(self.models, self.out, f"train.workers={workers}"))

    def moment(self, child: Child) -> None:
        """Wait for a random moment: any time, while a checkpoint is being written, or some time after one was."""
        kind = self.rng.random()
        if kind < 0.3:
            child.wait(self.rng.random() * self.lasted)
        elif kind < 0.65:
            if wait_for(self.out, "checkpoints/.writing-*", child, self.rng.randint(1, 2)):
                child.wait(self.rng.random() * 0.02)
        elif wait_for(self.out, "checkpoints/step-*", child, self.rng.randint(1, 3)):
            child.wait(self.rng.random() * self.lasted / 8)

    def disturb(self, number: int) -> bool:
        """One start and one signal; False when the run ended before the signal came."""
        began = time.monotonic()
        child = self.start()
        self.moment(child)
        child.send(number)
        half = [path.name for path in self.out.glob("checkpoints/.writing-*")]
        code = child.wait()
        assert code is not None, f"hangs:\n{child.said[-2000:]}"
        said = child.said
        self.require_resumed(said)
        if code == 0:
            self.lasted = time.monotonic() - began
            self.ended()
            return False
        self.codes[code] = self.codes.get(code, 0) + 1
        self.writing += bool(half)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, said
        elif code == -signal.SIGTERM:
            assert not said, "the default action is for the time before anything has begun"
        else:
            assert code == 75, f"{code}: {said[-3000:]}"
        before, self.expected = self.expected, newest_step(self.out)
        assert (self.expected or 0) >= (before or 0), "the newest whole checkpoint went back"
        if saved := re.search(r"after step (\d+); saved", said):
            assert self.expected == int(saved[1])
        return True

    def require_resumed(self, said: str) -> None:
        """What was said about where it goes on is where the newest whole checkpoint was."""
        found = re.search(r"from\s+step\s+(\d+)", said)
        if found:
            assert self.expected == int(found[1])
        if self.expected is None or "passed over" in said:
            assert not found
            assert "passed over" not in said

    def ended(self) -> None:
        require_same_run(self.undisturbed, self.out)
        assert not [path for path in self.out.rglob(".*") if "writing" in path.name]
        self.runs += 1
        self.out, self.expected = self.folder / f"run-{self.runs}", None

    def finish(self) -> None:
        """Let the last run end undisturbed."""
        child = self.start()
        said = child.finish()
        self.require_resumed(said)
        self.ended()


def torment(
    count: int, number: int, launcher: Launcher, models: Path, folder: Path, undisturbed: Path, seed: int
) -> Torment:
    victim = Torment(launcher, models, folder, undisturbed, seed)
    if count > 2:
        victim.measure()
    done = 0
    while done < count:
        done += victim.disturb(number)
    victim.finish()
    return victim


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_rows_15_17_a_disturbed_run_ends_like_an_undisturbed_one(
    number: int, launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    torment(2, number, launcher, models, tmp_path, undisturbed, seed=7)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_rows_15_17_many_times(
    number: int, launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    victim = torment(COUNT, number, launcher, models, tmp_path, undisturbed, seed=int(number))
    name = signal.Signals(number).name
    print(f"{COUNT} x {name}: {victim.runs} runs, {victim.writing} while writing, exit codes {victim.codes}")


def test_row_17_a_second_signal_leaves_at_once(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    child = launcher.start(*training(models, out), fault="stall", step=3, rank=0, seconds=200.0)
    while not (out / "checkpoints" / "step-00000003").exists():
        assert child.wait(0.01) is None
    time.sleep(0.2)
    child.send(signal.SIGTERM)  # asks: the step that hangs is waited for
    assert child.wait(0.3) is None
    began = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 100
    assert newest_step(out) == 3
    assert "continuing" in launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)


def test_row_17_a_signal_while_the_curve_is_measured_puts_it_off(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    child = launcher.start(*training(models, out), fault="slow_evaluation", seconds=200.0)
    while not (out / "checkpoints" / "step-00000002").exists():
        assert child.wait(0.01) is None
    time.sleep(0.3)
    child.send(signal.SIGTERM)
    assert "after step 3; saved" in child.finish(75)
    assert not (out / "eval.jsonl").exists()
    child = launcher.start(*training(models, out), fault="slow_evaluation", seconds=200.0)
    while "from step 3" not in child.said:
        assert child.wait(0.01) is None
    child.wait(1)
    child.send(signal.SIGTERM)  # once more, while the point that was put off is measured
    assert "after step 3; saved" in child.finish(75)
    assert newest_step(out) == 3
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)
