"""Faults put into a child process before its command runs (tests/reliability/zygote.py)."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import torch


def nan_gradient(step: int, rank: int = 0) -> None:
    """One rank's gradients are NaN at one step (0-based)."""
    from clipdistill.train import distil

    original = distil.forward_backward

    def poisoned(towers: Any, *arguments: Any, **settings: Any) -> Any:
        output = original(towers, *arguments, **settings)
        if settings["seed"][1:] == (step, rank):
            next(p for p in towers.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return output

    distil.forward_backward = poisoned


def grown_weights(step: int) -> None:
    """After one step (0-based) the student's matrices are as large as a rate far too high would make them."""
    import torch

    from clipdistill.train import distil

    original, seen = distil.Distillation.after_step, [0]

    def grown(self: Any, updated: bool) -> None:
        original(self, updated)
        if seen[0] == step:
            with torch.no_grad():
                for parameter in self.setup.student.module.parameters():
                    if parameter.ndim > 1:
                        parameter.fill_(1e30)
        seen[0] += 1

    distil.Distillation.after_step = grown  # type: ignore[method-assign]


def stall(step: int, rank: int, seconds: float) -> None:
    """One rank does nothing for a while before a step."""
    from clipdistill.train import distil

    original = distil.forward_backward

    def late(*arguments: Any, **settings: Any) -> Any:
        if settings["seed"][1:] == (step, rank):
            time.sleep(seconds)
        return original(*arguments, **settings)

    distil.forward_backward = late


def die(step: int, rank: int) -> None:
    """One rank is killed at one step."""
    import signal

    from clipdistill.train import distil

    original = distil.forward_backward

    def killed(*arguments: Any, **settings: Any) -> Any:
        if settings["seed"][1:] == (step, rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    distil.forward_backward = killed


def slow_evaluation(seconds: float) -> None:
    """The points of the curve take long on rank 0, while the others wait."""
    from clipdistill.train.distil import Distillation

    original = Distillation.evaluate

    def slow(task: Any) -> Any:
        time.sleep(seconds)
        return original(task)

    Distillation.evaluate = slow  # type: ignore[method-assign]


def small_files(bytes: int) -> None:
    """No file of this process may grow beyond so many bytes (the system refuses the write, as on a full disk)."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))


def full_disk(name: str, skip: int = 0) -> None:
    """Opening a file whose name begins with `name` for writing fails as on a full disk, after `skip` times."""
    import pathlib

    original, seen = pathlib.Path.open, [0]

    def refused(self: pathlib.Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if self.name.startswith(name) and set(mode) & set("wa"):
            seen[0] += 1
            if seen[0] > skip:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *arguments, **settings)

    pathlib.Path.open = refused  # type: ignore[method-assign]


def no_memory(step: int) -> None:
    """The device has no memory left at one step."""
    from clipdistill.train import distil

    original = distil.forward_backward

    def exhausted(*arguments: Any, **settings: Any) -> Any:
        if settings["seed"][1] == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*arguments, **settings)

    distil.forward_backward = exhausted


def note_batches(path: str) -> None:
    """Each rank appends the step, its rank and the keys of every batch it trains on to a file of JSON lines."""
    import json

    from clipdistill.runtime.distributed import rank
    from clipdistill.train.distil import Distillation

    original = Distillation.gradients

    def noted(task: Any, step: int, batch: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps([step, rank(), batch.keys]) + "\n")
        return original(task, step, batch)

    Distillation.gradients = noted  # type: ignore[method-assign]


def stop_at(step: int) -> None:
    """The process asks itself to stop in the middle of a step, always at the same place."""
    import signal

    from clipdistill.train import distil

    original = distil.forward_backward

    def stopping(*arguments: Any, **settings: Any) -> Any:
        if settings["seed"][1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **settings)

    distil.forward_backward = stopping


def nan_pixels(step: int) -> None:
    """The pictures of one step hold NaN."""
    from clipdistill.train import distil

    original = distil.forward_backward

    def poisoned(towers: Any, objective: Any, images: Any, *arguments: Any, **settings: Any) -> Any:
        if settings["seed"][1] == step:
            images = torch.full_like(images, float("nan"))
        return original(towers, objective, images, *arguments, **settings)

    distil.forward_backward = poisoned


def no_network() -> None:
    """Every attempt to look up or reach another machine fails."""
    import socket

    def unreachable(*arguments: Any, **settings: Any) -> Any:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    socket.socket.connect = unreachable  # type: ignore[method-assign]
    socket.getaddrinfo = unreachable
