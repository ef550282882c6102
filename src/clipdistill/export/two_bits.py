"""Ternary weights of an ONNX graph in two bits each: ONNX Runtime's MatMulNBits in the place of matrix products.

A student of `train.ternary` has matrices whose rows hold -1, 0 and 1 times a scale. Exported as they are they take 32
bits a weight; here four weights share a byte, with the scale once a block of them. What is computed stays in
float32, so the numbers are the same but for the order of sums. The operator is ONNX Runtime's own (domain
com.microsoft; two bits since 1.23), not of ONNX: other runtimes refuse such a graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdistill.errors import needing
from clipdistill.ternary import packed
from clipdistill.ternary.weights import dense, parts


def ternary_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(codes -1, 0, 1 (N, K) int8; scales (N,) float32) of a matrix (N, K) whose rows are ternary, else None."""
    values = torch.from_numpy(weight.copy())
    codes, scales = parts(values)
    return (codes.numpy(), scales.numpy()) if torch.equal(dense(codes, scales), values) else None


def block_of(width: int) -> int:
    """Weights that share a scale in the file, a power of two from 16 on: the largest to 256 that divides a row."""
    return max(16, min(256, width & -width))


def pack(codes: np.ndarray) -> np.ndarray:
    """(N, K) codes -> (N, blocks, block / 4) uint8, the first in the lowest bits, a code plus 2 (the operator's
    zero); the last block is filled up with zeros."""
    block = block_of(codes.shape[1])
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)))
    # our own files count from the sign plus 1
    return packed.pack(torch.from_numpy(padded + 1)).numpy().reshape(len(codes), -1, block // 4)


def in_two_bits(path: Path) -> int:
    """Rewrite the graph of a file in place where it has ternary weights; returns how many it now holds in two bits."""
    with needing("onnx", "export", "the export to ONNX"):
        import onnx
        from onnx import helper, numpy_helper
    model = onnx.load(str(path))
    graph, count = model.graph, 0
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        found = _ternary_product(node, constants)
        if found is None:
            nodes.append(node)
            continue
        name, (codes, scales) = node.input[1], found
        quarters = pack(codes)
        graph.initializer.extend(
            [
                numpy_helper.from_array(quarters, f"{node.output[0]}.codes"),
                numpy_helper.from_array(np.repeat(scales[:, None], quarters.shape[1], 1), f"{node.output[0]}.scales"),
            ]
        )
        bias = [node.input[2]] if len(node.input) > 2 and node.input[2] else []
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{node.output[0]}.codes", f"{node.output[0]}.scales"],
                [product],
                name=f"{node.name or name}.two_bits",
                domain="com.microsoft",
                **{"K": codes.shape[1], "N": codes.shape[0], "bits": 2, "block_size": block_of(codes.shape[1])},
            )
        )
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], list(node.output)))
        count += codes.size
    if not count:
        return 0
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(path))
    return count


def _ternary_product(node: Any, constants: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    from onnx import numpy_helper

    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
        return None
    settings = {item.name: item for item in node.attribute}
    if any(name in settings and settings[name].f != 1 for name in ("alpha", "beta")):
        return None
    if "transA" in settings and settings["transA"].i:
        return None
    weight = numpy_helper.to_array(constants[node.input[1]])
    if weight.ndim != 2 or weight.dtype != np.float32:
        return None
    return ternary_rows(weight if "transB" in settings and settings["transB"].i else weight.T)
