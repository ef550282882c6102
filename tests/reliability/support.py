"""Runs as processes that can be killed, and what is compared between a disturbed run and an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.train.checkpoint import newest_checkpoint
from tests.conftest import REPOSITORY

STEPS = 6
LIMIT = 240.0
"""Seconds after which a process that should have ended counts as hanging (machines are busy at times)."""


class Launcher:
    """Starts commands of `clipdistill` in processes forked from one that has imported everything."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.count = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "1000",
            "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.zygote"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: object,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        fault: str | None = None,
        **settings: Any,
    ) -> Child:
        """Run `clipdistill ARGUMENTS`, or a program FILE.py, in `folder`; a fault (of faults.py) is put in first."""
        self.count += 1
        log = self.logs / f"{self.count:04d}.txt"
        request = {"start": [str(word) for word in arguments], "log": str(log), "environment": environment or {}}
        answer = self.ask(**request, folder=str(folder or ""), fault=fault, settings=settings)
        return Child(self, answer["pid"], log)

    def warm(self, *arguments: object) -> None:
        """Run a command in the parent itself, so that its children find everything loaded; no gradients."""
        assert self.ask(warm=[str(word) for word in arguments]) == {"code": 0}

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)


@dataclass
class Child:
    """One running command."""

    launcher: Launcher
    pid: int
    log: Path
    code: int | None = None

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code (negative: the signal), None when it still runs after so many seconds."""
        if self.code is None:
            self.code = self.launcher.ask(wait=self.pid, seconds=seconds)["code"]
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        if not self.log.exists():  # it ended before it could say anything
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def finish(self, code: int = 0) -> str:
        """Wait for this exit code; returns what was said."""
        found = self.wait()
        if found is None:
            self.send(signal.SIGKILL)
        assert found == code, f"exit code {found} instead of {code}:\n{self.said[-3000:]}"
        return self.said


def ranks(launcher: Launcher, count: int, *arguments: object, fault: str | None = None, **settings: Any) -> list[Child]:
    """The same command as `count` ranks on this machine, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        launcher.start(
            *arguments,
            environment={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            fault=fault,
            **settings,
        )
        for number in range(count)
    ]


def training(models: Path, out: Path, *settings: str) -> list[str]:
    """`clipdistill train` for a run of some steps with tiny models that writes a checkpoint at every step."""
    return [
        "train", "--recipe", "clip-rd", "--student", "tiny", "--student-weights", str(models / "student"),
        "--teacher", str(models / "teacher"), "--data", "scenes:train", "--validation", "scenes:val", "--out", str(out),
        "--device", "cpu", "data.size=20", "validation.size=8", f"train.steps={STEPS}",
        "train.batch_size=8", "train.warmup_steps=1", "train.precision=fp32", "train.log_every=2",
        "train.evaluate_every=3", "train.checkpoint_every=1", "preflight.allow_weak_teacher=true",
        "preflight.samples=8", *settings,
    ]  # fmt: skip


TIMING = {"seconds", "samples_per_second", "data_wait"}


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_lines(path)]


def require_same_run(one: Path, two: Path, step: int = STEPS, *, logs: bool = True) -> None:
    """Weights, objective, optimiser, counters and logs of two finished runs are equal to the bit."""
    last = f"checkpoints/step-{step:08d}"
    files = ["student/model.safetensors", *(f"{last}/{n}.safetensors" for n in ("objective", "optimizer"))]
    for name in files:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (one, two)]
    volatile = {"files", "sha256", "seconds", "window", "evaluation_due"}
    counters = [{k: v for k, v in state.items() if k not in volatile} for state in states]
    assert counters[0] == counters[1]
    if logs:
        for log in ("log.jsonl", "eval.jsonl"):
            if log == "eval.jsonl" and not (one / log).exists():  # measured nothing
                assert not (two / log).exists()
                continue
            assert lines(one / log) == lines(two / log), log
            assert all(json.loads(text) for text in (two / log).read_text().splitlines())


def newest_step(folder: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    return None if checkpoint is None else checkpoint.step


def wait_for(path: Path, pattern: str, child: Child, count: int = 1) -> bool:
    """Wait until `count` new things below `path` have fitted `pattern`; False when the child ended before."""
    before = {found.stat().st_ino for found in path.glob(pattern)}
    new: set[int] = set()
    while child.wait(0) is None:
        for found in path.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                new.add(found.stat().st_ino)
        if len(new - before) >= count:
            return True
        time.sleep(0.001)
    return False
