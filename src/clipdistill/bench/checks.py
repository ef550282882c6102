"""Settings that no benchmark can have, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from clipdistill.errors import InputError, nearest
from clipdistill.models.known import TOWERS


def check_settings(
    models: Collection[str],
    batch_sizes: Sequence[int] = (1,),
    towers: Sequence[str] = TOWERS,
    seconds: float = 2.0,
    rounds: int = 10,
    reference: str | None = None,
    threads: int | None = None,
) -> None:
    """Raise InputError for settings of `throughput` that cannot be measured with these names of models."""
    if not models:
        raise InputError("a benchmark needs at least one model")
    for tower in towers:
        if tower not in TOWERS:
            raise InputError(f"unknown tower '{tower}'{nearest(tower, TOWERS)}")
    if not towers:
        raise InputError("a benchmark needs at least one tower: image, text or both")
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes must be whole numbers above 0, got {list(batch_sizes)}")
    if not 0 < seconds < 3600:
        raise InputError(f"seconds must be above 0 and below 3600, got {seconds}")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if rounds < 3:
        raise InputError(f"at least 3 rounds are needed to see a drift, got {rounds}")
    if reference is not None and reference not in models:
        raise InputError(f"unknown reference model '{reference}'{nearest(reference, models)}")
    for name in models:
        if "|" in name:
            raise InputError(f"a model's name in a benchmark may not contain '|': {name}")
