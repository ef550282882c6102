"""int8 within a budget: the choice per tower on made-up encodings, and real graphs on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError
from clipdistill.export import graphs
from clipdistill.export.int8 import ATTEMPTS, quantise_onnx, within_budget

N = 50


def encodings(image_wrong: int = 0, text_wrong: int = 0, both_wrong: int = 0) -> EncodedPairs:
    """N pairs of equal unit vectors; of the first so many, one side points to the next pair."""
    eye = torch.eye(N)
    image, text = eye.clone(), eye.clone()
    order = torch.arange(N).roll(-1)
    image[:image_wrong] = eye[order[:image_wrong]]
    text[:text_wrong] = eye[order[:text_wrong]]
    return EncodedPairs(image, text, torch.arange(N), [str(i) for i in range(N)], ["x"] * N, torch.zeros(N).long())


def choose(losses, budget=1.0):
    """losses: (tower, attempt) -> pairs that go wrong (2 points each). Returns choices by tower, accuracy, calls."""
    calls = []

    def quantise(tower, attempt):
        calls.append((tower, ATTEMPTS.index(attempt)))
        wrong = losses[calls[-1]]
        return encodings(**{f"{tower}_wrong": wrong})

    choices, after = within_budget(quantise, encodings(), "made up", budget)
    return {choice.tower: choice for choice in choices}, after, calls


def test_both_towers_within_the_budget():
    choices, after, calls = choose({("image", 0): 0, ("text", 0): 0})
    assert [choices[t].precision for t in ("image", "text")] == ["int8", "int8"]
    assert calls == [("image", 0), ("text", 0)]
    assert after.i2t == 1.0


def test_sensitive_layers_are_spared_before_a_tower_is_given_up():
    choices, after, calls = choose({("image", 0): 3, ("image", 1): 0, ("text", 0): 4, ("text", 1): 2})
    assert calls == [("image", 0), ("image", 1), ("text", 0), ("text", 1)]
    assert choices["image"].precision == "int8"
    assert choices["image"].attempt == ATTEMPTS[1]
    assert choices["text"].precision == "float32"
    assert after.mean == pytest.approx(100)
    assert "text tower: stays in float32, because int8 misses the budget" in choices["text"].text()


def test_towers_that_fit_alone_and_not_together():
    """One wrong pair each is within 4 points, but the two are different pairs."""
    choices, after, _ = choose({("image", 0): 1, ("text", 0): 2}, budget=5.0)
    assert {choice.precision for choice in choices.values()} == {"int8"}
    assert after.mean >= 95
    image, text = encodings(image_wrong=1), encodings()
    text.text[1], text.text[2] = text.text[2].clone(), text.text[1].clone()
    answers = {"image": image, "text": text}
    single, result = within_budget(lambda tower, attempt: answers[tower], encodings(), "made up", 4.5)
    assert [choice.precision for choice in single] == ["int8", "float32"]
    assert single[1].tried[-1]["attempt"] == "both towers"
    assert result.mean >= 95.5


def test_a_negative_budget_is_refused():
    with pytest.raises(InputError, match="at least 0"):
        within_budget(lambda tower, attempt: encodings(), encodings(), "made up", -1)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_quantised_graphs_compute_nearly_the_same(attempt, exported, tiny, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    quantise_onnx(exported / "image.onnx", tmp_path / "image.onnx", images, attempt)
    session = ort.InferenceSession(tmp_path / "image.onnx")
    for batch in (1, 7):
        (found,) = session.run(None, {"image": images[:batch]})
        with torch.no_grad():
            expected = tiny.module.eval().encode_image(torch.from_numpy(images[:batch])).numpy()
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.98
        assert np.abs(found - expected).max() > 1e-5
    kept = {t.name: t for t in onnx.load(tmp_path / "image.onnx").graph.initializer}
    eight_bit = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) >= 2 for t in kept.values())
    assert eight_bit >= (6 if attempt == ATTEMPTS[0] else 3)


def test_export_falls_back_and_says_so(exported, tiny, squares, tmp_path, monkeypatch):
    """The text tower is made useless by quantisation: it stays float32 in the files, the manifest and the output."""
    pytest.importorskip("onnxruntime")
    import shutil

    real = graphs.quantise_onnx

    def quantise(source, target, samples, attempt):
        if source.name == "image.onnx":
            return real(source, target, samples, attempt)
        return shutil.copy(broken, target)

    broken = tmp_path / "broken.onnx"
    _zeroed(exported / "text.onnx", broken)
    monkeypatch.setattr(graphs, "quantise_onnx", quantise)
    monkeypatch.setattr(
        graphs,
        "write_graphs",
        lambda model, folder, *_, **__: [shutil.copy(f, folder) for f in exported.glob("*.onnx")],
    )
    result = graphs.export_graphs(tiny, tmp_path / "out", int8=True, test=squares, calibration=squares, budget=4.0)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["towers"]["text"]["precision"] == "float32"
    assert (tmp_path / "out" / "text.onnx").read_bytes() == (exported / "text.onnx").read_bytes()
    assert len(manifest["int8"]["towers"]["text"]["tried"]) == 2
    assert "stays in float32" in result.choices[1].text()
    assert result.before is not None
    assert result.after is not None
    assert result.before.mean - result.after.mean <= 4.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.onnx", "out"]


def _zeroed(source, target):
    """A copy of a graph in which all embeddings are (nearly) one and the same."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[-1] == 24:
            values = onnx.numpy_helper.to_array(tensor) * 1e-6
            values[0] = 1.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
