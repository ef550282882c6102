"""Failures that a run cannot prevent, told in one sentence: a lost rank, a full disk, no memory, a killed worker."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from clipdistill.errors import ClipdistillError, Preempted, RankError, storage_error, worker_lost
from clipdistill.runtime.distributed import ProcessGroup, rank
from clipdistill.runtime.signals import Interrupted

_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|timed out waiting|broken pipe|socket", re.IGNORECASE)
_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_RESUME = "the newest checkpoint is whole: run the same command again to go on"


@dataclass
class Whereabouts:
    """Where a run is, for the sentences."""

    step: int = 0
    rows: int = 0
    """Pairs a rank encodes at a time."""
    doing: str = "starting"
    group: ProcessGroup | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.doing} at step {self.step}"


@contextlib.contextmanager
def explained(place: Whereabouts) -> Iterator[None]:
    """Turn the failures of a run into errors of one sentence, with exit codes of their own."""
    try:
        yield
    except ClipdistillError:
        raise
    except Interrupted as error:
        raise Preempted(
            f"stopped by {error} while {place}: nothing is lost, run the same command again to go on"
        ) from None
    except Exception as error:
        told = explain(error, place)
        if told is error:
            raise
        raise told from error


def explain(error: Exception, place: Whereabouts) -> Exception:
    """The error to raise for `error`: one sentence where its cause is known, else itself."""
    full = storage_error(error, f"disk full while {place}; make room: {_RESUME}")
    if full is not None:
        return full
    words = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _MEMORY in words:
        smaller = max(place.rows // 2, 1)
        return ClipdistillError(
            f"out of memory while {place} with {place.rows} pairs a rank at a time ({words[:120]}): "
            f"train.micro_batch={smaller} needs about half and keeps the whole batch's negatives; {_RESUME}"
        )
    if dist.is_initialized() and (isinstance(error, dist.DistError) or _COLLECTIVE.search(words)):
        group = place.group
        states = group.states() if group is not None else ""
        return RankError(
            f"rank {rank()}: lost the other ranks while {place}: {states or 'they do not answer'}; {_RESUME} "
            f"({words[:160]})"
        )
    return worker_lost(error, f" while {place}", f"use fewer train.workers; {_RESUME}") or error
