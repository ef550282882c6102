"""What `--engine ray...` says: ray, ray:onnx, ray:workers=8, ray:onnx,workers=8,cpus=4, ray:device=cpu."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from clipdistill.embed.names import ENGINES
from clipdistill.errors import InputError, MissingExtraError, nearest


@dataclass(frozen=True)
class RayEngine:
    """towers: what runs them in each worker; workers: how many (None: what the cluster has room for); cpus: cores, and
    threads, of each; device: "cpu" or "cuda" (None: the cluster's GPUs, where it has some)."""

    towers: str = "torch"
    workers: int | None = None
    cpus: int = 1
    device: str | None = None


_SETTINGS = ("workers", "cpus", "device")


def read(engine: str, typed: bool = False) -> RayEngine:
    """Raises InputError for words that mean nothing after "ray:", and, unless `typed`, where ray is not installed."""
    towers: list[str] = []
    given: dict[str, Any] = {}
    for word in engine.split(":", 1)[1].split(",") if ":" in engine else []:
        name, separator, value = (text.strip() for text in word.partition("="))
        if not separator:
            towers.append(name)
            continue
        if name not in _SETTINGS:
            raise InputError(f"engine '{engine}': no setting '{name}'{nearest(name, _SETTINGS)}")
        if name == "device" and value not in ("cpu", "cuda"):
            raise InputError(f"engine '{engine}': the device of Ray's workers is cpu or cuda")
        if name != "device" and not (value.isascii() and value.isdigit() and len(value) < 7 and int(value)):
            raise InputError(f"engine '{engine}': {name} must be a whole number from 1 on")
        if name in given:
            raise InputError(f"engine '{engine}': {name} stands twice")
        given[name] = value if name == "device" else int(value)
    known = [name for name in ENGINES if name != "auto"]
    if towers == ["auto"]:
        raise InputError(f"engine '{engine}': workers could choose differently: name one of {', '.join(known)}")
    if len(towers) > 1 or not {*towers} <= {*known}:
        wrong = next((name for name in towers if name not in known), towers[-1])
        hint = nearest(wrong, known) if wrong not in known else "; one engine runs the towers"
        raise InputError(f"engine '{engine}': '{wrong}' cannot stand here{hint}: write ray, ray:onnx or ray:workers=8")
    if not typed and find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", f"engine '{engine}'")
    return RayEngine(towers[0] if towers else "torch", **given)
