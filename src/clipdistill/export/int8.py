"""Eight-bit graphs: static quantisation by ONNX Runtime (QDQ) or NNCF (OpenVINO), within an accuracy budget.

Only matrix products and convolutions are quantised, weights by output channel; softmax, norms, GELU and the products
inside attention stay in float32, because their ranges follow the input. Which tower loses more than the budget is
quantised again without its most sensitive layers, and stays in float32 when that does not help; the choice is printed
and in the manifest.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError, needing
from clipdistill.export.accuracy import Accuracy, accuracy
from clipdistill.models.exported import openvino_core, signal_stack_kept

ATTEMPTS = ("all layers", "sensitive layers in float32")
BATCH = 8
"""Samples in each calibration step."""


def quantise_onnx(source: Path, target: Path, samples: np.ndarray, attempt: str = ATTEMPTS[0]) -> None:
    """Write an int8 version of an ONNX graph, calibrated on `samples` (N, ...), its inputs.

    Needs the extra `export`. `attempt`: one of ATTEMPTS.
    """
    with needing("onnxruntime", "export", "int8"):
        import onnx
        from onnxruntime import quantization
    prepared = target.with_name(f"{target.stem}.prepared.onnx")
    _prepare(source, prepared)
    graph = onnx.load(str(prepared)).graph
    name = graph.input[0].name
    constants = {tensor.name for tensor in graph.initializer}
    all_products = [node for node in graph.node if node.op_type in _ONNX_PRODUCTS]
    products = [node.name for node in all_products if constants & set(node.input)]
    skipped = [node.name for node in all_products if node.name not in products]
    if attempt == ATTEMPTS[1]:
        skipped += _sensitive(graph, products)

    class Samples(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(
                samples[start : start + BATCH] for start in range(0, len(samples), BATCH)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    previous = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises a preparation that does not change these graphs
    try:
        quantization.quantize_static(
            str(prepared),
            str(target),
            Samples(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=not _has_vnni(),
            op_types_to_quantize=list(_ONNX_PRODUCTS),
            nodes_to_exclude=skipped,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={
                "MatMulConstBOnly": True,
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                # their sums go on in float32 (bias, residual, norm): rounding them to 8 bits costs accuracy and a pass
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            },
        )
    finally:
        logging.root.setLevel(previous)
        prepared.unlink(missing_ok=True)


_ONNX_PRODUCTS = ("MatMul", "Gemm", "Conv")


def _prepare(source: Path, target: Path) -> None:
    """A copy with constants folded and batch norms merged into their convolutions, and a name for every node."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(target))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(model, str(target))


def _sensitive(graph: Any, products: list[str]) -> list[str]:
    """Names of the products that lose most: the first and last, and those fed by an activation function.

    What comes out of a GELU has a few values far above all others, which take the range from the rest.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    found = {products[0], products[-1]} if products else set()
    for node in graph.node:
        if node.name in products:
            before = made_by.get(node.input[0])
            while before is not None and before.op_type in ("Reshape", "Transpose"):
                before = made_by.get(before.input[0])
            if before is not None and before.op_type in ("Gelu", "Erf", "Mul", "Sigmoid", "HardSwish"):
                found.add(node.name)
    return sorted(found)


def _has_vnni() -> bool:
    """Whether this processor adds 8-bit products in 32 bits; others overflow at 16 unless a bit is spared."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def quantise_openvino(source: Path, target: Path, samples: np.ndarray, attempt: str = ATTEMPTS[0]) -> None:
    """Write an int8 version (.xml, .bin) of an OpenVINO or ONNX graph; needs the extra `openvino` (with nncf)."""
    with needing("openvino", "openvino", "int8 for OpenVINO"):
        import openvino
    with needing("nncf", "openvino", "int8 for OpenVINO"):
        import nncf
    logging.getLogger("nncf").setLevel(logging.ERROR)
    graph = openvino_core().read_model(str(source))
    name = graph.inputs[0].get_any_name()
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    ignored = None
    if attempt == ATTEMPTS[1]:
        names = [op.get_friendly_name() for op in graph.get_ordered_ops() if op.get_type_name() in _OPENVINO_PRODUCTS]
        after_gelu = [
            op.get_friendly_name()
            for op in graph.get_ordered_ops()
            if op.get_type_name() == "MatMul" and op.input_value(0).get_node().get_type_name() in ("Gelu", "Multiply")
        ]
        ignored = nncf.IgnoredScope(names=sorted({names[0], names[-1], *after_gelu}), validate=False)
    with signal_stack_kept(), contextlib.redirect_stdout(io.StringIO()):  # Cores of its own, five progress bars
        quantised = nncf.quantize(
            graph,
            nncf.Dataset(batches, lambda batch: {name: batch}),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=ignored,
        )
    openvino.save_model(quantised, str(target), compress_to_fp16=False)


_OPENVINO_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")


@dataclass
class Chosen:
    """What became of one tower: "int8" or "float32", points of R@1 lost by it alone, and how it was quantised."""

    tower: str
    precision: str
    lost: float
    attempt: str
    tried: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """One sentence for the terminal."""
        if self.precision == "int8":
            return f"{self.tower} tower: int8 ({self.attempt}), {self.lost:+.2f} points of R@1 lost"
        losses = ", ".join(f"{t['lost']:.2f} ({t['attempt']})" for t in self.tried)
        return f"{self.tower} tower: stays in float32, because int8 misses the budget (points of R@1 lost: {losses})"


Quantise = Callable[[str, str], EncodedPairs]
"""(tower, attempt) -> the test pairs encoded with that tower quantised so; what it wrote stays until the next call."""


def within_budget(quantise: Quantise, full: EncodedPairs, data: str, budget: float) -> tuple[list[Chosen], Accuracy]:
    """Quantise each tower on its own, then both; every combination that is kept loses at most `budget` points of R@1.

    Returns the choices and the accuracy of the result. A loss is the drop of the mean of both directions' R@1.
    """
    if budget < 0:
        raise InputError(f"the budget is a number of points that may be lost, at least 0, got {budget:g}")
    before = accuracy(full, full, data)
    encoded: dict[str, EncodedPairs] = {}
    choices: dict[str, Chosen] = {}
    for tower in ("image", "text"):
        tried: list[dict[str, Any]] = []
        for attempt in ATTEMPTS:
            candidate = quantise(tower, attempt)
            after = accuracy(candidate if tower == "image" else full, candidate if tower == "text" else full, data)
            lost = before.mean - after.mean
            tried.append({"attempt": attempt, "lost": round(lost, 4)})
            if lost <= budget:
                choices[tower] = Chosen(tower, "int8", lost, attempt, tried)
                encoded[tower] = candidate
                break
        else:
            choices[tower] = Chosen(tower, "float32", tried[-1]["lost"], attempt, tried)
    result = accuracy(encoded.get("image", full), encoded.get("text", full), data)
    if before.mean - result.mean > budget and len(encoded) == 2:
        # each alone is within the budget and both together are not: the one that loses more goes back
        worse = max(choices.values(), key=lambda choice: choice.lost)
        both = {"attempt": "both towers", "lost": round(before.mean - result.mean, 4)}
        choices[worse.tower] = Chosen(worse.tower, "float32", worse.lost, worse.attempt, [*worse.tried, both])
        del encoded[worse.tower]
        result = accuracy(encoded.get("image", full), encoded.get("text", full), data)
    return list(choices.values()), result
