"""ONNX graphs with weights of sixteen or eight bits that are computed in float32: a half or a quarter to download.

Eight bits: matrices and kernels in whole numbers with one scale for each output channel, symmetric; embeddings of words
with one for each row. Everything else, and what has no such axis, in sixteen bits. The runtime makes float32 of both
when it reads a graph, so neither speed nor the way of computing changes, and nothing has to be calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError, needing

COSINE = {"float16": 0.999, "int8": 0.99}
"""Kinds of weights, and the least cosine with the model, on the gate's inputs, that each must keep."""
_SMALL = 256  # numbers; what is smaller stays as it is
_CHANNEL = {("MatMul", 1): 1, ("Gather", 0): 0, ("Conv", 1): 0}
"""(operator, which of its inputs) -> the axis that has a scale for each entry."""
_LARGEST = 2_000_000_000  # bytes; protobuf and browsers hold no more


def shrink_weights(source: Path, target: Path, precision: str) -> None:
    """Write the ONNX graph `source` to `target` with weights of `precision` ("float16" or "int8").

    Needs the extra `export`. Raises InputError where the result is larger than a browser takes.
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
        if precision == "int8" and axis is not None and np.isfinite(values).all():
            whole, scale = _eight_bits(values, axis)
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
    odd = node.op_type == "Gather" and any(a.name == "axis" and a.i != 0 for a in node.attribute)
    return "Gather on another axis" if odd else str(node.op_type)


def _eight_bits(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers -127 ... 127 of the same shape, and the scale of each entry of `axis`."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.maximum(np.abs(values).max(axis=others) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8), scale
