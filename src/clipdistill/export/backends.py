"""The back ends `onnx`, `openvino`, `litert`, `executorch`: a model exported on the spot, or an export on disk.

For `int8` the graphs are calibrated on noise and word salad: that decides how exact they are, not how fast. Accuracy of
an int8 model is measured by `clipdistill export --int8`, on real pairs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.bench.backends import Loaded
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import load_graph
from clipdistill.models.known import PHONES, SUFFIX, TOWERS

_SAMPLES = 16


class ExportedBackend:
    """A runtime of exported graphs on the CPU. `visible`: torch does not see what the runtime allocates."""

    visible = False

    def __init__(self, name: str, dtypes: tuple[str, ...]) -> None:
        self.name, self.dtypes = name, dtypes

    def load(
        self,
        model: ClipModel,
        device: torch.device,
        dtype: str,
        *,
        towers: tuple[str, ...] = TOWERS,
        folder: Path | None = None,
    ) -> Loaded:
        """Export `model` to a temporary folder, quantise it for int8, and load its graphs.

        folder: where ONNX graphs lie or are left for another runtime (both read them); the caller removes it.

        A model called `onnx:DIR`, `openvino:DIR`, ... is measured as it is, in the format its graphs have. Raises
        InputError for another device than the CPU, and for whatever cannot be exported.
        """
        if device.type != "cpu":
            raise InputError(f"the back end '{self.name}' runs on the CPU only")
        if "exported" in model.architecture:
            return self._ready_made(model, dtype)
        from clipdistill.export.graphs import write_graphs

        if folder is not None:
            from clipdistill.export.towers import write_onnx

            missing = tuple(tower for tower in towers if not (folder / f"{tower}.onnx").exists())
            if missing:
                write_onnx(model, folder, towers=missing)
            return self._loaded({tower: folder / f"{tower}.onnx" for tower in towers}, dtype, folder)
        folder = Path(tempfile.mkdtemp(prefix="clipdistill-bench-"))
        try:
            if self.name in PHONES:
                files = write_graphs(model, folder, self.name, precision=dtype)
            else:
                files = make_graphs(model, folder, self.name, int8=dtype == "int8")
            loaded = self._loaded(files, dtype, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        loaded.close = lambda: shutil.rmtree(folder, ignore_errors=True)
        return loaded

    def _loaded(self, files: dict[str, Path], dtype: str, folder: Path) -> Loaded:
        precision = "float32" if dtype == "int8" else dtype
        towers = {tower: _on_tensors(load_graph(path, self.name, precision)) for tower, path in files.items()}
        size = sum(path.stat().st_size for path in folder.iterdir())
        return Loaded(towers, size, size)

    def _ready_made(self, model: ClipModel, dtype: str) -> Loaded:
        if model.architecture["exported"] != self.name:
            raise InputError(f"'{model.name}' is an export for {model.architecture['exported']}, not for {self.name}")
        if dtype != "float32":
            raise InputError(f"'{model.name}' runs in the number formats of its graphs: leave --dtype at float32")
        towers = {tower: _on_tensors(runner) for tower, runner in model.module.runners.items()}
        return Loaded(towers, model.module.size_bytes, model.module.size_bytes)


def make_graphs(
    model: ClipModel, folder: Path, runtime: str, *, int8: bool = False, opset: int | None = None
) -> dict[str, Path]:
    """Write the graphs of `model` for `runtime` into `folder`, quantised if asked; returns tower -> file. No gate."""
    from clipdistill.export.graphs import write_graphs
    from clipdistill.export.int8 import quantise_onnx, quantise_openvino
    from clipdistill.export.towers import OPSET

    files = write_graphs(model, folder, runtime, opset=opset or OPSET)
    if int8:
        quantise = quantise_onnx if runtime == "onnx" else quantise_openvino
        for tower, samples in random_samples(model).items():
            source = files[tower]
            files[tower] = folder / f"{tower}.int8{SUFFIX[runtime]}"
            quantise(source, files[tower], samples)
            for part in [source, source.with_suffix(".bin")]:
                part.unlink(missing_ok=True)
    return files


def random_samples(model: ClipModel, count: int = _SAMPLES) -> dict[str, np.ndarray]:
    """tower -> seeded inputs of the right shape: noise images (count, 3, H, W), tokens of short captions (count, L)."""
    rng = np.random.default_rng(0)
    size = model.image.size
    images = rng.standard_normal((count, 3, size, size)).astype(np.float32)
    captions = [
        f"a photo of {i} cats on a {word} sofa" for i, word in zip(range(count), ["red", "blue", "old"] * count)
    ]
    return {"image": images, "text": model.tokenizer(captions).numpy()}


def _on_tensors(runner: Any) -> Callable[[Tensor], object]:
    """A function on arrays as one on CPU tensors; an array is no copy."""
    return lambda values: runner(values.numpy())


ONNX = ExportedBackend("onnx", ("float32", "int8"))
OPENVINO = ExportedBackend("openvino", ("float32", "bfloat16", "int8"))
LITERT, EXECUTORCH = (ExportedBackend(name, ("float32", "float16", "int8")) for name in PHONES[:2])
