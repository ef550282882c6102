"""`clipdistill export`: a run or any model as files that other programs load."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name

TARGETS = ("onnx", "openvino", "open_clip", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, to what, where, and what it may lose."""
    add = parser.add_argument
    add("model", help="a run folder, a model folder or file, or a model name (ViT-B-16/laion400m_e32)")
    add("--to", required=True, choices=TARGETS, help="the form (docs/deployment.md)")
    add("--out", required=True, type=Path, help="folder to write; it appears only if the export passes its checks")
    add("--data", help="pairs: R@1 is measured on them before and after (test split, else val)")
    add("--split", help="split of the data to measure on")
    add("--limit", type=int, help="measure on at most so many images, spread evenly over the data")
    add("--int8", action="store_true", help="quantise both towers, calibrated on --calibrate or --data")
    add("--calibrate", help="pairs to calibrate int8 on (default: --data, its training split where it has one)")
    add("--calibration-size", type=int, default=128, help="pairs to calibrate on (default: 128)")
    add("--budget", type=float, default=1.0, help="points of R@1 that int8 may lose (default: 1)")
    add("--normalised", action="store_true", help="embeddings of unit length (default: raw, as the model's own)")
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of an entry of unit-length embeddings (default: 1e-4)",
    )
    add("--opset", type=int, default=None, help="ONNX operator set (default: 20; from 23 attention is one operator)")
    add("--push", metavar="OWNER/NAME", help="also upload the folder, with a model card, to the Hugging Face hub")
    add("--private", action="store_true", help="with --push: a private repository")


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was kept."""
    check_model_name(arguments.model)
    run_export(
        arguments.model,
        arguments.to,
        arguments.out,
        data=arguments.data,
        split=arguments.split,
        limit=arguments.limit,
        int8=arguments.int8,
        calibrate=arguments.calibrate,
        calibration_size=arguments.calibration_size,
        budget=arguments.budget,
        normalised=arguments.normalised,
        tolerance=arguments.tolerance,
        opset=arguments.opset,
        push=arguments.push,
        private=arguments.private,
    )
    return 0


def run_export(
    model: str,
    to: str,
    out: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    int8: bool = False,
    calibrate: str | None = None,
    calibration_size: int = 128,
    budget: float = 1.0,
    normalised: bool = False,
    tolerance: float = 1e-4,
    opset: int | None = None,
    push: str | None = None,
    private: bool = False,
    console: Console | None = None,
) -> Path:
    """Export the model called `model` to the folder `out`; returns it. InputError for what cannot be exported."""
    from clipdistill.export.accuracy import open_calibration, open_test
    from clipdistill.export.gate import Tolerance
    from clipdistill.export.towers import OPSET
    from clipdistill.models.load import load_model

    console = console or Console()
    if to not in TARGETS:
        raise InputError(f"unknown form '{to}': one of {', '.join(TARGETS)}")
    if int8 and to not in ("onnx", "openvino"):
        raise InputError(f"--int8 goes with --to onnx or --to openvino, not with --to {to}")
    if not 0 < tolerance < 1:
        raise InputError(f"--tolerance must be above 0 and below 1, got {tolerance:g}")
    if calibration_size < 1 or (limit is not None and limit < 1):
        raise InputError("--calibration-size and --limit must be at least 1")
    if to in ("onnx", "openvino"):
        from clipdistill.export.graphs import export_graphs

        test = open_test(data, split, limit) if data is not None else None
        calibration = None
        if int8 and (calibrate or data):
            calibration = open_calibration(str(calibrate or data), calibration_size)
        exported = export_graphs(
            load_model(model, teacher=True),
            out,
            runtime=to,
            normalised=normalised,
            int8=int8,
            test=test,
            calibration=calibration,
            budget=budget,
            tolerance=dataclasses.replace(Tolerance(), difference=tolerance, cosine=1 - 0.1 * tolerance),
            opset=opset or OPSET,
        )
        for tower in ("image", "text"):
            own = [p for p in exported.parities if p.tower == tower]
            console.print(
                f"{tower} tower: {len(own)} comparisons with the model, largest difference "
                f"{max(p.difference for p in own):.1e}, least cosine {min(p.cosine for p in own):.7f}",
                soft_wrap=True,
            )
        if exported.before is not None and exported.after is not None:
            console.print(
                f"R@1 on {exported.before.data} (image to text / text to image): "
                f"{exported.before.text()} before, {exported.after.text()} after",
                markup=False,
                soft_wrap=True,
            )
        for line in (*(choice.text() for choice in exported.choices), *exported.notes):
            console.print(line, markup=False, soft_wrap=True)
    else:
        from clipdistill.export.foreign import export_foreign

        export_foreign(load_model(model, teacher=True), out, to)
    console.print(f"written: {out}", markup=False, soft_wrap=True)
    if push is not None:
        from clipdistill.export.hub import push_to_hub

        console.print(f"uploaded: {push_to_hub(out, push, source=Path(model), private=private)}", markup=False)
    return out
