"""The folder of `--to web`: what lies in it, what its weights keep, what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.models import load_model, save_model
from clipdistill.models.exported import read_exported

for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
    pytest.importorskip(package)

from clipdistill.export.accuracy import Accuracy  # noqa: E402
from clipdistill.export.hub import model_card  # noqa: E402
from clipdistill.export.web import runtime  # noqa: E402
from clipdistill.export.web.runtime import FILES, web_runtime  # noqa: E402
from clipdistill.export.web.site import KNOWN, PAGE, _require_known, export_web  # noqa: E402
from clipdistill.export.web.weights import shrink_weights  # noqa: E402


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """A folder that looks like onnxruntime-web."""
    folder = tmp_path_factory.mktemp("runtime") / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    for name in FILES:
        (folder / "dist" / name).write_text(name)
    return folder


@pytest.mark.slow
def test_the_folder_is_whole_and_an_export(tiny, squares, libraries, tmp_path):
    result = export_web(tiny, tmp_path / "site", libraries / "dist", test=squares)
    folder = tmp_path / "site"
    assert {path.name for path in folder.iterdir()} == {
        "image.onnx", "text.onnx", "tokenizer.json", "transform.json", "manifest.json", "runtime",
        *(path.name for path in PAGE.iterdir()),
    }  # fmt: skip
    assert {path.name for path in (folder / "runtime").iterdir()} == {
        "LICENSE", *(name.replace(".mjs", ".js") for name in FILES),
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["web"]["weights"] == "float16"
    assert manifest["towers"]["image"]["bytes"] == (folder / "image.onnx").stat().st_size
    assert manifest["scores"]["before"] == pytest.approx(manifest["scores"]["after"])
    assert result.after is not None
    assert min(parity.cosine for parity in result.parities) > 0.9999
    card = model_card(folder, "me/site")
    assert "a page that searches pictures" in card
    assert "example.py" not in card
    again = read_exported(folder, "site", "onnx")
    assert again.image == tiny.image
    # no address but the hosts of the licences: nothing is loaded from elsewhere
    for name in ("index.html", "app.js", "engine.js", "style.css", "store.js"):
        assert "https://" not in (folder / name).read_text()


@pytest.mark.parametrize(
    ("int8", "cosine", "share"), [pytest.param(False, 0.99999, 0.62, marks=pytest.mark.slow), (True, 0.995, 0.46)]
)
def test_weights_shrink_and_embeddings_stay(tiny, libraries, tmp_path, exported, int8, cosine, share):
    result = export_web(tiny, tmp_path / "site", libraries / "dist", int8=int8)
    assert min(parity.cosine for parity in result.parities) >= cosine
    for tower in ("image", "text"):
        assert (tmp_path / "site" / f"{tower}.onnx").stat().st_size < share * (
            exported / f"{tower}.onnx"
        ).stat().st_size


def test_weights_keep_what_sixteen_bits_cannot_hold(tmp_path):
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    values = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
    large, odd = values * 1e5, values[:, ::-1].copy()
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "large"], ["b"]),
        helper.make_node("Gather", ["odd", "one"], ["c"], axis=1),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Gemm", ["x", "turned"], ["e"], transB=1),
        helper.make_node("Add", ["d", "e"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(v, n)
        for n, v in (("w", values), ("large", large), ("odd", odd), ("turned", 2 * values))
    ]
    constants.append(numpy_helper.from_array(np.array([3]), "one"))
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], constants)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / "in.onnx"))
    x = np.eye(32, dtype=np.float32)
    for precision, error in (("float16", 2e-3), ("int8", 2e-2)):
        shrink_weights(tmp_path / "in.onnx", tmp_path / "out.onnx", precision)
        (found,) = onnxruntime.InferenceSession(str(tmp_path / "out.onnx")).run(None, {"x": x})
        assert (
            np.abs(found - large - values - odd[:, 3:4] - 2 * values.T).max() < error + 0.06
        )  # float32 near a million
        names = {tensor.name for tensor in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
        assert "large" in names
        assert ("w.int8" in names) == (precision == "int8")
        assert "odd.half" in names


def test_eight_bits_leave_out_what_they_fit_worst(tmp_path, tiny, exported):
    import onnx

    from clipdistill.export.web.weights import light_tower

    def eight(path):
        return {t.name for t in onnx.load(str(path)).graph.initializer if t.data_type == onnx.TensorProto.INT8}

    shrink_weights(exported / "image.onnx", tmp_path / "all.onnx", "int8")
    shrink_weights(exported / "image.onnx", tmp_path / "few.onnx", "int8", most_error=0.005)
    assert eight(tmp_path / "few.onnx") < eight(tmp_path / "all.onnx")
    assert not any("conv1" in name for name in eight(tmp_path / "all.onnx"))  # it reads three channels
    parities = light_tower(tiny, "image", exported / "image.onnx", tmp_path / "light.onnx", "int8")
    assert min(parity.cosine for parity in parities) >= 0.99
    assert eight(tmp_path / "light.onnx") == eight(tmp_path / "all.onnx")


@pytest.mark.slow
def test_int8_that_loses_more_than_the_budget_leaves_nothing(tiny, squares, libraries, tmp_path, monkeypatch):
    from clipdistill.export.web import site

    monkeypatch.setattr(site, "accuracy", lambda image, text, data: Accuracy(0.0, 0.0, 16, 32, data))
    with pytest.raises(InputError, match=r"lose \d+\.\d\d points of R@1 on squares/test.*leave --int8 out"):
        export_web(tiny, tmp_path / "site", libraries / "dist", int8=True, test=squares)
    assert list(tmp_path.iterdir()) == []


def test_command(tiny, libraries, tmp_path, capsys):
    save_model(tiny, tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--to", "web", "--out", str(tmp_path / "site")]
    assert main([*arguments, "--web-runtime", str(libraries), "--int8"]) == 0
    assert "python -m http.server" in capsys.readouterr().out
    loaded = load_model(f"onnx:{tmp_path / 'site'}", teacher=True)
    assert loaded.embed_dim == tiny.embed_dim
    own = sorted(path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*"))
    for name in ("mine.txt", "runtime/mine.js", "runtime/more/LICENSE"):
        (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "site" / name).write_text("mine")
    assert main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "site")]) == 0
    kept = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*")}
    assert kept >= {"mine.txt", "runtime/mine.js", "runtime/more/LICENSE", "open_clip_config.json"}
    assert not kept & set(map(str, own)) - {"runtime", "manifest.json", "tokenizer.json", "README.md"}
    for option, message in (
        ("--normalised", "or --to coreml, not with --to web"),
        ("--calibrate=x", "--calibrate goes with --to onnx or --to openvino, not with --to web"),
    ):
        assert main([*arguments, option]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "model"), "--to", "hf", "--out", "x", "--web-runtime", "y"]) == 2
    assert "--web-runtime goes with --to web, not with --to hf" in capsys.readouterr().err


def test_a_tokenizer_that_the_page_cannot_run_is_refused():
    model = {"type": "BPE"}
    known = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    _require_known({"model": model, "normalizer": known}, "m")
    unknown = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled"}]}
    with pytest.raises(InputError, match=r"'m': .*whose normalizer is of the kind 'Precompiled'.*use --to onnx"):
        _require_known({"model": model, "normalizer": unknown}, "m")
    with pytest.raises(InputError, match="'Unigram'"):
        _require_known({"model": {"type": "Unigram"}}, "m")
    with pytest.raises(InputError, match="falls back to bytes"):
        _require_known({"model": {"type": "BPE", "byte_fallback": True}}, "m")
    script = (PAGE / "tokenizer.js").read_text()
    for kinds in KNOWN.values():
        for kind in kinds:
            assert f'"{kind}"' in script or f"{kind}:" in script, kind


class TestRuntime:
    """Where the files of onnxruntime-web come from."""

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_a_named_folder(self, libraries, tmp_path):
        assert web_runtime(libraries) == web_runtime(libraries / "dist") == libraries / "dist"
        with pytest.raises(InputError, match=r"has not the files of onnxruntime-web .*npm install onnxruntime-web@"):
            web_runtime(tmp_path)

    def test_node_modules_above(self, libraries, tmp_path, monkeypatch):
        (tmp_path / "node_modules").mkdir()
        (tmp_path / "node_modules" / "onnxruntime-web").symlink_to(libraries)
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "b")
        assert web_runtime() == tmp_path / "node_modules" / "onnxruntime-web" / "dist"

    def test_without_npm(self, monkeypatch):
        monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
        with pytest.raises(InputError, match=r"is not on this machine, and neither is npm.*--web-runtime"):
            web_runtime()

    def fetching(self, monkeypatch, libraries, *, digest=True, fails=False):
        calls = []

        def pack(command, cwd, **_):
            calls.append(command)
            if fails:
                return subprocess.CompletedProcess(command, 1, "", "\nnpm error network is unreachable\n")
            with tarfile.open(Path(cwd) / "p.tgz", "w:gz") as archive:
                archive.add(libraries, "package")
            if digest:
                found = hashlib.sha512((Path(cwd) / "p.tgz").read_bytes()).digest()
                monkeypatch.setattr(runtime, "_SHA512", base64.b64encode(found).decode())
            return subprocess.CompletedProcess(command, 0, "p.tgz", "")

        monkeypatch.setattr(runtime.shutil, "which", lambda _: "/usr/bin/npm")
        monkeypatch.setattr(runtime.subprocess, "run", pack)
        return calls

    def test_fetched_once(self, monkeypatch, libraries, capsys):
        calls = self.fetching(monkeypatch, libraries)
        first = web_runtime()
        assert web_runtime() == first
        assert len(calls) == 1
        assert {path.name for path in first.iterdir()} == set(FILES)
        assert "fetching it with npm (40 MB)" in capsys.readouterr().out

    def test_something_else_fetched(self, monkeypatch, libraries, tmp_path):
        self.fetching(monkeypatch, libraries, digest=False)
        with pytest.raises(InputError, match="its digest does not fit"):
            web_runtime()
        assert not (tmp_path / "cache").exists()

    def test_npm_fails(self, monkeypatch, libraries):
        self.fetching(monkeypatch, libraries, fails=True)
        with pytest.raises(InputError, match=r"npm could not fetch it \(npm error network is unreachable\): run"):
            web_runtime()
