"""`clipdistill export` and `clipdistill.export(...)`: a run or any model as files that other programs load."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipdistill.arguments import checked
from clipdistill.errors import InputError, MissingExtraError
from clipdistill.models.known import PHONES
from clipdistill.models.names import check_model_name
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_new_folder

if TYPE_CHECKING:
    from clipdistill.export.graphs import Exported

SIZE, BUDGET, TOLERANCE = 128, 1.0, 1e-4
OPSETS = (17, 25)
"""The first and the last operator set of ONNX that graphs are made of."""
_NEEDS = {
    "onnx": ("export", "the export to ONNX", "onnx onnxscript onnxruntime"),
    "web": ("export", "the export for browsers", "onnx onnxscript onnxruntime"),
    "openvino": ("openvino", "the export to OpenVINO", "openvino"),
    "litert": ("litert", "the export to LiteRT", "litert_torch ai_edge_litert"),
    "executorch": ("executorch", "the export to ExecuTorch", "executorch"),
    "coreml": ("coreml", "the export to Core ML", "coremltools"),
}
"""Form -> the extra, what it is for, the modules."""
TARGETS = ("onnx", "openvino", "web", *PHONES, "open_clip", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, to what, where, and what it may lose."""
    add = parser.add_argument
    add("model", help="a run folder, a model folder or file, or a model name (ViT-B-16/laion400m_e32)")
    add("--to", required=True, choices=TARGETS, help="the form (docs/deployment.md)")
    add("--out", required=True, type=Path, help="folder to write; it appears only if the export passes its checks")
    add("--data", help="pairs: R@1 is measured on them before and after (test split, else val)")
    add("--split", help="split of the data to measure on")
    add("--limit", type=int, help="measure on at most so many images, spread evenly over the data")
    add(
        "--int8",
        action="store_true",
        help="quantise both towers, calibrated on --calibrate or --data; for browsers and phones without calibration",
    )
    add("--fp16", action="store_true", help="phones: sixteen bits (browsers have them by default)")
    add("--ternary", action="store_true", help="onnx: the weights that train.ternary made ternary in two bits each")
    add("--calibrate", help="pairs to calibrate int8 on (default: --data, its training split where it has one)")
    add("--calibration-size", type=int, default=SIZE, help="pairs to calibrate on (default: 128)")
    add("--budget", type=float, default=BUDGET, help="points of R@1 that int8 may lose (default: 1)")
    add("--normalised", action="store_true", help="embeddings of unit length (default: raw, as the model's own)")
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference of an entry of unit-length embeddings (default: 1e-4)",
    )
    add("--opset", type=int, default=None, help="ONNX operator set (default: 20; from 23 attention is one operator)")
    add(
        "--web-runtime",
        type=Path,
        metavar="DIR",
        help="npm's onnxruntime-web (default: node_modules, else npm fetches it)",
    )
    add("--push", metavar="OWNER/NAME", help="also upload the folder, with a model card, to the Hugging Face hub")
    add("--licence", metavar="ID", help="with --push: licence of the weights as the hub names it (apache-2.0)")
    add("--private", action="store_true", help="with --push: a private repository")


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was kept."""
    known = inspect.signature(export).parameters
    export(**{name: value for name, value in vars(arguments).items() if name in known})
    return 0


@checked
def export(
    model: str | Path,
    to: Literal["onnx", "openvino", "web", "litert", "executorch", "coreml", "open_clip", "hf"],
    out: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    int8: bool = False,
    fp16: bool = False,
    ternary: bool = False,
    calibrate: str | None = None,
    calibration_size: int = SIZE,
    budget: float = BUDGET,
    normalised: bool = False,
    tolerance: float = TOLERANCE,
    opset: int | None = None,
    web_runtime: str | Path | None = None,
    push: str | None = None,
    licence: str | None = None,
    private: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write a model in a form that other programs load, in the new folder `out`; it appears only if the checks pass.

    model: a run, a model folder or any name. to: the form (docs/deployment.md). data: pairs on which R@1 is measured
    before and after, of their split `split` (None: test, else val), at most `limit` images.
    int8: quantise, calibrated on `calibration_size` pairs of `calibrate` (None: of data), losing at most `budget`
    points of R@1; fp16: sixteen bits, for "litert", "executorch" and "coreml", whose int8 needs no data;
    ternary: weights -1, 0 and 1 times a scale in two bits, for "onnx". normalised: embeddings of unit length;
    tolerance: largest difference of an entry of these; opset: ONNX operator set (None: 20).
    web_runtime: the folder of npm's onnxruntime-web for "web" (None: node_modules, else npm fetches it), where int8
    means the weights and needs no data. push: OWNER/NAME on the Hugging Face hub, to upload the folder with a model
    card to; licence: of the weights, as the hub names it; private: as a private repository. quiet: print nothing.

    Returns an Exported: folder, parities with the model, R@1 before and after. Raises InputError for what cannot be
    exported or misses the tolerance.
    """
    tell: Callable[[str], None] = (lambda _: None) if quiet else say
    model, out = str(model), Path(out)
    check_model_name(model)
    if to not in TARGETS:
        raise InputError(f"unknown form '{to}': one of {', '.join(TARGETS)}")
    graphs = ("onnx", "openvino")
    checked = (*graphs, "web", *PHONES)
    for option, given, forms in (
        *((name, value, checked) for name, value in (("int8", int8), ("data", data))),
        ("tolerance", tolerance != TOLERANCE, checked),
        ("opset", opset, (*graphs, "web")),
        ("fp16", fp16, PHONES),
        ("ternary", ternary, ("onnx",)),
        ("normalised", normalised, (*graphs, *PHONES)),
        ("calibrate", calibrate, graphs),
        ("calibration-size", calibration_size != SIZE, graphs),
        ("web-runtime", web_runtime, ("web",)),
    ):
        if given and to not in forms:
            raise InputError(f"--{option} goes with --to {' or --to '.join(forms)}, not with --to {to}")
    for option, given, needed, other in (
        ("split", split, data, "data"),
        ("limit", limit, data, "data"),
        ("calibrate", calibrate, int8, "int8"),
        ("calibration-size", calibration_size != SIZE, int8, "int8"),
        ("budget", budget != BUDGET, int8, "int8"),
        ("private", private, push, "push"),
        ("licence", licence, push, "push"),
    ):
        if given and not needed:
            raise InputError(f"--{option} means nothing without --{other}")
    if int8 and (fp16 or ternary):
        raise InputError(
            f"--{'fp16' if fp16 else 'ternary'} and --int8 are two forms of the weights: leave one of them out"
        )
    if int8 and to in graphs and data is None:
        raise InputError("int8 needs pairs to calibrate on and to measure what is lost: name them with --data")
    if not 0 < tolerance < 1:
        raise InputError(f"--tolerance must be above 0 and below 1, got {tolerance:g}")
    if calibration_size < 1 or (limit is not None and limit < 1):
        raise InputError("--calibration-size and --limit must be at least 1")
    if not 0 <= budget <= 100:
        raise InputError(f"--budget is a number of points of R@1 that may be lost, from 0 to 100, got {budget:g}")
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise InputError(f"--opset must be from {OPSETS[0]} to {OPSETS[1]}, got {opset}")
    extra, purpose, modules = _NEEDS.get(to, ("", "", ""))
    for module in modules.split():  # looked for, not imported: those of the phones take minutes
        if sys.modules.get(module, module) is None or not (module in sys.modules or find_spec(module)):
            raise MissingExtraError(module.replace("_", "-"), extra, purpose)
    from clipdistill.export import hub
    from clipdistill.export.folder import is_export

    require_new_folder(out, is_export, "export")
    if push is not None:
        hub.check_push(push)
    from clipdistill.export.graphs import Exported, export_graphs
    from clipdistill.models.load import load_model

    if to in checked:
        from clipdistill.export.accuracy import open_calibration, open_test
        from clipdistill.export.gate import Tolerance
        from clipdistill.export.towers import OPSET

        test = open_test(data, split, limit) if data is not None else None
        calibration = (
            open_calibration(str(calibrate or data), calibration_size)
            if int8 and to in graphs and (calibrate or data)
            else None
        )
        for source in (test, calibration):
            if source is not None and source.problems:
                tell(source.problems.sentence(source.name))
        allowed = dataclasses.replace(Tolerance(), difference=tolerance, cosine=1 - 0.1 * tolerance)
        shared: dict[str, Any] = {"int8": int8, "test": test, "budget": budget, "tolerance": allowed}
        shared["opset"] = opset or OPSET
        if to == "web":
            from clipdistill.export.web import runtime, site

            libraries = runtime.web_runtime(None if web_runtime is None else Path(web_runtime))
            exported = site.export_web(load_model(model, teacher=True), out, libraries, **shared)
        else:
            if to in PHONES:
                tell(f"converting both towers for {to}: a minute or two")
            exported = export_graphs(
                load_model(model, teacher=True),
                out,
                runtime=to,
                normalised=normalised,
                calibration=calibration,
                fp16=fp16,
                ternary=ternary,
                **shared,
            )
        for tower in ("image", "text"):
            own = [p for p in exported.parities if p.tower == tower]
            tell(
                f"{tower} tower: {len(own)} comparisons with the model, largest difference "
                f"{max(p.difference for p in own):.1e}, least cosine {min(p.cosine for p in own):.7f}"
            )
        if exported.before is not None and exported.after is not None:
            tell(
                f"R@1 on {exported.before.data} (image to text / text to image): "
                f"{exported.before.text()} before, {exported.after.text()} after"
            )
        for line in (*(choice.text() for choice in exported.choices), *exported.notes):
            tell(line)
    else:
        from clipdistill.export.foreign import export_foreign

        exported = Exported(out, [], notes=export_foreign(load_model(model, teacher=True), out, to))
        for line in exported.notes:
            tell(line)
    tell(f"written: {out}")
    if push is not None:
        tell(f"uploaded: {hub.push_to_hub(out, push, source=Path(model), private=private, licence=licence)}")
    return exported
