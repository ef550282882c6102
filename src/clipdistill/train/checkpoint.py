"""Checkpoints that are either whole or absent: safetensors and JSON in a folder that appears by one rename.

    checkpoints/step-00000123/
        student/model.safetensors, student/model.json    an ordinary model folder
        objective.safetensors                            the objective's scales and projections
        optimizer.safetensors                            AdamW's moments
        masks.safetensors                                masks and multipliers, while there are any
        state.json                                       counters, configuration, sizes and checksums of the files

No random-generator state is stored: everything random is a function of (seed, step, rank, position).
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.errors import InputError, StorageError, storage_error
from clipdistill.models import ClipModel, save_model

FORMAT = 1
MASKS = "masks.safetensors"
_PREFIX = "step-"
_KEPT = "the last good checkpoint is kept: make room and run the same command again to resume"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def masked(self) -> bool:
        """Whether its student still had masks."""
        return MASKS in self.state["files"]


def save_checkpoint(
    root: Path,
    student: ClipModel,
    objective: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    masks: torch.nn.Module | None = None,
) -> Path:
    """Write checkpoint `state["step"]` below `root` and remove all but the newest `keep`.

    A crash at any moment leaves either the complete new folder or none of it. Raises StorageError when the disk is too
    small for it, before anything is written, or when writing fails all the same; older checkpoints are kept then.
    """
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    final = root / f"{_PREFIX}{state['step']:08d}"
    moments, groups = _pack_optimiser(optimiser)
    tensors = {"objective.safetensors": dict(objective.state_dict()), "optimizer.safetensors": moments}
    if masks is not None:
        tensors[MASKS] = dict(masks.state_dict())
    _check_space(root, tensors, student.module)
    temporary = root / f".writing-{final.name}"
    try:
        temporary.mkdir()
        _write(temporary, student, tensors, {**state, "optimizer_groups": groups})
        if final.exists():  # a damaged one that was passed over when the run was resumed
            final.rename(root / f".writing-replaced-{final.name}")
        temporary.rename(final)
        _flush(root)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = storage_error(error, _KEPT)
        if full is None:
            raise
        raise full from error
    remove_leftovers(root)
    # later steps than this one can only be damaged: they were passed over when the run was resumed
    past = [folder for folder in sorted(root.glob(f"{_PREFIX}*")) if folder.name <= final.name]
    for old in {*root.glob(f"{_PREFIX}*")} - {*past[-keep:]}:
        shutil.rmtree(old)
    return final


def _write(folder: Path, student: ClipModel, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """The content of a checkpoint, made durable; state.json is the last file."""
    save_model(student, folder / "student")
    for name, content in tensors.items():
        save_file({k: v.detach().contiguous().cpu() for k, v in content.items()}, folder / name)
    files = {str(p.relative_to(folder)): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    described = {"format": FORMAT, **state, "files": files}
    (folder / "state.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    for path in sorted(folder.rglob("*")):
        _flush(path)
    _flush(folder)


class UnknownFormatError(InputError):
    """A checkpoint of another version of this package: whole, so not to be passed over as a damaged one."""


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint below `root`, and a sentence for each newer one that had to be passed over.

    Raises InputError when one in the way is not damaged but in a format of another version.
    """
    rejected: list[str] = []
    for folder in sorted(root.glob(f"{_PREFIX}*"), reverse=True):
        try:
            return read_checkpoint(folder), rejected
        except UnknownFormatError:
            raise
        except InputError as error:
            rejected.append(str(error))
    return None, rejected


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, its files checked against the sizes and checksums written with them."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UnknownFormatError(
                f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}; "
                "resume it with the version that wrote it"
            )
        for name, (size, checksum) in state["files"].items():
            path = folder / name
            if not path.is_file() or [path.stat().st_size, _digest(path)[1]] != [size, checksum]:
                raise InputError(f"{path}: missing or damaged, so the checkpoint is not used")
        if folder.name != f"{_PREFIX}{int(state['step']):08d}":
            raise InputError(f"{folder}: its state.json is that of step {state['step']}")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder}: not a complete checkpoint (state.json: {error})") from error
    return Checkpoint(folder, state)


def restore(
    checkpoint: Checkpoint,
    module: torch.nn.Module,
    objective: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    masks: torch.nn.Module | None = None,
) -> None:
    """Fill the student, the objective, the optimiser and the masks from a checkpoint; InputError for another shape."""
    parts = [
        ("student", module, load_file(checkpoint.folder / "student" / "model.safetensors")),
        ("objective", objective, load_file(checkpoint.folder / "objective.safetensors")),
    ]
    if masks is not None:
        parts.append(("masks", masks, load_file(checkpoint.folder / MASKS)))
    for name, target, content in parts:
        try:
            target.load_state_dict(content)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(
                f"{checkpoint.folder}: its {name} has another architecture than this run's ({first})"
            ) from error
    _unpack_optimiser(
        optimiser, load_file(checkpoint.folder / "optimizer.safetensors"), checkpoint.state["optimizer_groups"]
    )


def remove_leftovers(root: Path) -> None:
    """Delete what a killed writer left half-written."""
    for path in root.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _pack_optimiser(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[list[int]]]:
    state = optimiser.state_dict()
    tensors = {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, [list(group["params"]) for group in state["param_groups"]]


def _unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[list[int]]) -> None:
    current = optimiser.state_dict()
    if [list(g["params"]) for g in current["param_groups"]] != groups:
        raise InputError("the checkpoint's optimiser has other parameter groups than this run's")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _check_space(root: Path, tensors: dict[str, dict[str, Tensor]], module: torch.nn.Module) -> None:
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    needed += sum(t.numel() * t.element_size() for t in module.state_dict().values())
    needed = int(needed * 1.05) + 1_000_000
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StorageError(
            f"{root}: a checkpoint needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free: {_KEPT}"
        )


def _digest(path: Path) -> list[int]:
    """Size and CRC-32 of a file: finds truncation and bit flips, not an attacker."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


def _flush(path: Path) -> None:
    """Make a file or folder durable before the rename that publishes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, PermissionError):
        return  # a folder cannot be opened on some systems; the rename still orders the writes there
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
