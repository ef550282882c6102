"""`clipdistill doctor`: does this machine have what the package needs, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

EXTRAS = {
    "hf": ("transformers", "datasets"),
    "export": ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
    "openvino": ("openvino", "nncf"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
_PAIRS = {"2.6": "0.21", "2.7": "0.22", "2.8": "0.23", "2.9": "0.24", "2.10": "0.25", "2.11": "0.26"}
"""torch and the torchvision built for it; newer pairs are judged by whether torchvision imports."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: state is "ok", "note" or "problem"."""

    state: str
    what: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where large files would go."""
    parser.add_argument("--folder", type=Path, default=Path(), help="folder whose free disk is checked")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when something needed is missing or broken."""
    findings = examine(arguments.folder)
    for finding in findings:
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.state]
        print(f"{mark} {finding.what}" + (f"\n        {finding.advice}" if finding.advice else ""))
    return int(any(f.state == "problem" for f in findings))


def examine(folder: Path) -> list[Finding]:
    """Everything doctor looks at."""
    return [_python(), *_torch(), *_core(), _device(), _disk(folder), _memory(), *_extras(), _network()]


def _python() -> Finding:
    version = platform.python_version()
    return Finding("ok", f"Python {version}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> list[Finding]:
    torch_version, vision_version = _version("torch"), _version("torchvision")
    repair = "reinstall both together from one index:  pip install --force-reinstall torch torchvision"
    if torch_version is None or vision_version is None:
        missing = "torch" if torch_version is None else "torchvision"
        return [Finding("problem", f"{missing} is not installed", "pip install torch torchvision")]
    pair = f"torch {torch_version} with torchvision {vision_version}"
    expected = _PAIRS.get(".".join(torch_version.split(".")[:2]))
    if expected is not None and not vision_version.startswith(expected + "."):
        return [Finding("problem", f"{pair}: this torch needs torchvision {expected}", repair)]
    try:
        import torchvision

        torchvision.ops.nms  # noqa: B018  the operator that is missing when the two builds do not match
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return [Finding("problem", f"{pair}: torchvision does not load ({str(error).splitlines()[0]})", repair)]
    return [Finding("ok", pair)]


def _core() -> list[Finding]:
    needed = ("open_clip_torch", "timm", "safetensors", "numpy", "pillow", "pyarrow", "pydantic")
    missing = [p for p in needed if _version(p) is None]
    if missing:
        return [Finding("problem", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")]
    return [Finding("ok", ", ".join(f"{p} {_version(p)}" for p in needed))]


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("problem", f"torch does not load ({error})", "see above")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free = torch.cuda.mem_get_info(0)[0] / 1e9
        return Finding("ok", f"device: {', '.join(names)}; {free:.0f} GB free on the first")
    bf16 = "amx" if torch.cpu._is_amx_tile_supported() else "no AMX"
    return Finding(
        "note",
        f"device: CPU, {torch.get_num_threads()} threads ({bf16})",
        "no CUDA device is visible: small students train in minutes to hours; large ones need a GPU",
    )


def _disk(folder: Path) -> Finding:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    what = f"disk: {free:.0f} GB free at {place}"
    if free < 5:
        return Finding("problem", what, "a run writes checkpoints and a cache of embeddings: make at least 5 GB free")
    return Finding("ok", what)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, AttributeError, OSError):
        return Finding("note", "memory: cannot be told on this system")
    return Finding("ok" if total >= 8 else "note", f"memory: {total:.0f} GB", "" if total >= 8 else "8 GB are advised")


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            advice = f"pip install 'clipdistill[{extra}]'"
            findings.append(Finding("note", f"extra '{extra}': not installed ({', '.join(missing)})", advice))
        else:
            findings.append(Finding("ok", f"extra '{extra}': {', '.join(f'{p} {_version(p)}' for p in packages)}"))
    return findings


def _network() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Finding("note", "HF_HUB_OFFLINE is set: model and data hubs are not asked; local files are used")
    return Finding("ok", "hubs may be asked for weights (set HF_HUB_OFFLINE=1 to forbid it)")
