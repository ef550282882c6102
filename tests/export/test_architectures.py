"""Every architecture of the registry passes the gate (slow: minutes for the large ones)."""

from __future__ import annotations

import pytest

from clipdistill.export.gate import Tolerance, compare, require
from clipdistill.export.towers import write_onnx
from clipdistill.models import build_student
from clipdistill.models.exported import load_graph
from clipdistill.models.known import needs_vocabulary, students

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(students()))
def test_every_registered_architecture_passes_the_gate(name, tmp_path):
    captions = ["a photo of a dog", "the red house on the street"] if needs_vocabulary(name) else None
    model = build_student(name, seed=0, captions=captions)
    files = write_onnx(model, tmp_path)
    parities = compare(model, {tower: load_graph(path, "onnx") for tower, path in files.items()})
    require(parities, Tolerance(), name)
    assert {p.batch for p in parities} == {1, 7}
