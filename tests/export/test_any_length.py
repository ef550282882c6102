"""Exported text towers take captions of any length up to the context, where nothing behind their end is read."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from clipdistill.evaluate.evaluate import evaluate
from clipdistill.export import towers
from clipdistill.export.graphs import export_graphs
from clipdistill.models import ClipModel, build_student, build_words_tokenizer, load_model
from clipdistill.models.exported import takes_any_length
from tests.export.conftest import Squares, tiny_architecture

CONTEXT = 40
RUNTIMES = ["onnx", "openvino"]


def model_of(squares: Squares, **text: object) -> ClipModel:
    words = [caption for i in range(len(squares)) for caption in squares.captions(i)]
    tokenizer = build_words_tokenizer(words, CONTEXT)
    values = {"context_length": CONTEXT, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, **text}
    architecture = tiny_architecture(text_cfg=values, **({"custom_text": True} if text else {}))
    model = build_student(architecture, seed=0, tokenizer=tokenizer)
    with torch.no_grad():  # position embeddings start so small that what stands where hardly matters
        for name, parameter in model.module.named_parameters():
            if "positional" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(autouse=True)
def _runtimes() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino", "tokenizers"):
        pytest.importorskip(package)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_captions_of_any_length_give_the_embedding_of_the_whole_context(runtime, int8, squares, tmp_path):
    if int8:
        pytest.importorskip("nncf")
    model = model_of(squares)
    settings = {"test": squares, "calibration": squares, "int8": True, "budget": 100.0} if int8 else {}
    exported = export_graphs(model, tmp_path / "e", runtime=runtime, **settings)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    text = manifest["towers"]["text"]
    assert text["input_shape"] == ["batch", "length"]
    assert text["precision"] == ("int8" if int8 else "float32")
    cases = {case["case"] for case in text["float32_parity"]["cases"]}
    assert {"short", "long", "padded", "short, cut to 8"} <= cases  # the gate compared several lengths
    assert any(p.case.startswith("padded, cut to") and p.difference < 1e-5 for p in exported.parities)

    again = load_model(f"{runtime}:{tmp_path / 'e'}", teacher=True)
    assert again.reads_only_text
    captions = ["a red square number 1", "the picture is blue, isn't it?", "grey"]
    tokens = again.tokenizer(captions)
    whole = again.module.encode_text(tokens)
    with torch.no_grad():
        expected = model.module.eval().encode_text(tokens)
    for length in (*range(10, 14), 25, CONTEXT - 1, CONTEXT):
        found = again.module.encode_text(tokens[:, :length].contiguous())
        assert torch.nn.functional.cosine_similarity(found, whole).min() > (0.999 if int8 else 0.999999)
        # what int8 itself costs is a matter of its budget, and on random weights it costs much
        assert torch.nn.functional.cosine_similarity(found, expected).min() > (0.8 if int8 else 0.999999)
    assert [tuple(part.shape) for part in again.shorten(tokens)] == [(3, 16)]


def test_the_shipped_tokenizer_pads_no_further_than_the_longest_of_the_batch(squares, tmp_path):
    from tokenizers import Tokenizer

    model = model_of(squares)
    export_graphs(model, tmp_path / "e", test=squares)
    fast = Tokenizer.from_file(str(tmp_path / "e" / "tokenizer.json"))
    captions = ["red", "a red square number 1", "red " * 60]
    rows = [row.ids for row in fast.encode_batch(captions[:2])]
    assert {len(row) for row in rows} == {7}
    assert rows == model.tokenizer(captions[:2])[:, :7].tolist()
    assert [row.ids for row in fast.encode_batch(captions)] == model.tokenizer(captions).tolist()
    assert len(fast.encode("red").ids) == 3
    squares.image(5).save(tmp_path / "p.png")
    command = [sys.executable, str(tmp_path / "e" / "example.py"), str(tmp_path / "p.png"), *captions[:2]]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 2


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("text", [{"pool_type": "last"}, {"no_causal_mask": True, "pool_type": "last"}], ids=str)
def test_towers_that_read_their_padding_keep_the_whole_context(text, runtime, squares, tmp_path):
    model = model_of(squares, **text)
    export_graphs(model, tmp_path / "e", runtime=runtime)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["towers"]["text"]["input_shape"] == ["batch", CONTEXT]
    assert json.loads((tmp_path / "e" / "tokenizer.json").read_text())["padding"]["strategy"] == {"Fixed": CONTEXT}
    again = load_model(f"{runtime}:{tmp_path / 'e'}")
    assert not again.reads_only_text
    assert not takes_any_length(again.module.runners["text"])
    tokens = again.tokenizer(["red"])
    assert again.shorten(tokens)[0].shape == (1, CONTEXT)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_exports_of_a_fixed_length_are_still_read(runtime, squares, tmp_path, monkeypatch):
    """Folders of earlier versions, and towers that the exporter takes at one length only."""
    model = model_of(squares)
    monkeypatch.setattr(towers, "free_axes", lambda model, tower: [{0: torch.export.Dim("batch")}])
    export_graphs(model, tmp_path / "e", runtime=runtime)
    again = load_model(f"{runtime}:{tmp_path / 'e'}", teacher=True)
    assert not again.reads_only_text
    found, expected = (evaluate(m, squares, intervals=False, progress=False) for m in (again, model))
    assert [s.value for s in found] == pytest.approx([s.value for s in expected])


def test_a_tower_that_the_exporter_takes_at_one_length_only_is_exported_so(squares, tmp_path, monkeypatch):
    model = model_of(squares)
    real, tried = torch.onnx.export, []

    def export(module, arguments, **settings):
        tried.append(settings["dynamic_shapes"])
        if 1 in settings["dynamic_shapes"][0]:
            raise RuntimeError("the length is a constant here")
        return real(module, arguments, **settings)

    monkeypatch.setattr(torch.onnx, "export", export)
    export_graphs(model, tmp_path / "e")
    assert len(tried) == 3
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["towers"]["text"]["input_shape"] == ["batch", CONTEXT]


def test_graphs_of_any_length_from_elsewhere_are_asked_whether_they_read_their_padding(squares, tmp_path):
    from clipdistill.config import as_dict
    from clipdistill.export.towers import write_onnx

    model = model_of(squares)
    write_onnx(model, tmp_path)
    description = {"image": as_dict(model.image), "tokenizer": model.tokenizer.to_dict(), "logit_scale": 10.0}
    (tmp_path / "model.json").write_text(json.dumps(description))
    again = load_model(f"onnx:{tmp_path}")
    assert again.module.reads_only_text is None
    assert again.reads_only_text
    tokens = again.tokenizer(["a red square"])
    np.testing.assert_allclose(
        again.module.encode_text(again.shorten(tokens)[0]), again.module.encode_text(tokens), atol=1e-5
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_callers_on_several_threads_get_their_own_rows(runtime, squares, tmp_path):
    """One graph, one request: without a lock a caller was given the rows of another."""
    model = model_of(squares)
    export_graphs(model, tmp_path / "e", runtime=runtime)
    module = load_model(f"{runtime}:{tmp_path / 'e'}", teacher=True).module
    texts = [squares.captions(i)[0] for i in range(len(squares))]
    tokens = model.tokenizer((texts * 20)[:120])
    batches = [tokens[start : start + 1 + start % 7] for start in range(100)] * 4
    expected = [module.encode_text(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(module.encode_text, batches))
    assert all(torch.equal(rows, wanted) for rows, wanted in zip(found, expected, strict=True))


SIGNALLED = """
import gc, os, signal, sys, threading
from clipdistill.models.exported import _load_openvino
from pathlib import Path
signal.signal(signal.SIGCHLD, lambda *_: None)
if sys.argv[2:]:  # as other libraries do it, each with a Core of its own
    import openvino
    from clipdistill.models.exported import signal_stack_kept
    with signal_stack_kept():
        core = openvino.Core()
        held = [core, core.compile_model(sys.argv[1], "CPU")]
        del core
else:
    held = [_load_openvino(Path(sys.argv[1]), "float32")]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
gc.collect()
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
stack = Stack()
ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
ranges = ([int(end, 16) for end in line.split()[0].split("-")] for line in open("/proc/self/maps"))
there = not stack.place or any(low <= stack.place < high for low, high in ranges)
os.kill(os.getpid(), signal.SIGCHLD)
print("alive", there)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_after_a_graph_of_openvino_has_gone_is_survived(squares, tmp_path):
    """Its plug-in sets a stack for signals in the thread that loads it and frees it from another: see the diary."""
    pytest.importorskip("openvino")
    export_graphs(model_of(squares), tmp_path / "e", runtime="openvino")
    for more in ((), ("own core",)):
        command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "e" / "image.xml"), *more]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (0, "alive True\n"), ran.stderr
