"""The back ends onnx and openvino of the benchmark."""

from __future__ import annotations

import pytest
import torch

from clipdistill.bench.backends import find_backend
from clipdistill.bench.throughput import throughput
from clipdistill.errors import InputError
from clipdistill.models import build_student, build_words_tokenizer

ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def model():
    return build_student(ARCHITECTURE, seed=0, tokenizer=build_words_tokenizer(["a photo of cats on a red sofa"], 12))


@pytest.mark.slow
def test_onnx_runs_in_both_formats_beside_eager(model):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = throughput(
        {"a": model}, backends=("eager", "onnx"), dtype=("float32", "int8"), batch_sizes=(3,),
        seconds=0.02, rounds=3, device="cpu", towers=("image",),
    )  # fmt: skip
    measured = {(row["backend"], row["dtype"]) for row in result["measurements"]}
    assert measured == {("eager", "float32"), ("onnx", "float32"), ("onnx", "int8")}
    assert {(f["backend"], f["dtype"]) for f in result["failures"]} == {("eager", "int8")}
    assert all(row["value"] > 0 for row in result["measurements"])
    compared = {(r["backend"], r["dtype"], r["against"]["backend"], r["value"] > 0) for r in result["setting_ratios"]}
    assert compared == {("onnx", "float32", "eager", True), ("onnx", "int8", "eager", True)}


def test_openvino_gives_the_models_embeddings_in_its_formats(model):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.module.eval().encode_image(images)
    loaded = find_backend("openvino").load(model, torch.device("cpu"), "float32")
    found = torch.from_numpy(loaded.towers["image"](images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert loaded.size_bytes
    loaded.close()


def test_what_these_back_ends_do_not_run():
    with pytest.raises(InputError, match="on the CPU only"):
        find_backend("onnx").load(None, torch.device("meta"), "float32")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did you mean 'openvino'"):
        find_backend("openvin")
