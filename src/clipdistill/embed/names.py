"""What runs the towers of an encoder, by name; light, so that commands can offer it without loading anything."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

from clipdistill.errors import InputError, nearest

EngineName = Literal["auto", "torch", "compile", "onnx", "openvino"]
ENGINES: tuple[str, ...] = get_args(EngineName)
NEEDS = {
    "onnx": ("export", ("clipdistill.export", "onnx", "onnxscript", "onnxruntime")),
    "openvino": ("openvino", ("clipdistill.export", "onnx", "onnxscript", "openvino")),
}
"""The extra and the packages that an engine needs."""
FORMATS = {"onnx": ("float32",), "openvino": ("float32", "bfloat16")}
"""Number formats of the engines that have not all."""


class _Choices(tuple[str, ...]):
    """Engines; with "ray" as the last also what `on_cluster` reads."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or ("ray" in self[-1:] and on_cluster(str(name), typed=True) is not None)


def add_engine(add: Callable[..., Any], default: str | None = "torch", cluster: bool = True) -> None:
    """The option --engine, the same for all commands that encode; cluster: whether many machines can do the work."""
    spread = "; ray, ray:onnx, ray:workers=8: on a Ray cluster (docs/scaling.md)" if cluster else ""
    add(
        "--engine",
        choices=_Choices((*ENGINES, "ray") if cluster else ENGINES),
        default=default,
        help=f"what runs the towers; auto: the fastest installed, timed where the set pays for it{spread} "
        "(default: torch)",
    )


def on_cluster(engine: str, typed: bool = False) -> Any:
    """What "ray", "ray:onnx" or "ray:onnx,workers=8" asks for (ray_engine/names.py), None for any other engine.

    typed: only look at the words. Raises InputError for other words after the colon, and where ray is not installed.
    """
    if engine.partition(":")[0] != "ray":
        return None
    return import_module("clipdistill.ray_engine.names").read(engine, typed)


def installed(engine: str) -> bool:
    """Whether all that an engine needs can be imported."""
    return all(find_spec(package) is not None for package in NEEDS.get(engine, ("", ()))[1])


def check_engine(engine: str, dtype: str, device: str) -> None:
    """Raise InputError for an engine that is unknown, not installed, or cannot run so. dtype: its full name."""
    if engine not in ENGINES:
        raise InputError(f"unknown engine '{engine}'{nearest(engine, ENGINES)}")
    if dtype not in FORMATS.get(engine, (dtype,)):
        raise InputError(f"engine '{engine}' runs in {' and '.join(FORMATS[engine])} only, not in {dtype}")
    if engine in NEEDS and device != "cpu":
        raise InputError(f"engine '{engine}' runs on the CPU; on {device} take torch or compile")
    if not installed(engine):
        extra, packages = NEEDS[engine]
        missing = next(package for package in packages if find_spec(package) is None)
        raise InputError(f"engine '{engine}' needs the package '{missing}': pip install 'clipdistill[{extra}]'")
