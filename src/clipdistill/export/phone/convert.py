"""Both towers of a model as graphs for a phone, and what runs them for the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.export.gate import COSINE, compare
from clipdistill.export.phone import coreml, executorch, litert
from clipdistill.export.phone.parts import muted, named
from clipdistill.export.towers import example_inputs, plain_copy, quiet, reason_of
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import Runner, load_graph
from clipdistill.models.known import SUFFIX, TOWERS

CONVERTERS: dict[str, Callable[[nn.Module, Tensor, Path, str, Callable[[], bool]], None]] = {
    "litert": litert.convert,
    "executorch": executorch.convert,
    "coreml": coreml.convert,
}
PACKAGES = {"litert": litert.PACKAGES, "executorch": executorch.PACKAGES, "coreml": coreml.PACKAGES}


def write_phone(
    model: ClipModel, folder: Path, runtime: str, *, normalised: bool = False, precision: str = "float32"
) -> dict[str, Path]:
    """Write both towers for `runtime`, in one of parts.PRECISIONS, into `folder`; returns tower -> file.

    A graph takes one picture or one caption. Nothing is checked. Raises InputError for what cannot be converted.
    """
    # ExecuTorch takes convolutions with the channels first only
    plain, files = plain_copy(model.module).to(memory_format=torch.contiguous_format), {}
    for tower in TOWERS:
        files[tower] = path = folder / f"{tower}{SUFFIX[runtime]}"

        def good(tower: str = tower, path: Path = path) -> bool:
            found = compare(model, {tower: load_graph(path, runtime)}, normalised=normalised)
            return min(parity.cosine for parity in found) >= COSINE[precision]

        try:
            with quiet(), muted(), torch.no_grad():
                example = example_inputs(model, tower)[:1]
                CONVERTERS[runtime](named(plain, tower, normalised), example, path, precision, good)
        except InputError:
            raise
        except Exception as error:  # torch.export and the converters raise many kinds
            raise InputError(
                f"the {tower} tower of {model.name} cannot be converted for {runtime}: {reason_of(error)}"
            ) from error
    return files


def phone_runners(model: ClipModel, files: dict[str, Path], runtime: str, *, normalised: bool) -> dict[str, Runner]:
    """Tower -> what the gate compares: the graph, or what was handed to the converter where no graph runs here."""
    if runtime != "coreml" or coreml.runs_here():
        return {tower: load_graph(path, runtime) for tower, path in files.items()}
    plain = plain_copy(model.module)
    with quiet(), muted(), torch.no_grad():
        return {
            tower: coreml.handed_over(named(plain, tower, normalised), example_inputs(model, tower)[:1])
            for tower in files
        }
