"""Whether a name can be a model's, told in a fraction of a second, without torch; load.py reads what is behind it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.models.inherited import PREFIX, parse
from clipdistill.models.known import (
    HELD,
    SUFFIX,
    held,
    known_architectures,
    near,
    require_pretrained,
    shipped_models,
    timm_networks,
)
from clipdistill.models.towers.names import PREFIX as TOWERS
from clipdistill.models.towers.names import check_towers_name
from clipdistill.registry import STUDENTS, TEACHERS

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
KINDS = ("hf", "timm", "local-dir", *SUFFIX)
"""Words before the colon of a name, besides inherit:, towers:, module: and those of plug-ins' teachers."""
_PREFIXES = (*KINDS, PREFIX[:-1], TOWERS[:-1])


def check_model_name(name: str | Path) -> None:
    """Raise InputError, one sentence with the nearest name, when `name` can be no model; weights are not looked for."""
    name = str(name)
    kind, colon, rest = name.partition(":")
    if name.startswith(HELD):
        held(name)
    elif name.startswith(PREFIX):
        source = parse(name).source
        if source is not None:
            check_model_name(source)
    elif name.startswith(TOWERS):
        for model in check_towers_name(name):
            check_model_name(model)
    elif colon and (kind in KINDS or kind in TEACHERS):
        _check_kind(kind, rest, name)
    elif rest.startswith("//"):
        raise InputError(f"'{name}': models are read from this machine or a hub (hf:owner/name): fetch it first")
    elif colon and not Path(name).exists() and near(kind, _PREFIXES):
        raise InputError(f"'{name}': no model is named with  {kind}:{near(kind, _PREFIXES)}")
    elif "@" in name:
        architecture, _, file = name.partition("@")
        if architecture not in known_architectures():
            raise InputError(
                f"unknown student or architecture '{architecture}'{near(architecture, known_architectures())}"
            )
        if not Path(file).expanduser().is_file():
            raise InputError(f"{Path(file).expanduser()}: no such file")
    elif name not in shipped_models() and name not in known_architectures() and not Path(name).expanduser().exists():
        architecture, slash, tag = name.partition("/")
        if slash and tag and "/" not in tag and not _looks_like_path(name):
            require_pretrained(architecture, tag)
        elif _looks_like_path(name):
            raise InputError(f"{name}: no such file or folder")
        else:
            raise InputError(
                f"'{name}' is no model: not an architecture, a student or a path{near(name, known_architectures())}"
            )


def check_student_name(name: str) -> None:
    """The same for a student with random weights, one inherited or joined, or a module that the program holds."""
    if name.startswith((HELD, PREFIX, TOWERS)) or name in STUDENTS:
        check_model_name(name)
    elif name not in known_architectures():
        raise _unknown(name)


def _unknown(name: str) -> InputError:
    return InputError(f"unknown student or architecture '{name}'{near(name, known_architectures())}")


def check_teacher_names(names: Iterable[str]) -> None:
    """The same for a run's teachers, caches included."""
    for name in names:
        kind, colon, rest = name.partition(":")
        if not (colon and kind == "cache"):
            check_model_name(name)
        elif not Path(rest).expanduser().exists():
            raise InputError(
                f"{name}: no such folder: fill one with  clipdistill cache --teacher T --data D --out {rest}"
            )


def _check_kind(kind: str, rest: str, name: str) -> None:
    if kind == "timm":
        base = rest.split(".")[0]
        if timm_networks() and base not in timm_networks():
            raise InputError(f"'{name}': timm has no architecture {rest!r}{near(base, timm_networks())}")
    elif kind in ("local-dir", *SUFFIX) and not Path(rest).expanduser().is_dir():
        hint = "" if kind == "local-dir" else f": it needs a folder written by  clipdistill export --to {kind}"
        raise InputError(f"{name}: no such folder{hint}")
    elif kind == "hf" and not Path(rest).is_dir() and (rest.count("/") != 1 or not all(rest.split("/"))):
        raise InputError(f"'{name}': expected  hf:owner/name  or  hf:  and the path of a folder")


def _looks_like_path(name: str) -> bool:
    first = name.split("/")[0]
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.endswith(WEIGHT_SUFFIXES)
        or name.count("/") > 1
        or Path(first).is_dir()
    )
