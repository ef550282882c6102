"""The few collective operations the loop needs; on one process each is the identity.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; NCCL is used on CUDA, gloo elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipdistill.errors import InputError, RankError

T = TypeVar("T")
_BEAT = 5.0
"""Seconds between two signs of life of rank 0 while the others wait for it."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


class ProcessGroup(AbstractContextManager["ProcessGroup"]):
    """Joins the process group that torchrun describes, if any, and leaves it at the end.

    A collective operation fails when a rank ends, or does not take part in it within `timeout`.
    """

    def __init__(self, device: torch.device, timeout: timedelta = timedelta(minutes=5)) -> None:
        self.owns = False
        self.peers: list[tuple[str, int]] = []
        """(host, process number) of each rank."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            store, own, size = _meeting_place()
            # a place of its own for each group: what an earlier one of the same processes left there (addresses of
            # closed connections) would be read again, and the ranks would wait for each other for ever
            store = dist.PrefixStore(f"clipdistill/{next(_groups)}", store)
            dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=timeout)
            self.owns = True
            self.peers = gather_lists([(socket.gethostname(), os.getpid())])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.owns:
            dist.destroy_process_group()

    def states(self) -> str:
        """What has become of the other ranks, as far as this machine can tell: 'rank 0 (process 71) has ended'."""
        here, own = socket.gethostname(), os.getpid()
        known = [
            f"rank {number} (process {process}) {_state(process)}"
            for number, (host, process) in enumerate(self.peers)
            if host == here and process != own
        ]
        elsewhere = sorted({host for host, _ in self.peers if host != here})
        return "; ".join(known + [f"see also the ranks on {host}" for host in elsewhere])


_groups = itertools.count()


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store that torchrun's ranks share, this rank and how many there are; joined once in a process."""
    from torch.distributed.rendezvous import rendezvous

    store, own, size = next(rendezvous("env://"))
    return store, own, size


def _state(process: int) -> str:
    """What a process on this machine is doing."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "has ended" if Path("/proc/self").exists() else "does not answer"
    return {"Z": "has ended", "X": "has ended", "T": "is suspended"}.get(state, "is running but does not answer")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def broadcast_module(module: torch.nn.Module) -> None:
    """Every parameter and buffer of `module` becomes rank 0's."""
    if dist.is_initialized():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks; a parameter without one on some rank counts as zero there, and
    one without any stays so: an optimiser passes it over, as it does in one process.

    For the objective's parameters, which take part outside of DistributedDataParallel's forward.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not dist.is_initialized() or not trained:
        return
    there = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    there = there.to(trained[0].device)
    dist.all_reduce(there)
    for parameter, count in zip(trained, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def gather_lists(values: Sequence[Any]) -> list[Any]:
    """The items of every rank's list (plain data), in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return list(values)
    boxes: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(boxes, list(values))
    return [item for box in boxes for item in box]


def on_main(work: Callable[[], T], timeout: float) -> T | None:
    """`work()` on rank 0 (its result there, None elsewhere), however long it takes; the others wait for the end.

    Rank 0 gives signs of life, more often than the `timeout` (seconds) of collective operations, so that waiting never
    runs into it while rank 0 lives, and ends when it does not. Raises RankError on the others when `work` raised.
    """
    if not dist.is_initialized():
        return work()
    if not is_main():
        while (word := _beat(0)) == _WORKING:
            pass
        if word == _FAILED:
            raise RankError(f"rank {rank()}: rank 0 failed, so this rank stops too; rank 0 says why")
        return None
    ended, outcome = threading.Event(), [_FAILED]

    def beats() -> None:
        while not ended.wait(min(_BEAT, timeout / 4)):
            _beat(_WORKING)
        _beat(outcome[0])

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        result = work()
        outcome[0] = _DONE
        return result
    finally:
        ended.set()
        thread.join()


_WORKING, _DONE, _FAILED = 1, 2, 3


def _beat(word: int) -> int:
    """Rank 0's word, on every rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.tensor(word, device=device)
    dist.broadcast(value, src=0)
    return int(value.item())


def agree(work: Callable[[], T]) -> T:
    """`work()` on every rank. Raises the first rank's InputError on all of them when it fails on one."""
    problems: list[str] = []
    result: list[T] = []
    try:
        result.append(work())
    except InputError as error:
        if not dist.is_initialized():
            raise
        problems.append(str(error))
    problems = gather_lists(problems)
    if problems:
        raise InputError(problems[0])
    return result[0]
