"""Exports for phones: with stand-ins up to the call of each converter, and (slow) with the converters themselves."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipdistill import export
from clipdistill.bench.throughput import throughput
from clipdistill.cli import main
from clipdistill.errors import InputError, MissingExtraError
from clipdistill.export.command import _NEEDS
from clipdistill.export.folder import is_export
from clipdistill.export.graphs import export_graphs
from clipdistill.export.phone import coreml
from clipdistill.export.phone.parts import muted
from clipdistill.export.transform import example
from clipdistill.models import load_model
from clipdistill.models.known import PHONES
from clipdistill.models.towers.modules import Head
from tests.export import stand_ins

CAPTIONS = ["a red square", "blue", "the picture is grey, isn't it?"]
MODULES = {"litert": "litert_torch", "executorch": "executorch", "coreml": "coremltools"}


def embeddings(model) -> dict[str, torch.Tensor]:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return {
            "image": model.module.eval().encode_image(pixels),
            "text": model.module.encode_text(model.tokenizer(CAPTIONS)),
        }


@pytest.mark.parametrize("runtime", ["litert", "executorch"])
def test_an_export_for_a_phone_is_a_model_with_the_models_embeddings(runtime, tiny, squares, tmp_path, monkeypatch):
    stand_ins.INSTALL[runtime](monkeypatch)
    made = export_graphs(tiny, tmp_path / "out", runtime=runtime, test=squares)
    assert made.before == made.after
    assert any("ms a picture" in note for note in made.notes)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == runtime
    assert manifest["ran"] is True
    assert manifest["towers"]["image"]["input_shape"] == [1, 3, 32, 32]
    assert manifest["towers"]["text"]["input_type"] == ("int32" if runtime == "litert" else "int64")
    for tower in ("image", "text"):
        assert manifest["latency"][tower]["ms"] > 0
        assert manifest["towers"][tower]["bytes"] > 0
        assert manifest["towers"][tower]["float32_parity"]["cosine"] > 0.99999
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "transform.json", "example.py"}
    assert is_export(tmp_path / "out")
    back = load_model(f"{runtime}:{tmp_path / 'out'}", teacher=True)
    for found, expected in zip(embeddings(back).values(), embeddings(tiny).values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=f"named with its runtime:  {runtime}:"):
        load_model(tmp_path / "out")


def test_core_ml_is_converted_and_said_to_be_unverified_where_it_does_not_run(tiny, squares, tmp_path, monkeypatch):
    stand_ins.coreml(monkeypatch)
    monkeypatch.setattr(coreml, "runs_here", lambda: False)
    made = export_graphs(tiny, tmp_path / "out", runtime="coreml", int8=True)
    assert stand_ins.CALLS[-2:] == ["FLOAT16", "linear_symmetric"]
    assert made.notes == [coreml.NOT_RUN]
    assert len(made.parities) == 10  # of what was handed to the converter
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["ran"] is False
    assert "latency" not in manifest
    assert "image.mlpackage/Data/weight.bin" in manifest["towers"]["image"]["files"]
    with pytest.raises(InputError, match="Core ML runs on macOS only"):
        load_model(f"coreml:{tmp_path / 'out'}")
    with pytest.raises(InputError, match="leave --data out here"):
        export_graphs(tiny, tmp_path / "other", runtime="coreml", test=squares)


def test_core_ml_is_compared_where_it_runs(tiny, squares, tmp_path, monkeypatch):
    stand_ins.coreml(monkeypatch)
    monkeypatch.setattr(coreml, "runs_here", lambda: True)
    made = export_graphs(tiny, tmp_path / "out", runtime="coreml", test=squares, normalised=True)
    assert made.before == made.after
    back = load_model(f"coreml:{tmp_path / 'out'}", teacher=True)
    expected = torch.nn.functional.normalize(embeddings(tiny)["text"], dim=1)
    torch.testing.assert_close(embeddings(back)["text"], expected, atol=1e-5, rtol=1e-4)
    weights = tmp_path / "out" / "text.mlpackage" / "Data" / "weight.bin"
    weights.write_bytes(weights.read_bytes().replace(b"graph", b"Graph"))
    with pytest.raises(InputError, match=r"weight.bin: not as manifest.json recorded it"):
        load_model(f"coreml:{tmp_path / 'out'}")


def test_fewer_bits_are_asked_for_by_name_and_compared_by_cosine(tiny, squares, tmp_path, monkeypatch):
    stand_ins.litert(monkeypatch)
    for options, recipe in (({"fp16": True}, "float_casting"), ({"int8": True}, "dynamic_wi8_afp32")):
        export_graphs(tiny, tmp_path / recipe, runtime="litert", test=squares, **options)
        assert stand_ins.CALLS[-2:] == [recipe, recipe]
        manifest = json.loads((tmp_path / recipe / "manifest.json").read_text())
        assert manifest["towers"]["image"]["precision"] == ("float16" if "fp16" in options else "int8")
    stand_ins.litert(monkeypatch, wrong=0.05)
    before = len(stand_ins.CALLS)
    with pytest.raises(InputError, match=r"int8 weights the \w+ tower differs from the model .*: leave --int8 out"):
        export_graphs(tiny, tmp_path / "wrong", runtime="litert", int8=True)
    assert not (tmp_path / "wrong").exists()
    tried = stand_ins.CALLS[before:]
    assert tried.count("dynamic_wi8_afp32") >= 3  # with fewer and fewer operators in eight bits
    assert tried.count("float_casting") >= 3


def test_executorch_in_fewer_bits(tiny, tmp_path, monkeypatch):
    stand_ins.executorch(monkeypatch)
    export_graphs(tiny, tmp_path / "int8", runtime="executorch", int8=True)
    assert {"is_per_channel": True, "is_dynamic": True} in stand_ins.CALLS
    assert stand_ins.CALLS[-1] == ["xnnpack"]
    export_graphs(tiny, tmp_path / "half", runtime="executorch", fp16=True)
    manifest = json.loads((tmp_path / "half" / "manifest.json").read_text())
    assert manifest["towers"]["text"]["float16_parity"]["cosine"] < 1


def test_converters_get_weights_with_the_channels_first(tiny, tmp_path, monkeypatch):
    from clipdistill.export.phone import convert

    model = dataclasses.replace(tiny, module=copy.deepcopy(tiny.module).to(memory_format=torch.channels_last))
    seen = []
    monkeypatch.setitem(convert.CONVERTERS, "executorch", lambda module, *_: seen.extend(module.parameters()))
    convert.write_phone(model, tmp_path, "executorch")
    assert seen
    assert all(weight.is_contiguous() for weight in seen)  # ExecuTorch refuses others


def test_the_head_of_one_network_splits_nothing():
    head = Head([8], 4, "mlp", 6).eval()
    program = torch.export.export(head, (torch.zeros(1, 8),), strict=False)
    assert not any("split" in str(node.target) for node in program.graph.nodes)  # LiteRT has no split into one


def test_a_loss_beyond_the_budget_is_refused(tiny, squares, tmp_path, monkeypatch):
    stand_ins.litert(monkeypatch)
    from clipdistill.export import graphs
    from clipdistill.export.accuracy import Accuracy

    found = iter([Accuracy(0.5, 0.5, 16, 32, "squares"), Accuracy(0.4, 0.5, 16, 32, "squares")])
    monkeypatch.setattr(graphs, "accuracy", lambda *_: next(found))
    with pytest.raises(InputError, match=r"eight bits lose 5\.00 points of R@1 on squares/test, and --budget allows 1"):
        export_graphs(tiny, tmp_path / "out", runtime="litert", int8=True, test=squares)


@pytest.mark.parametrize("runtime", PHONES)
def test_a_package_that_is_missing_or_fails_is_one_sentence(runtime, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[runtime], None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'clipdistill\[{runtime}\]'"):
        export_graphs(tiny, tmp_path / "out", runtime=runtime)
    monkeypatch.undo()
    stand_ins.INSTALL[runtime](monkeypatch)
    monkeypatch.setattr(stand_ins, "keep", lambda _: 1 / 0)
    sentence = f"the image tower of .* cannot be converted for {runtime}: division by zero"
    with pytest.raises(InputError, match=sentence):
        export_graphs(tiny, tmp_path / "out", runtime=runtime)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["litert", "executorch"])
def test_a_damaged_graph_is_one_sentence(runtime, tmp_path, monkeypatch):
    from clipdistill.models.exported import load_graph

    stand_ins.INSTALL[runtime](monkeypatch)
    (tmp_path / "image").write_bytes(b"damage")
    with pytest.raises(InputError, match=r"image: \w+ cannot load it \(this is no graph\)"):
        load_graph(tmp_path / "image", runtime)


@pytest.mark.parametrize("to", ["onnx", "web", "openvino", *PHONES])
def test_missing_packages_and_operator_sets_are_told_before_anything_is_loaded(to, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clipdistill.export.graphs", None)  # whose import would load torch
    arguments = ["export", "ViT-T-16", "--to", to, "--out", str(tmp_path / "out")]
    for opset in (3, 16, 26, -1, 10**12) if to not in PHONES else ():
        assert main([*arguments, f"--opset={opset}"]) == 2
        assert f"--opset must be from 17 to 25, got {opset}" in capsys.readouterr().err
    for module in _NEEDS[to][2].split():
        with monkeypatch.context() as patched:
            for other in _NEEDS[to][2].split():
                patched.setitem(sys.modules, other, None if other == module else sys)
            assert main(arguments) == 2
        said = capsys.readouterr()
        assert f"the package '{module.replace('_', '-')}': install it with  pip install 'clipdistill[" in said.err
        assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_options_that_a_phone_does_not_have(tmp_path):
    for options, sentence in (
        ({"opset": 20}, "--opset goes with --to onnx or --to openvino or --to web, not with --to litert"),
        ({"calibrate": "x", "int8": True}, "--calibrate goes with --to onnx or --to openvino"),
        ({"fp16": True, "int8": True}, "leave one of them out"),
    ):
        with pytest.raises(InputError, match=sentence):
            export("ViT-T-16", "litert", tmp_path / "out", quiet=True, **options)
    with pytest.raises(InputError, match="--fp16 goes with --to litert or --to executorch or --to coreml"):
        export("ViT-T-16", "onnx", tmp_path / "out", fp16=True, quiet=True)
    with pytest.raises(InputError, match=r"no such folder: it needs a folder .* --to litert"):
        load_model(f"litert:{tmp_path / 'none'}")


def test_the_benchmark_runs_a_model_and_its_export(tiny, tmp_path, monkeypatch):
    stand_ins.litert(monkeypatch)
    export_graphs(tiny, tmp_path / "out", runtime="litert")
    models = {"model": tiny, "export": load_model(f"litert:{tmp_path / 'out'}", teacher=True)}
    result = throughput(
        models, backends=("litert",), batch_sizes=(2,), seconds=0.02, rounds=3, device="cpu", towers=("image",)
    )
    assert {row["model"] for row in result["measurements"]} == {"model", "export"}
    assert not result["failures"]


def test_what_libraries_print_past_python_stays_hidden(capfd):
    with muted():
        os.write(1, b"from C")
        os.write(2, b"from C")
        print("from Python")
    print("after")
    assert capfd.readouterr() == ("after\n", "")


@pytest.mark.parametrize("runtime", PHONES)
def test_the_example_is_a_program(runtime, tiny):
    ast.parse(example(tiny.image, runtime))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a converter takes minutes where the processor has other work
@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"int8": True}], ids=["float32", "float16", "int8"])
@pytest.mark.parametrize("runtime", PHONES)
def test_the_real_converters(runtime, options, tiny, squares, tmp_path):
    pytest.importorskip(MODULES[runtime], reason=f"needs  pip install 'clipdistill[{runtime}]'")
    runs = runtime != "coreml" or coreml.runs_here()
    made = export_graphs(tiny, tmp_path / "out", runtime=runtime, budget=100, test=squares if runs else None, **options)
    assert min(parity.cosine for parity in made.parities) > (0.99 if options else 0.99999)
    if not runs:
        return
    back = load_model(f"{runtime}:{tmp_path / 'out'}", teacher=True)
    for found, expected in zip(embeddings(back).values(), embeddings(tiny).values(), strict=True):
        assert torch.nn.functional.cosine_similarity(found, expected).min() > (0.99 if options else 0.99999)
    squares.image(3).save(tmp_path / "p.png")
    command = [sys.executable, str(tmp_path / "out" / "example.py"), str(tmp_path / "p.png"), *CAPTIONS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    shown = [float(line.split()[0]) for line in ran.stdout.splitlines()]
    assert len(shown) == len(CAPTIONS)
    assert np.isfinite(shown).all()
