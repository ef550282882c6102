"""ONNX graphs with weights of sixteen or eight bits that are computed in float32: a half or a quarter to download.

Eight bits: matrices and kernels in whole numbers with one scale for each output channel, symmetric; embeddings of words
with one for each row. Everything else, and what has no such axis, in sixteen bits; so are kernels over few channels
(the first ones, and one for each channel), which are small and lose most. The runtime makes float32 of both
when it reads a graph, so neither speed nor the way of computing changes, and nothing has to be calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError, needing
from clipdistill.export.gate import COSINE, Parity, compare
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import load_graph

_SMALL = 256  # numbers; what is smaller stays as it is
_CHANNEL = {("MatMul", 1): 1, ("Gather", 0): 0, ("Conv", 1): 0, ("Gemm", 1): 1, ("Gemm transposed", 1): 0}
"""(operator, which of its inputs) -> the axis that has a scale for each entry."""
_FEW = 4  # channels that a kernel reads
_MOST_ERROR = 0.006  # of a tensor's norm, where eight bits everywhere miss the cosine
_LARGEST = 2_000_000_000  # bytes; protobuf and browsers hold no more


def light_tower(model: ClipModel, tower: str, source: Path, target: Path, precision: str) -> list[Parity]:
    """`shrink_weights`, compared with the model; where eight bits miss COSINE, without the tensors they fit worst."""
    for most_error in (None, _MOST_ERROR) if precision == "int8" else (None,):
        shrink_weights(source, target, precision, most_error)
        parities = compare(model, {tower: load_graph(target, "onnx")})
        if min(parity.cosine for parity in parities) >= COSINE[precision]:
            break
    return parities


def shrink_weights(source: Path, target: Path, precision: str, most_error: float | None = None) -> None:
    """Write the ONNX graph `source` to `target` with weights of `precision` ("float16" or "int8").

    most_error: tensors that eight bits would change by a larger part of their norm keep sixteen (None: none). Needs the
    extra `export`. Raises InputError where the result is larger than a browser takes.
    """
    with needing("onnx", "export", "the export for browsers"):
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    model = onnx.load(str(source))
    graph = model.graph
    uses: dict[str, set[tuple[str, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            uses.setdefault(name, set()).add((_operator(node), place))
    kept: list[Any] = []
    nodes: list[Any] = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < _SMALL:
            kept.append(tensor)
            continue
        use = uses.get(tensor.name, set())
        axis = _CHANNEL.get(next(iter(use))) if len(use) == 1 and values.ndim > 1 else None
        few = values.ndim > 2 and values.shape[1] <= _FEW
        eight = None
        if precision == "int8" and axis is not None and not few and np.isfinite(values).all():
            eight = _eight_bits(values, axis)
        if eight is not None and (most_error is None or eight[2] <= most_error):
            whole, scale, _ = eight
            kept += [numpy_helper.from_array(whole, f"{tensor.name}.int8")]
            kept += [numpy_helper.from_array(scale, f"{tensor.name}.scale")]
            inputs = [f"{tensor.name}.int8", f"{tensor.name}.scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [tensor.name], axis=axis))
        elif np.abs(values[np.isfinite(values)]).max(initial=0) < np.finfo(np.float16).max:
            kept.append(numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}.half"))
            nodes.append(helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT))
        else:
            kept.append(tensor)
    nodes += list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    if model.ByteSize() > _LARGEST:
        raise InputError(f"{target.name} has {model.ByteSize() / 1e9:.1f} GB, which no browser loads: try --int8")
    onnx.save(model, str(target))


def _operator(node: Any) -> str:
    """Its kind, or a name of its own where the input's axis is not what `_CHANNEL` takes it for."""
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Gather" and numbers.get("axis", 0) != 0:
        return "Gather on another axis"
    return "Gemm transposed" if node.op_type == "Gemm" and numbers.get("transB") else str(node.op_type)


def _eight_bits(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Whole numbers -127 ... 127 of the same shape, the scale of each entry of `axis`, the part of the norm lost."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.maximum(np.abs(values).max(axis=others) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    shape = [1] * values.ndim
    shape[axis] = -1
    whole = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
    lost = np.linalg.norm(whole * scale.reshape(shape) - values) / max(float(np.linalg.norm(values)), 1e-30)
    return whole, scale, float(lost)
