"""`clipdistill doctor`: does this machine have what the package needs, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from clipdistill.runtime.machine import cpu_count

EXTRAS = {
    "hf": ("transformers", "datasets"),
    "export": ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
    "openvino": ("openvino", "nncf"),
    "litert": ("litert_torch", "ai_edge_litert"),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
    "serve": ("starlette", "uvicorn", "python_multipart", "prometheus_client"),
    "lancedb": ("lancedb",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}


@dataclass(frozen=True)
class Examined:
    """One line of the report: state is "ok", "note" or "problem"."""

    state: str
    what: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where large files would go, and how thoroughly to look."""
    parser.add_argument("--folder", type=Path, default=Path(), help="folder whose free disk is checked")
    parser.add_argument("--load", action="store_true", help="load torch and torchvision too (takes seconds)")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when something needed is missing or broken."""
    findings = examine(arguments.folder, load=arguments.load)
    for finding in findings:
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.state]
        print(f"{mark} {finding.what}" + (f"\n        {finding.advice}" if finding.advice else ""))
    return int(any(f.state == "problem" for f in findings))


def examine(folder: Path | str, *, load: bool = False) -> list[Examined]:
    """Everything doctor looks at: versions, files and the system; with `load` also whether torch works."""
    python = Examined("ok", f"Python {platform.python_version()}")
    loaded = [_loaded()] if load else []
    return [python, *_torch(), *loaded, *_core(), _device(), _disk(Path(folder)), _memory(), *_extras(), _network()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> list[str]:
    return importlib.metadata.requires(package) or []


def _torch() -> list[Examined]:
    torch_version, vision_version = _version("torch"), _version("torchvision")
    repair = "reinstall both together from one index:  pip install --force-reinstall torch torchvision"
    if torch_version is None or vision_version is None:
        missing = "torch" if torch_version is None else "torchvision"
        return [Examined("problem", f"{missing} is not installed", "pip install torch torchvision")]
    pair = f"torch {torch_version} with torchvision {vision_version}"
    asked = next((r for r in map(Requirement, _requirements("torchvision")) if r.name == "torch"), None)
    if asked is not None and not asked.specifier.contains(torch_version, prereleases=True):
        return [Examined("problem", f"{pair}: this torchvision needs torch{asked.specifier}", repair)]
    builds = [version.partition("+")[2] for version in (torch_version, vision_version)]
    if all(builds) and builds[0] != builds[1]:
        return [Examined("problem", f"{pair}: built for different devices", repair)]
    return [Examined("ok", pair)]


def _loaded() -> Examined:
    """Whether the operators of both packages are there; they are missing where two builds do not match."""
    code = "import torch, torchvision; torchvision.ops.nms; torch.cuda.is_available() and torch.zeros(1).cuda()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode == 0:
        return Examined("ok", "torch and torchvision load")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Examined("problem", f"torch and torchvision do not load ({last:.200})", "reinstall both from one index")


def _core() -> list[Examined]:
    needed = ("open_clip_torch", "timm", "safetensors", "numpy", "pillow", "pyarrow", "pydantic")
    missing = [p for p in needed if _version(p) is None]
    if missing:
        return [Examined("problem", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")]
    return [Examined("ok", ", ".join(f"{p} {_version(p)}" for p in needed))]


def _device() -> Examined:
    """The CUDA devices that the driver lists, else the processor; torch is not asked, which takes seconds to load."""
    names = [] if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else _cuda_devices()
    if names and (_version("torch") or "").endswith("+cpu"):
        return Examined(
            "problem", f"device: {', '.join(names)}, which this torch cannot use", "pip install torch for CUDA"
        )
    if names:
        return Examined("ok", f"device: {', '.join(names)}")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Examined("ok", "device: Apple GPU (mps), taken where no other is named; --device cpu leaves it")
    try:
        amx = "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        amx = False
    return Examined(
        "note",
        f"device: CPU, {cpu_count()} processors ({'amx' if amx else 'no AMX'})",
        "no CUDA device is visible: small students train in minutes to hours; large ones need a GPU",
    )


def _cuda_devices() -> list[str]:
    found = [path.read_text(encoding="utf-8") for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    names = [match[1] for text in found if (match := re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE))]
    if names or shutil.which("nvidia-smi") is None:
        return names
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _disk(folder: Path) -> Examined:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    what = f"disk: {free:.0f} GB free at {place}"
    if free < 5:
        return Examined("problem", what, "a run writes checkpoints and a cache of embeddings: make at least 5 GB free")
    return Examined("ok", what)


def _memory() -> Examined:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, AttributeError, OSError):
        return Examined("note", "memory: cannot be told on this system")
    return Examined("ok" if total >= 8 else "note", f"memory: {total:.0f} GB", "" if total >= 8 else "8 GB are advised")


def _extras() -> list[Examined]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            advice = f"pip install 'clipdistill[{extra}]'"
            findings.append(Examined("note", f"extra '{extra}': not installed ({', '.join(missing)})", advice))
        else:
            findings.append(Examined("ok", f"extra '{extra}': {', '.join(f'{p} {_version(p)}' for p in packages)}"))
    return findings


def _network() -> Examined:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Examined("note", "HF_HUB_OFFLINE is set: model and data hubs are not asked; local files are used")
    return Examined("ok", "hubs may be asked for weights (set HF_HUB_OFFLINE=1 to forbid it)")
