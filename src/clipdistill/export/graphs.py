"""Exports as graphs, for ONNX Runtime, OpenVINO and phones: towers, tokenizer, transform, manifest, behind the gate."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipdistill.bench.cost import count_flops
from clipdistill.bench.device import describe_device, describe_libraries
from clipdistill.config import as_dict
from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError, first_line, needing
from clipdistill.export.accuracy import Accuracy, accuracy, calibration_arrays, embed
from clipdistill.export.folder import export_folder
from clipdistill.export.gate import (
    Parity,
    Tolerance,
    compare,
    require,
    require_cosine,
    require_same_at_any_length,
    summary,
)
from clipdistill.export.int8 import Chosen, quantise_onnx, quantise_openvino, within_budget
from clipdistill.export.latency import latency
from clipdistill.export.phone import coreml
from clipdistill.export.phone.convert import PACKAGES, phone_runners, write_phone
from clipdistill.export.tokenizer_json import FILE as TOKENIZER
from clipdistill.export.tokenizer_json import differing, tokenizer_json
from clipdistill.export.towers import INPUTS, OPSET, OUTPUTS, write_onnx
from clipdistill.export.transform import FILE as TRANSFORM
from clipdistill.export.transform import write_transform
from clipdistill.export.two_bits import in_two_bits
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import (
    graph_parts,
    load_graph,
    part_name,
    read_exported,
    signal_stack_kept,
    takes_any_length,
)
from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import PHONES, SUFFIX, TOWERS
from clipdistill.runtime.console import Shown
from clipdistill.runtime.files import read_json, sha256, write_json
from clipdistill.version import __version__

FORMAT = 1
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "tokenizers")


@dataclass
class Exported(Shown):
    """What an export did: the folder, the gate's comparisons, R@1 before and after (where data was given), choices."""

    folder: Path
    parities: list[Parity]
    before: Accuracy | None = None
    after: Accuracy | None = None
    choices: list[Chosen] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [f"export in {self.folder}"]
        if self.parities:
            worst = max(parity.difference for parity in self.parities)
            lines.append(f"{len(self.parities)} comparisons with the model, largest difference {worst:.1e}")
        if self.before is not None and self.after is not None:
            lines.append(f"R@1 on {self.before.data}: {self.before.text()} before, {self.after.text()} after")
        return "\n".join([*lines, *(choice.text() for choice in self.choices), *self.notes])


def export_graphs(
    model: ClipModel,
    out: Path,
    *,
    runtime: str = "onnx",
    normalised: bool = False,
    int8: bool = False,
    test: PairSource | None = None,
    calibration: PairSource | None = None,
    budget: float = 1.0,
    tolerance: Tolerance | None = None,
    opset: int = OPSET,
    fp16: bool = False,
    ternary: bool = False,
) -> Exported:
    """Export both towers for `runtime` ("onnx", "openvino", or one of PHONES) into the folder `out`.

    normalised: embeddings leave the graph at unit length. test: pairs on which R@1 is measured before and after.
    int8: quantise, calibrated on `calibration`, within a budget of points of R@1 on `test`; both are needed then, but
    not for a phone, where nothing is calibrated. fp16: sixteen bits, for a phone alone. ternary: weights -1, 0 and 1
    times a scale a row in two bits, for "onnx" alone.
    Raises InputError when a tower cannot be exported or misses the tolerance; then nothing is written under `out`.
    """
    if "exported" in model.architecture:
        raise InputError(f"'{model.name}' is an export already: name the model it was made from")
    phone = runtime in PHONES
    precision = "float32" if not phone else "float16" if fp16 else "int8" if int8 else "float32"
    if runtime == "coreml" and test is not None and not coreml.runs_here():
        raise InputError("--data measures the export itself, and Core ML runs on macOS only: leave --data out here")
    if int8 and not phone and (test is None or calibration is None):
        raise InputError("int8 needs pairs to calibrate on and to measure what is lost: name them with --data")
    tokenizer = tokenizer_json(model.tokenizer)
    notes: list[str] = []
    with export_folder(out) as folder:
        write_transform(folder, model.image, runtime)
        write_graphs(model, folder, runtime, normalised=normalised, opset=opset, precision=precision)
        files = {tower: folder / f"{tower}{SUFFIX[runtime]}" for tower in TOWERS}
        packed = {tower: in_two_bits(path) for tower, path in files.items()} if ternary else dict.fromkeys(TOWERS, 0)
        if ternary and not any(packed.values()):
            raise InputError(
                f"{model.name}: no matrix holds only -1, 0 and 1 times a scale a row: train with train.ternary, or "
                "leave --ternary out"
            )
        if phone:
            runners = phone_runners(model, files, runtime, normalised=normalised)
        else:
            runners = {tower: load_graph(path, runtime) for tower, path in files.items()}
        parities = compare(model, runners, normalised=normalised)
        if precision == "float32":
            require(parities, tolerance or Tolerance(), str(out))
        else:
            require_cosine(parities, precision, str(out), f"leave --{'int8' if int8 else 'fp16'} out")
        if any_length := takes_any_length(runners["text"]):
            tokenizer = tokenizer_json(model.tokenizer, to_longest=True)
        write_json(folder / TOKENIZER, tokenizer)
        manifest = _manifest(model, folder, runtime, normalised, opset, tolerance or Tolerance(), parities)
        manifest["towers"]["text"]["input_shape"][1] = "length" if any_length else model.context_length
        for tower, count in packed.items():
            if count:
                manifest["towers"][tower] |= {"precision": "ternary", "two_bit_weights": count}
        if phone:
            _describe_phone(manifest, runtime, precision)
        ran = runtime != "coreml" or coreml.runs_here()
        if not ran:
            notes.append(coreml.NOT_RUN)
        write_json(folder / MANIFEST, manifest, checked=True)
        result = Exported(out, parities, notes=notes)
        if test is not None:
            captions = [caption for i in range(len(test)) for caption in test.captions(i)]
            wrong = differing(model.tokenizer, tokenizer, captions)
            manifest["tokenizer_check"] = {"captions": len(captions), "different": len(wrong)}
            if wrong:
                notes.append(
                    f"{len(wrong)} of {len(captions)} captions get other ids from tokenizer.json, "
                    f"first {wrong[0]!r:.80} (docs/deployment.md says which texts can)"
                )
            original = embed(model, test)
            exported = embed(read_exported(folder, f"{runtime}:{out}", runtime), test)
            result.before = accuracy(original, original, test.name)
            result.after = accuracy(exported, exported, test.name)
            manifest["scores"] = {"before": result.before.to_json(), "after": result.after.to_json()}
            if phone and int8 and (lost := result.before.mean - result.after.mean) > budget:
                raise InputError(
                    f"{out}: eight bits lose {lost:.2f} points of R@1 on {test.name}, and --budget allows {budget:g}: "
                    "leave --int8 out"
                )
            if int8 and not phone and calibration is not None:
                _quantise(model, folder, runtime, result, exported, test, calibration, budget)
                assert result.after is not None
                manifest["scores"]["after_int8"] = result.after.to_json()
                manifest["int8"] = {
                    "budget_points": budget,
                    "calibration": f"{calibration.name}, {len(calibration)} pairs",
                    "towers": {
                        c.tower: {"precision": c.precision, "points_lost": round(c.lost, 4), "tried": c.tried}
                        for c in result.choices
                    },
                }
                quantised = {c.tower for c in result.choices if c.precision == "int8"}
                for tower in TOWERS:
                    manifest["towers"][tower] |= _file_facts(folder, tower, runtime)
                    manifest["towers"][tower]["precision"] = "int8" if tower in quantised else "float32"
                eight_bits = {
                    tower: load_graph(folder / f"{tower}{SUFFIX[runtime]}", runtime) for tower in sorted(quantised)
                }
                if eight_bits:
                    runners |= eight_bits
                    eight_bit = compare(model, eight_bits, normalised=normalised)
                    require_same_at_any_length(eight_bit, str(out))
                    for tower, facts in summary(eight_bit).items():
                        manifest["towers"][tower]["int8_parity"] = facts
                manifest["versions"] = {"clipdistill": __version__, **describe_libraries(_LIBRARIES)}
        if ran:
            manifest["latency"] = {"device": describe_device(torch.device("cpu")), **latency(model, runners)}
            notes.append(_latency_text(manifest["latency"]))
        manifest["notes"] = notes
        write_json(folder / MANIFEST, manifest, checked=True)
    return result


def _describe_phone(manifest: dict[str, Any], runtime: str, precision: str) -> None:
    """What a phone's graphs have otherwise: one row a call, tokens of 32 bits, names for the precision."""
    manifest["ran"] = runtime != "coreml" or coreml.runs_here()
    manifest["versions"] |= describe_libraries(PACKAGES[runtime])
    manifest.pop("opset")
    for tower, facts in manifest["towers"].items():
        facts["input_shape"][0], facts["precision"] = 1, precision
        facts[f"{precision}_parity"] = facts.pop("float32_parity")
        if tower == "text" and runtime != "executorch":
            facts["input_type"] = "int32"


def _latency_text(found: dict[str, Any]) -> str:
    return f"on {found['device']['label']}: " + ", ".join(
        f"{found[tower]['ms']:.1f} ms a {what} (torch {found[tower]['torch_ms']:.1f})"
        for tower, what in (("image", "picture"), ("text", "caption"))
    )


def write_graphs(
    model: ClipModel,
    folder: Path,
    runtime: str,
    *,
    normalised: bool = False,
    opset: int = OPSET,
    precision: str = "float32",
) -> dict[str, Path]:
    """Write both towers as graphs for `runtime` into `folder`; returns tower -> file. Nothing is checked.

    precision: of a phone's graphs.
    """
    if runtime in PHONES:
        return write_phone(model, folder, runtime, normalised=normalised, precision=precision)
    if runtime == "onnx":
        return write_onnx(model, folder, normalised=normalised, opset=opset)
    with needing("openvino", "openvino", "the export to OpenVINO"):
        import openvino
    files = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as temporary:
        for tower, path in write_onnx(model, Path(temporary), normalised=normalised, opset=opset).items():
            files[tower] = folder / f"{tower}.xml"
            try:
                with signal_stack_kept():
                    openvino.save_model(openvino.convert_model(str(path)), str(files[tower]), compress_to_fp16=False)
            except Exception as error:  # openvino's conversion errors share no base class
                if shutil.disk_usage(folder).free < path.stat().st_size:  # all it says of that is "iostream error"
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(files[tower])) from error
                raise InputError(
                    f"the {tower} tower of {model.name} cannot be converted to OpenVINO: {str(error).strip()[:300]}"
                ) from error
    return files


def _quantise(
    model: ClipModel,
    folder: Path,
    runtime: str,
    result: Exported,
    full: EncodedPairs,
    test: PairSource,
    calibration: PairSource,
    budget: float,
) -> None:
    """Replace the graphs in `folder` by int8 ones where the budget allows; fills `result`."""
    samples = calibration_arrays(model, calibration)
    suffix = SUFFIX[runtime]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".int8-") as temporary:
        trial = Path(temporary)
        for file in [path for path in folder.iterdir() if path.is_file()]:
            shutil.copy2(file, trial / file.name)
        described = read_json(folder / MANIFEST)
        write_json(trial / MANIFEST, {key: value for key, value in described.items() if key != "towers"})
        done: dict[str, str] = {}

        def quantise(tower: str, attempt: str) -> EncodedPairs:
            source, target = folder / f"{tower}{suffix}", trial / f"{tower}{suffix}"
            for stale in _files(trial, tower, runtime):
                stale.unlink()
            function = quantise_onnx if runtime == "onnx" else quantise_openvino
            try:
                function(source, target, samples[tower], attempt)
            except InputError:
                raise
            except Exception as error:  # onnxruntime and nncf raise many kinds
                raise InputError(f"the {tower} tower cannot be quantised: {first_line(error)}") from error
            done[tower] = attempt
            return embed(read_exported(trial, "int8", runtime), test)

        result.choices, result.after = within_budget(quantise, full, test.name, budget)
        for choice in result.choices:
            if choice.precision == "int8":
                assert done[choice.tower] == choice.attempt
                for stale in _files(folder, choice.tower, runtime):
                    stale.unlink()
                for file in _files(trial, choice.tower, runtime):
                    shutil.move(file, folder / file.name)


def _files(folder: Path, tower: str, runtime: str) -> list[Path]:
    """All files of one tower's graph."""
    return graph_parts(folder / f"{tower}{SUFFIX[runtime]}")


def _file_facts(folder: Path, tower: str, runtime: str) -> dict[str, Any]:
    files = _files(folder, tower, runtime)
    return {
        "files": {part_name(path): sha256(path) for path in files},
        "bytes": sum(path.stat().st_size for path in files),
    }


def _manifest(
    model: ClipModel,
    folder: Path,
    runtime: str,
    normalised: bool,
    opset: int,
    tolerance: Tolerance,
    parities: list[Parity],
) -> dict[str, Any]:
    bias = getattr(model.module, "logit_bias", None)
    shapes = {"image": ["batch", 3, model.image.size, model.image.size], "text": ["batch", model.context_length]}
    gate = summary(parities)
    return {
        "format": FORMAT,
        "kind": runtime,
        "name": model.name,
        "model_fingerprint": model.fingerprint(),
        "output": "normalised" if normalised else "raw",
        "embed_dim": model.embed_dim,
        "context_length": model.context_length,
        "logit_scale": float(model.module.logit_scale.detach().exp().mean()),
        "logit_bias": None if bias is None else float(bias),
        "image": as_dict(model.image),
        "tokenizer": TOKENIZER,
        "files": {TOKENIZER: sha256(folder / TOKENIZER)},
        "transform": TRANSFORM,
        "opset": opset,
        "parameters": model.parameter_counts(),
        "flops": {tower: count_flops(model, tower) for tower in TOWERS},
        "towers": {
            tower: {
                "input": INPUTS[tower],
                "input_shape": shapes[tower],
                "input_type": "float32" if tower == "image" else "int64",
                "output": OUTPUTS[tower],
                "precision": "float32",
                **_file_facts(folder, tower, runtime),
                "float32_parity": gate[tower],
            }
            for tower in TOWERS
        },
        "tolerance": {"difference": tolerance.difference, "cosine": tolerance.cosine},
        "versions": {"clipdistill": __version__, **describe_libraries(_LIBRARIES)},
    }
