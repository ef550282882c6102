"""What this process may use: a device, memory, processors. Limits of control groups (containers, batch systems) count.

Light: torch is imported only where a device is asked about.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdistill.errors import InputError

if TYPE_CHECKING:
    import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device asked for, or this rank's CUDA device (LOCAL_RANK) when there is one, Apple's GPU, else the CPU.

    Raises InputError for a name that is none and for a GPU that this machine has not.
    """
    import torch

    apple = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device '{name}': write cpu, cuda, cuda:1 or mps") from error
    if device.type == "mps" and (not apple or device.index):
        raise InputError(f"device '{name}': no such Apple GPU is visible; leave the device out to run on what there is")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError(f"device '{name}': no CUDA device is visible; leave the device out to run on the CPU")
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= count:
        raise InputError(f"device '{device}': this machine has {count} CUDA devices, counted from 0")
    return device


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes free on the device (default: the CPU): CUDA's own figure, or the least of the kernel's and the groups'.

    None where that cannot be told.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device is not None and device.type == "mps":
        import torch

        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    figures = _control_group_memory()
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            figures.append(int(line.split()[1]) * 1024)
            break
    else:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            figures.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    return min(figures, default=None)


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given, so that a clock can be read."""
    import torch

    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize(*([device] if device.type == "cuda" else []))


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, for the next ones, until `return_freed_memory`.

    By default it hands them back to the system at once, and each forward and backward pass on a CPU takes hundreds of
    thousands of pages anew, a sixth of its time. Nothing is changed where the user has set glibc's own variables
    (`MALLOC_TRIM_THRESHOLD_=131072` is glibc's default), or with another allocator.
    """
    mallopt, given = getattr(_libc(), "mallopt", None), {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    if mallopt is not None and not given & os.environ.keys() and "glibc.malloc" not in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):  # fmt: skip
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _LARGEST_BLOCK)


def return_freed_memory() -> None:
    """Hand what glibc keeps back to the system."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h"""
_LARGEST_BLOCK = (1 << 31) - 1


@functools.cache
def _libc() -> Any:
    with contextlib.suppress(OSError, TypeError):
        return ctypes.CDLL(None)
    return None


def cpu_count() -> int:
    """Processors this process may keep busy: its affinity, or what the quotas of its control groups leave of it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups("cpu"):
        quota = (_lines(folder / "cpu.max") or [""])[0].split()
        if not quota:
            quota = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
            count = min(count, max(1, -(-int(quota[0]) // int(quota[1]))))
    return count


def _control_group_memory() -> list[int]:
    """What each control group above this process leaves it; pages of files that can be dropped count as free."""
    figures = []
    for folder in _control_groups("memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
        ):
            numbers = [*_lines(folder / limit), *_lines(folder / usage)]
            if len(numbers) == 2 and all(number.isdigit() for number in numbers):
                dropped = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if "inactive_file " in line]
                figures.append(max(0, int(numbers[0]) - int(numbers[1]) + max(dropped, default=0)))
    return figures


def _control_groups(kind: str) -> Iterator[Path]:
    """The folders of this process's control groups of a kind, innermost first, ending with the root's."""
    roots = {CONTROL_GROUPS: Path(), CONTROL_GROUPS / kind: Path()}
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, own = ([*line.split(":", 2), "", ""])[:3]
        if not controllers or kind in controllers.split(","):
            roots[CONTROL_GROUPS / kind if controllers else CONTROL_GROUPS] = Path(own.lstrip("/"))
    for root, group in roots.items():
        yield from (root / part for part in (group, *group.parents) if part != Path())
        yield root


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
