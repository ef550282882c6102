"""OpenVINO: the same gate, and int8 by NNCF where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipdistill.export.graphs import export_graphs
from clipdistill.models import load_model

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


def test_openvino_export(tiny, squares, tmp_path):
    export_graphs(tiny, tmp_path / "out", runtime="openvino", normalised=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "openvino"
    assert set(manifest["towers"]["text"]["files"]) == {"text.xml", "text.bin"}
    model = load_model(f"openvino:{tmp_path / 'out'}", teacher=True)
    tokens = tiny.tokenizer(["a red square", "blue", "the picture is grey, isn't it?"])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tiny.module.eval().encode_text(tokens), dim=1)
    torch.testing.assert_close(model.module.encode_text(tokens), expected, atol=1e-5, rtol=1e-4)
    squares.image(3).save(tmp_path / "p.png")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(tmp_path / "out" / "example.py"), str(tmp_path / "p.png"), "a grey square"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert -1 <= float(ran.stdout.split()[0]) <= 1


def test_openvino_runs_an_onnx_export(exported, tiny):
    model = load_model(f"openvino:{exported}", teacher=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = tiny.module.eval().encode_image(images)
    torch.testing.assert_close(model.module.encode_image(images), expected, atol=1e-4, rtol=1e-4)
    first = model.module.encode_image(images)
    kept = first.clone()
    model.module.encode_image(-images)
    assert torch.equal(first, kept)  # a result does not change when the next one is computed


@pytest.mark.parametrize("rows", [15, 16, 33])
def test_large_batches_shared_by_threads_keep_their_order(exported, tiny, rows):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = load_model(f"openvino:{exported}", teacher=True)
        images = torch.randn(rows, 3, 32, 32)
        with torch.no_grad():
            expected = tiny.module.eval().encode_image(images)
        for turn in (images, images.flip(0), images):  # the queue is used again
            wanted = expected if turn is images else expected.flip(0)
            torch.testing.assert_close(model.module.encode_image(turn), wanted, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_a_file_written_over_changes_no_model_that_runs(exported, tiny, tmp_path):
    """Its weights would be mapped: a new export copied over it would change the answers of a service, or end it."""
    folder = tmp_path / "served"
    export_graphs(tiny, folder, runtime="openvino")
    model, images = load_model(f"openvino:{folder}"), torch.randn(3, 3, 32, 32)
    before = model.module.encode_image(images)
    for weights in folder.glob("*.bin"):
        with weights.open("r+b") as file:
            file.write(bytes(weights.stat().st_size))
    assert torch.equal(model.module.encode_image(images), before)
    for weights in folder.glob("*.bin"):
        os.truncate(weights, 10)
    assert torch.equal(model.module.encode_image(images), before)


@pytest.mark.slow
def test_int8_by_nncf(exported, tiny, tmp_path):
    pytest.importorskip("nncf")
    from clipdistill.export.int8 import ATTEMPTS, quantise_openvino
    from clipdistill.models.exported import load_graph

    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    for attempt in ATTEMPTS:
        quantise_openvino(exported / "image.onnx", tmp_path / "image.xml", images, attempt)
        assert b"FakeQuantize" in (tmp_path / "image.xml").read_bytes()
        found = load_graph(tmp_path / "image.xml", "openvino")(images[:7])
        with torch.no_grad():
            expected = tiny.module.eval().encode_image(torch.from_numpy(images[:7])).numpy()
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.95
