"""What a figure was measured on: the device, its libraries, and how busy it was."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from clipdistill.runtime.files import digest_of
from clipdistill.runtime.machine import cpu_count

LIBRARIES = (
    "clipdistill", "torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "onnxruntime", "openvino"
)  # fmt: skip


def describe_device(device: torch.device) -> dict[str, Any]:
    """Label, facts and a fingerprint: figures may share an axis only where the fingerprint is equal.

    The number of threads belongs to the fingerprint: a processor with two threads is another device than with sixteen.
    """
    facts: dict[str, Any]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "kind": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        label = properties.name
    else:
        threads = torch.get_num_threads()
        facts = {
            "kind": device.type,
            "name": processor_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
            "cores": cpu_count(),
        }
        label = f"{facts['name']}, {threads} thread{'s' if threads != 1 else ''}"
    return {
        "label": label,
        "fingerprint": digest_of(facts)[:12],
        **facts,
        "system": f"{platform.system()} {platform.release()}",
    }


def processor_name() -> str:
    """The processor's trade name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def describe_libraries(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of the libraries that do the work, where installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["torch"] = torch.__version__  # with its build: +cpu and +cu126 are different libraries
    return found


def busy_warning(seconds: float = 0.3) -> str | None:
    """A sentence when other work keeps this machine's cores busy while we sleep for a moment; None where unknown.

    Not the load average, which still remembers our own work of the last minute (the demo has just trained).
    """
    before = _processor_ticks()
    time.sleep(seconds)
    after = _processor_ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    busy = 1 - (after[0] - before[0]) / (after[1] - before[1])
    if busy > 0.25:
        return (
            f"other work kept {100 * busy:.0f} % of this machine's processors busy when the measurement began: "
            "ratios between models hold, absolute figures are too low"
        )
    return None


def _processor_ticks() -> tuple[int, int] | None:
    """(idle, all) ticks of all processors since the start of a Linux system."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    values = [int(part) for part in path.read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return values[3] + values[4], sum(values[:8])
