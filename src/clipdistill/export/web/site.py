"""`--to web`: a folder that any static host serves, with which a browser indexes and searches pictures by itself.

It is an ONNX export (`onnx:DIR` reads it) with lighter weights, the page beside it and onnxruntime-web in runtime/.
The manifest carries the embeddings of a made picture and a caption: the page computes both before it is used, and
takes WASM where WebGPU gives others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError
from clipdistill.export.accuracy import accuracy, embed
from clipdistill.export.folder import PAGE, export_folder
from clipdistill.export.gate import Parity, Tolerance, require_cosine, summary
from clipdistill.export.graphs import Exported, export_graphs
from clipdistill.export.hub import public_text
from clipdistill.export.tokenizer_json import FILE as TOKENIZER
from clipdistill.export.towers import OPSET
from clipdistill.export.transform import EXAMPLE
from clipdistill.export.web.runtime import PACKAGE, VERSION, copy_runtime
from clipdistill.export.web.weights import light_tower
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import load_graph, read_exported
from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import TOWERS
from clipdistill.runtime.console import file_size
from clipdistill.runtime.files import read_json, sha256, write_json

CAPTION = "a photo of a dog"
KNOWN = {
    "normalizer": {
        "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend",
        "BertNormalizer", "Replace",
    },
    "pre_tokenizer": {
        "Sequence", "Split", "ByteLevel", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits",
    },
    "model": {"BPE", "WordPiece", "WordLevel"},
    "post_processor": {"Sequence", "ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing"},
}  # fmt: skip
"""Parts of a tokenizer.json that page/tokenizer.js runs."""


def export_web(
    model: ClipModel,
    out: Path,
    runtime: Path,
    *,
    int8: bool = False,
    test: PairSource | None = None,
    budget: float = 1.0,
    tolerance: Tolerance | None = None,
    opset: int = OPSET,
) -> Exported:
    """Export `model` and the page into the folder `out`; runtime: the folder of onnxruntime-web (`web_runtime`).

    int8: weights of eight bits instead of sixteen. test: pairs on which R@1 is measured before and after; with int8 it
    may fall by `budget` points. Raises InputError when a tower or the tokenizer cannot run in the page, or differs.
    """
    precision = "int8" if int8 else "float16"
    with export_folder(out) as folder, tempfile.TemporaryDirectory(dir=folder, prefix=".graphs-") as temporary:
        result = export_graphs(model, Path(temporary) / "onnx", test=test, tolerance=tolerance, opset=opset)
        graphs = result.folder
        _require_known(read_json(graphs / TOKENIZER), model.name)
        for path in graphs.iterdir():
            if path.is_file() and path.name not in (EXAMPLE, MANIFEST) and not path.name.startswith(TOWERS):
                shutil.copyfile(path, folder / path.name)
        parities: list[Parity] = []
        for tower in TOWERS:
            parities += light_tower(model, tower, graphs / f"{tower}.onnx", folder / f"{tower}.onnx", precision)
        runners = {tower: load_graph(folder / f"{tower}.onnx", "onnx") for tower in TOWERS}
        require_cosine(parities, precision, str(out), "leave --int8 out" if int8 else "use --to onnx")
        manifest = read_json(graphs / MANIFEST)
        manifest.pop("sha256", None)
        for tower, facts in summary(parities).items():
            path = folder / f"{tower}.onnx"
            manifest["towers"][tower] |= {"files": {path.name: sha256(path)}, "bytes": path.stat().st_size}
            manifest["towers"][tower] |= {"precision": precision, f"{precision}_parity": facts}
        manifest["name"] = public_text(model.name)
        manifest["web"] = {"weights": precision, "runtime": f"{PACKAGE} {VERSION}", "check": _check(model, runners)}
        write_json(folder / MANIFEST, manifest, checked=True)
        if test is not None and result.before is not None:
            light = embed(read_exported(folder, f"onnx:{out}", "onnx"), test)
            result.after = accuracy(light, light, test.name)
            lost = result.before.mean - result.after.mean
            if int8 and lost > budget:
                raise InputError(
                    f"{out}: weights of eight bits lose {lost:.2f} points of R@1 on {test.name}, and --budget allows "
                    f"{budget:g}: leave --int8 out"
                )
            manifest["scores"]["after"] = result.after.to_json()
            write_json(folder / MANIFEST, manifest, checked=True)
        for path in sorted(PAGE.iterdir()):
            shutil.copyfile(path, folder / path.name)
        copy_runtime(runtime, folder / "runtime")
        size = sum((folder / f"{tower}.onnx").stat().st_size for tower in TOWERS)
    result.folder, result.parities = out, parities
    result.notes += [
        f"weights: {precision}, {file_size(size)} (a browser also loads 14 MB of the runtime, 27 MB with WebGPU)",
        f"to try it:  python -m http.server --directory {out}  and open http://localhost:8000/",
    ]
    return result


def _require_known(definition: Mapping[str, Any], name: str) -> None:
    """Raise InputError for a tokenizer with a part that the page does not run."""
    for part, known in KNOWN.items():
        for kind in _kinds(definition.get(part)):
            if kind not in known:
                raise InputError(
                    f"'{name}': the page does not run its tokenizer, whose {part.replace('_', '-')} is of the kind "
                    f"'{kind}' (it runs {', '.join(sorted(known))}): use --to onnx"
                )
    if definition["model"].get("byte_fallback"):
        raise InputError(f"'{name}': the page does not run its tokenizer, which falls back to bytes: use --to onnx")


def _kinds(part: Any) -> list[str]:
    """The kind of a part and of those that it is a sequence of."""
    if not isinstance(part, Mapping):
        return []
    inner: list[Any] = next((part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part), [])
    return [str(part.get("type")), *(kind for one in inner for kind in _kinds(one))]


def _check(model: ClipModel, runners: Mapping[str, Any]) -> dict[str, Any]:
    """What the page compares itself with: unit-length embeddings of a picture made by one rule, and of a caption."""
    size = model.image.size
    i = np.arange(3 * size * size)
    picture = (i % (size * size) * 31 % 257 + i // (size * size) * 64) / 128 - 1
    image = runners["image"](picture.reshape(1, 3, size, size).astype(np.float32))
    text = runners["text"](model.tokenizer([CAPTION]).numpy())

    def rounded(rows: np.ndarray) -> list[float]:
        return [round(float(value), 6) for value in rows[0] / np.linalg.norm(rows[0])]

    return {"image": rounded(image), "caption": CAPTION, "text": rounded(text)}
