"""The ONNX export: what it computes, what it holds, how it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.cli import main
from clipdistill.config import as_dict
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, render
from clipdistill.errors import InputError
from clipdistill.export import graphs
from clipdistill.export.folder import export_folder
from clipdistill.export.gate import Parity, Tolerance, gate_inputs, require
from clipdistill.export.transform import example
from clipdistill.models import load_model, save_model
from clipdistill.models.sized import SizedAttention

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_manifest_says_what_was_checked(exported, tiny):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["model_fingerprint"] == tiny.fingerprint()
    assert manifest["output"] == "raw"
    assert manifest["scores"]["before"] == manifest["scores"]["after"]
    assert manifest["tokenizer_check"] == {"captions": 32, "different": 0}
    for tower in ("image", "text"):
        parity = manifest["towers"][tower]["float32_parity"]
        assert parity["difference"] < 1e-5
        assert parity["cosine"] > 0.99999
        assert {case["batch"] for case in parity["cases"]} == {1, 7}
    assert {c["case"] for c in manifest["towers"]["text"]["float32_parity"]["cases"]} == {"short", "long", "padded"}
    content = b"".join(path.read_bytes() for path in exported.glob("*.onnx"))
    assert str(exported.parents[3]).encode() not in content
    assert b"site-packages" not in content


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_any_batch_size(exported, tiny, batch):
    for tower, values in (
        ("image", np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)),
        ("text", tiny.tokenizer(["a red square", *["the picture is blue, isn't it?"] * (batch - 1)]).numpy()),
    ):
        session = ort.InferenceSession(exported / f"{tower}.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: values})
        encode = tiny.module.eval().encode_image if tower == "image" else tiny.module.eval().encode_text
        with torch.no_grad():
            expected = encode(torch.from_numpy(values)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_exported_model_is_named_like_any_other(exported, tiny, squares, capsys):
    from clipdistill.evaluate.evaluate import evaluate

    scores = evaluate(f"onnx:{exported}", squares, intervals=False, progress=False)
    expected = evaluate(tiny, squares, intervals=False, progress=False)
    assert [s.value for s in scores] == pytest.approx([s.value for s in expected])
    model = load_model(f"onnx:{exported}", teacher=True)
    assert model.parameter_counts() == tiny.parameter_counts()
    assert model.tokenizer(["a red square"]).tolist() == tiny.tokenizer(["a red square"]).tolist()
    assert main(["bench", f"onnx:{exported}", "--batch", "2", "--seconds", "0.02", "--rounds", "3"]) == 0
    assert "onnx:" in capsys.readouterr().out


def test_two_exports_have_two_fingerprints(exported, tmp_path):
    first = load_model(f"onnx:{exported}")
    shutil.copytree(exported, tmp_path / "other")
    shutil.copy(exported / "image.onnx", tmp_path / "other" / "image.onnx.extra")
    assert first.fingerprint() == load_model(f"onnx:{exported}").fingerprint()
    assert first.fingerprint() != load_model(f"onnx:{tmp_path / 'other'}").fingerprint()


def test_graphs_from_elsewhere_with_a_description_of_their_own(exported, tiny, tmp_path):
    for tower in ("image", "text"):
        shutil.copy(exported / f"{tower}.onnx", tmp_path)
    description = {"image": as_dict(tiny.image), "tokenizer": tiny.tokenizer.to_dict(), "logit_scale": 12.5}
    (tmp_path / "model.json").write_text(json.dumps(description))
    teacher = load_model(f"onnx:{tmp_path}", teacher=True)
    assert teacher.tokenizer == tiny.tokenizer
    assert teacher.module.logit_scale.exp().item() == pytest.approx(12.5)
    assert teacher.embed_dim == tiny.embed_dim
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_unusable_exports_are_one_sentence(exported, tmp_path):
    with pytest.raises(InputError, match="named with its runtime"):
        load_model(exported)
    with pytest.raises(InputError, match="is an export already"):
        graphs.export_graphs(load_model(f"onnx:{exported}"), tmp_path / "again")
    with pytest.raises(InputError, match="is fixed"):
        load_model(f"onnx:{exported}", image_size=64)
    shutil.copytree(exported, tmp_path / "broken")
    (tmp_path / "broken" / "image.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="onnxruntime cannot load it"):
        load_model(f"onnx:{tmp_path / 'broken'}")
    (tmp_path / "broken" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has neither manifest\.json"):
        load_model(f"onnx:{tmp_path / 'broken'}")


def test_the_example_runs_without_torch_and_this_package(exported, tiny, squares, tmp_path):
    picture = squares.image(5)
    picture.save(tmp_path / "p.png")
    captions = ["a green square number 1", "“the” picture is BLUE, isn't it?"]
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "bad = {'torch', 'clipdistill', 'open_clip', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(exported / "example.py"), str(tmp_path / "p.png"), *captions],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = [float(line.split()[0]) for line in ran.stdout.splitlines()]
    module = tiny.module.eval()
    with torch.no_grad():
        image = module.encode_image(render(picture, EVALUATION_VIEW, tiny.image)[None])
        text = module.encode_text(tiny.tokenizer(captions))
    expected = torch.nn.functional.cosine_similarity(image, text)
    assert found == pytest.approx(expected.tolist(), abs=2e-6)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_example_prepares_pictures_as_the_evaluation_does(mode, interpolation, tmp_path):
    spec = ImageSpec(size=33, resize_mode=mode, interpolation=interpolation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    source = example(spec)
    assert len([line for line in source.splitlines() if line.strip()]) <= 25
    lines = source[source.index("def pixels") : source.index("def embed")]
    names = {"np": np, "transform": spec.model_dump()}
    exec("from PIL import Image, ImageOps\n" + lines, names)
    rng = np.random.default_rng(0)
    for width, height in ((33, 33), (50, 40), (41, 97), (300, 20), (7, 9), (34, 33)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(tmp_path / "p.png")
        expected = render(picture, EVALUATION_VIEW, spec).numpy()
        np.testing.assert_allclose(names["pixels"](tmp_path / "p.png")[0], expected, atol=1e-6)


def test_a_lost_mask_does_not_pass(exported, tiny, tmp_path, monkeypatch, capsys):
    """A text tower without its causal mask: the gate sees it, nothing is written, the exit code is 2."""
    save_model(tiny, tmp_path / "model")
    real = graphs.write_onnx

    def without_mask(model, folder, **settings):
        damaged = load_model(tmp_path / "model")
        damaged.module.attn_mask.zero_()
        shutil.copy(exported / "image.onnx", folder)
        return real(damaged, folder, towers=("text",), **settings)

    monkeypatch.setattr(graphs, "write_onnx", without_mask)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(out)]) == 2
    shown = capsys.readouterr().err.strip()
    assert "the exported text tower differs from the model by" in shown
    assert len(shown.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_gate_refuses_what_is_not_a_number():
    good = Parity("text", "short", 1, 1e-6, 1e-6, 1.0)
    require([good], Tolerance(), "x")
    for bad in (Parity("image", "noise", 7, float("inf"), float("inf"), -1.0), Parity("image", "noise", 7, 1, 0, 0.9)):
        with pytest.raises(InputError, match="exported"):
            require([good, bad], Tolerance(), "x")


def test_gate_inputs_cover_cut_and_padded_rows(tiny):
    inputs = gate_inputs(tiny)
    ends = {key: (rows == tiny.tokenizer.end).argmax(axis=1) for key, rows in inputs.items() if key[0] == "text"}
    assert set(ends["text", "long", 7]) == {11}
    assert len(set(ends["text", "padded", 7])) > 3
    assert set(ends["text", "short", 1]) == {3}


def test_normalised_output_and_attention_with_sizes_of_its_own(tiny, tmp_path):
    from clipdistill.export.towers import write_onnx
    from clipdistill.models.architecture import build_module

    sizes = {"text": {"head_width": 16, "heads": [1], "mlp": [24]}}
    module = build_module(tiny.architecture | {"block_sizes": sizes}, seed=1).eval()
    assert any(isinstance(part, SizedAttention) for part in module.modules())
    model = dataclasses.replace(tiny, module=module)
    files = write_onnx(model, tmp_path, towers=("text",), normalised=True)
    tokens = tiny.tokenizer(["a red square", "blue", "the picture is grey, isn't it?"])
    session = ort.InferenceSession(files["text"])
    (found,) = session.run(None, {"tokens": tokens.numpy()})
    with torch.no_grad():
        expected = torch.nn.functional.normalize(module.encode_text(tokens), dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_only_an_export_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is no export"), export_folder(tmp_path / "store"):
        pass
    (tmp_path / "store" / "image.onnx").write_text("")
    with export_folder(tmp_path / "store") as folder:
        (folder / "text.onnx").write_text("")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["text.onnx"]
    with pytest.raises(RuntimeError), export_folder(tmp_path / "other"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_places_that_cannot_be_written_are_told_before_the_model_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clipdistill.models.load.load_model", lambda *given, **settings: pytest.fail("was loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for place in ("file", "file/below", "link", "other", "x" * 256):
        assert main(["export", "scenes-teacher", "--to", "onnx", "--out", str(tmp_path / place)]) == 2
        shown = capsys.readouterr().err
        assert str(tmp_path / place.split("/")[0]) in shown
        assert len(shown.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["write_graphs", "compare"])
def test_a_killed_export_leaves_only_what_the_next_one_takes_away(tiny, tmp_path, place):
    """Killed while it measures and quantises: everything temporary lies in one folder beside the place."""
    save_model(tiny, tmp_path / "model")
    code = (
        "import os, signal; from clipdistill.cli import main; from clipdistill.export import graphs\n"
        "def kill(*given, **settings): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"graphs.{place} = kill\n"
        f"main(['export', {str(tmp_path / 'model')!r}, '--to', 'onnx', '--out', {str(tmp_path / 'out')!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -9
    (left,) = (path.name for path in tmp_path.iterdir() if path.name != "model")
    assert left.startswith(".out.writing-")
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_settings_that_contradict(tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, fragment in (
        (["--to", "hf", "--int8"], "--int8 goes with"),
        (["--to", "onnx", "--tolerance", "2"], "--tolerance must be"),
        (["--to", "onnx", "--int8"], "int8 needs pairs"),
        (["--to", "onnx", "--int8", "--data", "scenes", "--budget", "nan"], "--budget is a number of points"),
        (["--to", "onnx", "--tolerance", "nan"], "--tolerance must be"),
        (["--to", "hf", "--data", "scenes"], "--data goes with"),
        (["--to", "onnx", "--limit", "4"], "--limit means nothing without --data"),
        (["--to", "onnx", "--push", "no name"], "is not the name of a repository"),
    ):
        assert main(["export", "scenes-teacher", "--out", out, *arguments]) == 2
        assert fragment in capsys.readouterr().err
