"""Ternary weights in two bits: the bytes by hand, products against numpy, a whole export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.export.command import export
from clipdistill.export.two_bits import block_of, in_two_bits, pack, ternary_rows
from clipdistill.models import load_model, save_model
from clipdistill.ternary.weights import applied, matrices

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def test_the_bytes_by_hand() -> None:
    """Codes plus 2, four a byte, the first lowest: (1, -1, 0, 1) is 3, 1, 2, 3; the block is filled up with 2."""
    packed = pack(np.array([[1, -1, 0, 1, 1]], np.int8))
    assert packed.shape == (1, 1, 4)
    assert packed[0, 0].tolist() == [0b11_10_01_11, 0b10_10_10_11, 0b10_10_10_10, 0b10_10_10_10]
    assert [block_of(width) for width in (1, 16, 40, 192, 768, 1024)] == [16, 16, 16, 64, 256, 256]


@pytest.mark.parametrize("bad", [[[0.5, -0.5, 0.25]], [[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]], [[float("nan"), 0.0, 0.0]]])
def test_a_row_with_a_third_size_is_not_ternary(bad: list[list[float]]) -> None:
    assert ternary_rows(np.array(bad, np.float32)) is None


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm transB", "Gemm alpha", "dense"])
@pytest.mark.parametrize("width", [5, 16, 70, 256])
def test_products_stay_what_they_were(tmp_path: Path, kind: str, width: int) -> None:
    rng = np.random.default_rng(width)
    weight = rng.integers(-1, 2, (7, width)) * rng.random((7, 1)).astype(np.float32)  # (N, K)
    weight[3] = 0
    weight = weight.astype(np.float32) if kind != "dense" else rng.random((7, width)).astype(np.float32)
    transposed = kind == "Gemm transB"
    constants = [onnx.numpy_helper.from_array(np.ascontiguousarray(weight if transposed else weight.T), "w")]
    names, settings = ["x", "w"], {}
    if kind.startswith("Gemm"):
        constants.append(onnx.numpy_helper.from_array(rng.random(7).astype(np.float32), "b"))
        names, settings = ["x", "w", "b"], {"transB": int(transposed), "alpha": 2.0 if "alpha" in kind else 1.0}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind.split()[0] if kind != "dense" else "MatMul", names, ["y"], **settings)],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", width])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 7])],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path, x = tmp_path / "graph.onnx", rng.standard_normal((4, width)).astype(np.float32)
    onnx.save(model, path)
    (before,) = ort.InferenceSession(path).run(None, {"x": x})
    assert in_two_bits(path) == (0 if kind in ("dense", "Gemm alpha") else weight.size)
    (after,) = ort.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("towers", ["both", "image", "text"])
def test_an_export_of_ternary_towers(tmp_path: Path, tiny, towers: str) -> None:
    weights = matrices(tiny.module.requires_grad_(True), towers)
    with applied(weights):
        save_model(tiny, tmp_path / "student")
    plain = export(tmp_path / "student", "onnx", tmp_path / "plain", quiet=True)
    small = export(tmp_path / "student", "onnx", tmp_path / "small", ternary=True, quiet=True)
    assert max(parity.difference for parity in small.parities) < 1e-5
    told = json.loads((small.folder / "manifest.json").read_text())["towers"]
    for tower in ("image", "text"):
        packed, dense = (folder / f"{tower}.onnx" for folder in (small.folder, plain.folder))
        if towers in ("both", tower):
            assert told[tower]["precision"] == "ternary"
            assert packed.stat().st_size < dense.stat().st_size - 3 * told[tower]["two_bit_weights"]
        else:
            assert told[tower]["precision"] == "float32"
            assert packed.stat().st_size == dense.stat().st_size
    tokens = tiny.tokenizer(["a red square"])
    with torch.no_grad():
        a, b = (load_model(f"onnx:{e.folder}", teacher=True).module.encode_text(tokens) for e in (plain, small))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_refused(tmp_path: Path, tiny) -> None:
    save_model(tiny, tmp_path / "student")
    with pytest.raises(InputError, match=r"no matrix holds only -1, 0 and 1 times a scale"):
        export(tmp_path / "student", "onnx", tmp_path / "a", ternary=True, quiet=True)
    with pytest.raises(InputError, match="two forms of the weights"):
        export(tmp_path / "student", "onnx", tmp_path / "a", ternary=True, int8=True, quiet=True)
    with pytest.raises(InputError, match=r"--ternary goes with --to onnx"):
        export(tmp_path / "student", "hf", tmp_path / "a", ternary=True, quiet=True)
    assert not (tmp_path / "a").exists()
