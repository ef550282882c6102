"""Stand-ins for the converters and runtimes of phones, whose packages the gate does not install.

Each "file" holds a number, under which the module or program that was converted lies in memory: the exports' own code
runs up to the call of the converter, and from the call of the runtime.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HELD: list[Any] = []
CALLS: list[Any] = []
"""What the converters were asked for beside the module: precisions, recipes, partitioners."""


def keep(module: Any) -> bytes:
    HELD.append(module)
    return f"graph {len(HELD) - 1}".encode()


def kept(content: bytes) -> Any:
    if not content.startswith(b"graph "):
        raise RuntimeError("this is no graph\nsecond line")
    return HELD[int(content.split()[1])]


def run(module: Any, values: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        found = module(torch.from_numpy(values))
    return (next(iter(found.values())) if isinstance(found, dict) else found).numpy()


def package(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> types.ModuleType:
    """A module of that name, and the packages above it, for as long as the test runs."""
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    above, _, leaf = name.rpartition(".")
    if above:
        parent = sys.modules.get(above) or package(monkeypatch, above)
        monkeypatch.setattr(parent, leaf, module, raising=False)
    return module


def litert(monkeypatch: pytest.MonkeyPatch, wrong: float = 0.0) -> None:
    """litert_torch, its quantizer (which changes the embeddings by `wrong`) and the interpreter."""

    class Converted:
        def __init__(self, module: Any, names: dict[str, Any]) -> None:
            self.content = keep(module) + b" " + next(iter(names)).encode()

        def export(self, path: str) -> None:
            Path(path).write_bytes(self.content)

    def convert(module: Any, *, sample_kwargs: dict[str, Any]) -> Converted:
        (given,) = sample_kwargs.values()
        assert len(given) == 1
        assert given.dtype in (torch.float32, torch.int32)
        print("noise that nobody asked for")
        return Converted(module, sample_kwargs)

    class Quantizer:
        def __init__(self, content: bytearray) -> None:
            self.content = bytes(content)

        def load_quantization_recipe(self, recipe: str) -> None:
            CALLS.append(recipe)

        def update_quantization_recipe(self, **recipe: Any) -> None:
            CALLS.append(recipe["algorithm_key"])

        def quantize(self) -> Any:
            inner, name = kept(self.content), self.content.split()[-1]

            def changed(values: torch.Tensor) -> torch.Tensor:
                (found,) = inner(values).values()
                return found + wrong * torch.arange(found.shape[1])

            return types.SimpleNamespace(quantized_model=keep(changed) + b" " + name)

    class Interpreter:
        def __init__(self, model_path: str, num_threads: int) -> None:
            content = Path(model_path).read_bytes()
            self.module, self.name = kept(content), content.split()[-1].decode()

        def get_signature_runner(self) -> Any:
            def signature(**given: np.ndarray) -> dict[str, np.ndarray]:
                (values,) = given.values()
                assert len(values) == 1
                return {"embedding": run(self.module, values)}

            kind = np.float32 if self.name == "image" else np.int32
            signature.get_input_details = lambda: {self.name: {"dtype": kind}}  # type: ignore[attr-defined]
            signature.get_output_details = lambda: {"embedding": {}}  # type: ignore[attr-defined]
            return signature

    names = types.SimpleNamespace
    package(monkeypatch, "litert_torch", convert=convert)
    package(
        monkeypatch,
        "ai_edge_quantizer",
        quantizer=names(Quantizer=Quantizer),
        recipe=names(dynamic_wi8_afp32=lambda: "dynamic_wi8_afp32"),
        qtyping=names(
            TensorQuantizationConfig=lambda **_: None,
            OpQuantizationConfig=lambda **_: None,
            TensorDataType=names(FLOAT=0),
            TFLOperationName=names(ALL_SUPPORTED="*", DEPTHWISE_CONV_2D="one", CONV_2D="all"),
            ComputePrecision=names(FLOAT=0),
        ),
    )
    package(monkeypatch, "ai_edge_litert.interpreter", Interpreter=Interpreter)


def executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch's lowering, XNNPACK's partitioner and quantizer, torchao's preparation, and the runtime."""

    def lower(program: Any, partitioner: list[Any]) -> Any:
        CALLS.append(partitioner)
        finished = types.SimpleNamespace(buffer=keep(program.module()))
        return types.SimpleNamespace(to_executorch=lambda: finished)

    class Program:
        def __init__(self, path: Path) -> None:
            self.module = kept(path.read_bytes())

        def load_method(self, name: str) -> Any:
            assert name == "forward"
            return types.SimpleNamespace(execute=lambda given: [torch.from_numpy(run(self.module, given[0].numpy()))])

    class Quantizer:
        def set_global(self, settings: Any) -> Any:
            CALLS.append(settings)
            return self

    names = types.SimpleNamespace
    package(monkeypatch, "executorch.exir", to_edge_transform_and_lower=lower)
    package(
        monkeypatch,
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        XnnpackPartitioner=lambda: "xnnpack",
    )
    package(
        monkeypatch,
        "executorch.backends.xnnpack.quantizer",
        xnnpack_quantizer=names(
            XNNPACKQuantizer=Quantizer, get_symmetric_quantization_config=lambda **settings: settings
        ),
    )
    package(
        monkeypatch,
        "torchao.quantization.pt2e.quantize_pt2e",
        prepare_pt2e=lambda graph, quantizer: graph,
        convert_pt2e=lambda graph: graph,
    )
    package(monkeypatch, "executorch.runtime", Runtime=names(get=lambda: names(load_program=Program)))


def coreml(monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools: conversion, weights in eight bits, packages that are written, read and run."""
    names = types.SimpleNamespace

    class Model:
        weights_dir = None

        def __init__(self, spec: Any, weights_dir: Any = None, skip_model_load: bool = False) -> None:
            if isinstance(spec, str):
                content = (Path(spec) / "Data" / "weight.bin").read_bytes()
                given = [names(name=content.split()[-1].decode())]
                spec = names(content=content, description=names(input=given, output=[names(name="embedding")]))
            self.spec = spec

        def get_spec(self) -> Any:
            return self.spec

        def save(self, path: str) -> None:
            (Path(path) / "Data").mkdir(parents=True)
            (Path(path) / "Data" / "weight.bin").write_bytes(self.spec.content)
            (Path(path) / "Manifest.json").write_text("{}")

        def predict(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            (values,) = given.values()
            return {self.spec.description.output[0].name: run(kept(self.spec.content), values)}

    def convert(program: Any, **options: Any) -> Model:
        assert not any("alias" in str(node.target) for node in program.graph.nodes)
        CALLS.append(options["compute_precision"])
        name = program.graph_signature.user_inputs[0]
        described = names(input=[names(name=name)], output=[names(name="linear_7")])
        return Model(names(content=keep(program.module()) + b" " + name.encode(), description=described))

    def rename(spec: Any, old: str, new: str) -> None:
        assert spec.description.output[0].name == old
        spec.description.output[0].name = new

    def eight_bits(model: Model, settings: Any) -> Model:
        CALLS.append(settings)
        return model

    package(
        monkeypatch,
        "coremltools",
        convert=convert,
        precision=names(FLOAT16="FLOAT16", FLOAT32="FLOAT32"),
        target=names(iOS16="iOS16"),
        utils=names(rename_feature=rename),
        models=names(MLModel=Model),
    )
    package(
        monkeypatch,
        "coremltools.optimize",
        coreml=names(
            OpLinearQuantizerConfig=lambda mode: mode,
            OptimizationConfig=lambda global_config: global_config,
            linear_quantize_weights=eight_bits,
        ),
    )


INSTALL = {"litert": litert, "executorch": executorch, "coreml": coreml}
