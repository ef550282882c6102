"""The few collective operations the loop needs; on one process each is the identity.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; NCCL is used on CUDA, gloo elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from clipdistill.errors import InputError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or this rank's CUDA device when there is one, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device '{name}': no CUDA device is visible; leave the device out to run on the CPU")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name)


class ProcessGroup(AbstractContextManager["ProcessGroup"]):
    """Joins the process group that torchrun describes, if any, and leaves it at the end."""

    def __init__(self, device: torch.device, timeout: timedelta = timedelta(minutes=5)) -> None:
        self.owns = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            self.owns = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.owns:
            dist.destroy_process_group()


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
    """Replace each gradient by its mean over the ranks; a parameter without one on some rank counts as zero there.

    For the objective's parameters, which take part outside of DistributedDataParallel's forward.
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.requires_grad:
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
