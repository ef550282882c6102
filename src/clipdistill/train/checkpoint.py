"""Checkpoints that are either whole or absent: safetensors and JSON in a folder that appears by one rename.

    checkpoints/step-00000123/
        student/model.safetensors, student/model.json    an ordinary model folder (of a distillation)
        objective.safetensors                            the objective's scales and projections
        optimizer.safetensors                            the optimiser's moments
        average.safetensors                              the running average of the student's weights, if there is one
        loss_scale.safetensors                           the factor of float16 losses, with train.precision=fp16
        masks.safetensors                                masks and multipliers, while there are any
        network.safetensors                              of a region teacher
        state.json                                       counters, checksums of the files and of itself

No random-generator state is stored: everything random is a function of (seed, step, rank, position).
A run goes on while one is written (`CheckpointWriter`): what it holds is copied first.
"""

from __future__ import annotations

import copy
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.errors import InputError, StorageError, storage_error
from clipdistill.models import ClipModel
from clipdistill.models.save import model_writer
from clipdistill.runtime.files import read_json, sync, write_json
from clipdistill.runtime.machine import free_memory

FORMAT = 2
"""2: state.json has a checksum of its own; format 1 is read too."""
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


def save_checkpoint(
    root: Path,
    student: ClipModel | None,
    modules: Mapping[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `state["step"]` below `root` and remove all but the newest `keep`.

    modules: by the names of their files. A crash at any moment leaves either the complete new folder or none of it.
    Raises StorageError when the disk is too small for it, before anything is written, or when writing fails all the
    same; older checkpoints are kept then.
    """
    return _prepared(root, student, modules, optimiser, state, keep, copied=False)()


class CheckpointWriter:
    """Writes the checkpoints below `root` behind the steps of a run, one at a time, keeping the newest `keep`."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._thread: threading.Thread | None = None
        self._outcome: Path | BaseException | None = None

    def start(
        self,
        student: ClipModel | None,
        modules: Mapping[str, torch.nn.Module],
        optimiser: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Take a copy of what `save_checkpoint` would write and begin to write it; `finished` tells how that ended.

        Where memory is too small for a copy it is written here and now. Raises StorageError as `save_checkpoint` does
        before anything is written. The last one must have been finished.
        """
        assert self._thread is None
        free, needed = free_memory(), _bytes_of(student, modules, optimiser)
        copied = free is None or 2 * needed < free
        write = _prepared(self._root, student, modules, optimiser, state, self._keep, copied=copied)

        def work() -> None:
            try:
                self._outcome = write()
            except BaseException as error:
                self._outcome = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        if not copied:
            self._thread.join()

    @property
    def done(self) -> bool:
        """Whether one that was started has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def finished(self) -> Path | None:
        """Wait for the one being written: its folder; None when there is none. Raises what stopped the writing."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome = None, self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _prepared(
    root: Path,
    student: ClipModel | None,
    modules: Mapping[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    *,
    copied: bool,
) -> Callable[[], Path]:
    """A function that writes the checkpoint; copied: as everything is now, whatever becomes of it until then."""
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    _check_space(root, _bytes_of(student, modules, optimiser))
    moments, groups = _pack_optimiser(optimiser)
    tensors = {f"{name}.safetensors": dict(module.state_dict()) for name, module in modules.items()}
    tensors["optimizer.safetensors"] = moments
    tensors = {
        file: {name: t.detach().to("cpu", copy=copied).contiguous() for name, t in content.items()}
        for file, content in tensors.items()
    }
    described = copy.deepcopy({**state, "optimizer_groups": groups, "optimizer_steps": _steps(optimiser)})
    write_student = None if student is None else model_writer(student)
    return lambda: _replace(root, write_student, tensors, described, keep)


def _replace(
    root: Path,
    write_student: Callable[[Path], None] | None,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """The folder of the step, whole; older ones than the newest `keep` are removed."""
    final = root / f"{_PREFIX}{state['step']:08d}"
    temporary = root / f".writing-{final.name}"
    try:
        temporary.mkdir()
        _write(temporary, write_student, tensors, state)
        if final.exists():  # a damaged one that was passed over when the run was resumed
            final.rename(root / f".writing-replaced-{final.name}")
        temporary.rename(final)
        sync(root)
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
        shutil.rmtree(old.rename(root / f".writing-removed-{old.name}"))  # at once for those who read it
    return final


def _write(
    folder: Path,
    write_student: Callable[[Path], None] | None,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> None:
    """The content of a checkpoint, made durable; state.json is the last file."""
    if write_student is not None:
        write_student(folder / "student")
    for name, content in tensors.items():
        save_file(content, folder / name)
    files = {str(p.relative_to(folder)): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / "state.json", {"format": FORMAT, **state, "files": files}, checked=True)
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


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
    state = _read_state(folder / "state.json")
    try:
        for name, (size, checksum) in state["files"].items():
            path = folder / name
            if not path.is_file() or [path.stat().st_size, _digest(path)[1]] != [size, checksum]:
                raise InputError(f"{path}: missing or damaged, so the checkpoint is not used")
        if folder.name != f"{_PREFIX}{int(state['step']):08d}":
            raise InputError(f"{folder}: its state.json is that of step {state['step']}")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{folder}: not a complete checkpoint (state.json: {error})") from error
    return Checkpoint(folder, state)


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path, "so the checkpoint is not used", FORMAT)
    stored = state.get("format")
    if not isinstance(stored, int) or isinstance(stored, bool):
        raise InputError(f"{path}: not a complete checkpoint (it says no format), so it is not used")
    if stored not in (1, FORMAT):
        raise UnknownFormatError(
            f"{path.parent}: checkpoint format {stored}, this version reads {FORMAT}; "
            "resume it with the version that wrote it"
        )
    return state


def restore(
    checkpoint: Checkpoint,
    student: torch.nn.Module | None,
    modules: Mapping[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Fill the student, the other modules and the optimiser from a checkpoint; InputError for another shape."""
    parts = [(name, module, f"{name}.safetensors") for name, module in modules.items()]
    if student is not None:
        parts.insert(0, ("student", student, "student/model.safetensors"))
    for name, target, file in parts:
        try:
            target.load_state_dict(load_file(checkpoint.folder / file))
        except FileNotFoundError as error:
            raise InputError(f"{checkpoint.folder}: holds no {file}, so it is of another kind of run") from error
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(
                f"{checkpoint.folder}: its {name} has another architecture than this run's ({first})"
            ) from error
    moments = load_file(checkpoint.folder / "optimizer.safetensors")
    _unpack_optimiser(optimiser, moments, checkpoint.state["optimizer_groups"])
    for group, step in zip(optimiser.param_groups, checkpoint.state.get("optimizer_steps", [])):
        if step is not None:
            group["step"] = torch.tensor(step["tensor"]) if isinstance(step, dict) else step


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


def _steps(optimiser: torch.optim.Optimizer) -> list[int | dict[str, float] | None]:
    """The count of steps that some optimisers keep by group: Adan as a number, LAMB as a tensor."""
    steps = [group.get("step") for group in optimiser.param_groups]
    return [{"tensor": step.item()} if isinstance(step, Tensor) else step for step in steps]


def _unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[list[int]]) -> None:
    current = optimiser.state_dict()
    if [list(g["params"]) for g in current["param_groups"]] != groups:
        raise InputError("the checkpoint's optimiser has other parameter groups than this run's")
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        counter = value.ndim == 0 and not value.is_floating_point()
        # cloned: no longer of the mapped file
        state.setdefault(int(index), {})[name] = int(value) if counter else value.clone()
    optimiser.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    # the fused kernel walks parameter and moments side by side in memory: they must be laid out alike (channels last)
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            beside = isinstance(value, Tensor) and value.shape == parameter.shape
            if beside and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _bytes_of(
    student: ClipModel | None, modules: Mapping[str, torch.nn.Module], optimiser: torch.optim.Optimizer
) -> int:
    """Bytes of everything a checkpoint holds."""
    states = [module.state_dict() for module in modules.values()]
    states += [{} if student is None else student.module.state_dict(), _pack_optimiser(optimiser)[0]]
    return sum(t.numel() * t.element_size() for content in states for t in content.values())


def _check_space(root: Path, needed: int) -> None:
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
