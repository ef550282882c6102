"""From the name of data on other machines to its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from clipdistill.errors import InputError
from clipdistill.remote.copies import local_cache
from clipdistill.remote.path import RemotePath
from clipdistill.remote.pipe import PipePath, allow_pipe


def typed(arguments: Sequence[str], folder: Sequence[str], size: Sequence[str]) -> None:
    """What the command line says: commands of pipes that may be run, --local-cache, --local-cache-size."""
    allow_pipe(*arguments)
    local_cache(*(values[-1] if values else None for values in (folder, size)))


def remote_path(name: str, pattern: Any = None) -> Any:
    """The path behind a URL, a `pipe:`, or (file://) on this machine. pattern: the path that the name was made from."""
    if name.lower().startswith("pipe:"):
        return PipePath(name, allowed=isinstance(pattern, PipePath))
    scheme, _, rest = name.partition("://")
    if scheme.lower() in ("file", "local"):
        return Path(unquote(rest)).expanduser()
    if any(ord(character) < 32 for character in name) or not rest.strip("/"):
        raise InputError(f"{name!r} is not the URL of a file or folder")
    return RemotePath(name, opened=getattr(pattern, "_opened", None))
