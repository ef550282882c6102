"""`cd.serve`: the service in a thread of this process, until it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.serve.command import HOST, check_hosts, in_thread, served_name
from clipdistill.serve.limits import ServiceLimits

if TYPE_CHECKING:
    import torch


class RunningService:
    """A service that answers at `url` until `stop()`, or until the end of a `with` block."""

    def __init__(self, model: str, url: str, held: contextlib.ExitStack) -> None:
        self.model, self.url, self._held = model, url, held

    def stop(self) -> None:
        """End it; what was accepted is answered."""
        self._held.close()

    def __enter__(self) -> RunningService:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"{self.model} at {self.url}"

    def _repr_html_(self) -> str:
        return f'{self.model} at <a href="{self.url}">{self.url}</a>'


@checked
def serve(
    model: str | Path,
    *,
    port: int = 0,
    host: str = HOST,
    allow_hosts: Sequence[str] = (),
    batch_size: int = 32,
    wait_ms: float = 5.0,
    queue: int = 256,
    timeout: float = 30.0,
    pictures: int = 64,
    texts: int = 1024,
    megabytes: int = 32,
    pixels: int = 25_000_000,
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> RunningService:
    """Answer requests for embeddings and zero-shot classification over HTTP (docs/serve.md), from a thread.

    model: the folder of an export, or any name of a model. port: 0 takes a free one. host: the address to listen on;
    allow_hosts: further names that requests may call it by. batch_size: pictures, or texts, that go through a tower
    together at most; wait_ms: milliseconds that the first of a batch waits for more; queue: pictures that may be on
    their way; timeout: seconds from a request's last byte to its answer; pictures, texts, megabytes: of one request at
    most; pixels: of one picture. threads: of the towers (None: torch's). device: None is a GPU where there is one.

    Returns a RunningService: url, and stop(); as a context manager it stops at the end. Raises InputError for a model
    that is none, numbers that do not fit together, and an address that is taken.
    """
    limits = ServiceLimits(
        batch_size=batch_size, wait_ms=wait_ms, queue=queue, timeout=timeout, pictures=pictures, texts=texts,
        megabytes=megabytes, pixels=pixels,
    )  # fmt: skip
    if not 0 <= port <= 65535:
        raise InputError(f"serve: port must be between 0 and 65535, got {port}")
    check_hosts(allow_hosts, "serve: allow_hosts")
    name = served_name(str(model))
    check_model_name(name)
    held = contextlib.ExitStack()
    running = in_thread(name, limits, host=host, port=port, names=allow_hosts, threads=threads, device=device)
    _, found, bound = held.enter_context(running)
    return RunningService(name, f"http://{f'[{found}]' if ':' in found else found}:{bound}/", held)
