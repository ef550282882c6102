"""The choice of an engine: by memory first, then by what was measured to be faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipdistill.objective.engines import Engine, EngineName
from clipdistill.objective.plan import CrossEntropy, Divergence, Primitive
from clipdistill.runtime.machine import free_memory


def load_engine(name: EngineName) -> Engine:
    """The engine called `name`."""
    if name == "tiled":
        from clipdistill.objective.engines.tiled import tiled

        return tiled
    from clipdistill.objective.engines.dense import dense

    return dense


UNKNOWN_MEMORY = 4 * 2**30
"""Bytes taken to be free where the system does not tell."""

# Batch size from which tiling was measured to be the faster of the two (benchmarks/objective.py), per device type.
TILED_FROM = {"cpu": 512, "cuda": 4096}


def choose_engine(
    n: int,
    device: torch.device,
    primitives: Sequence[Primitive],
    *,
    world_size: int = 1,
    itemsize: int = 4,
    memory: int | None = None,
) -> tuple[EngineName, str]:
    """The engine for a whole batch of n rows, and the reason in words.

    memory: bytes this process may use; None asks the device. Dense is taken when its matrices fit in half of that and
    the batch is too small for tiling to be faster.
    """
    if not primitives:
        return "dense", "no term compares all pairs"
    need = dense_bytes(n, primitives, world_size=world_size, itemsize=itemsize)
    available = (free_memory(device) or UNKNOWN_MEMORY) if memory is None else memory
    if need > available // 2:
        return "tiled", f"dense would need {_gib(need)} for N={n}, more than half of the {_gib(available)} available"
    limit = TILED_FROM.get(device.type, TILED_FROM["cpu"])
    if n >= limit:
        return "tiled", f"N={n} is at least {limit}, from where tiling is the faster on {device.type}"
    return (
        "dense",
        f"N={n} is below {limit} on {device.type} and its {_gib(need)} fit in the {_gib(available)} available",
    )


def dense_bytes(n: int, primitives: Sequence[Primitive], *, world_size: int = 1, itemsize: int = 4) -> int:
    """An estimate of the bytes the dense engine keeps for one forward and backward pass over n rows.

    Per logit matrix one copy, per softmax two (log-probabilities and their gradient), per divergence two more.
    """
    logits: set[str] = set()
    softmaxes: set[tuple[str, str]] = set()
    copies = 0
    for primitive in primitives:
        if isinstance(primitive, CrossEntropy):
            logits.add(primitive.logits)
            softmaxes.add((primitive.logits, primitive.axis))
        elif isinstance(primitive, Divergence):
            logits.update((primitive.logits, primitive.target))
            softmaxes.update({(primitive.logits, primitive.axis), (primitive.target, primitive.axis)})
            copies += 2
        else:
            logits.update((primitive.logits, *primitive.targets))
            copies += 2 + len(primitive.targets)
    rows = -(-n // world_size)
    return (len(logits) + 2 * len(softmaxes) + copies) * rows * n * itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
