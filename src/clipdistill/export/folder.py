"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import SUFFIX
from clipdistill.runtime.files import new_folder

PAGE = Path(__file__).with_name("web") / "page"
MARK = {"format": "pt", "writer": "clipdistill"}
"""What the weights of other libraries' forms say of themselves: models from elsewhere lie in folders like these."""
CARD = "README.md"
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_NAMES = re.compile(
    r"(manifest|transform|tokenizer|tokenizer_config|modules|config|preprocessor_config|open_clip_config)\.json"
    r"|example\.py|(open_clip_)?model\.safetensors|onnx|runtime"
    r"|(image|text)\.(onnx|onnx\.data|xml|bin|tflite|pte|mlpackage)"
)
_INNER = re.compile(
    r"onnx/((vision|text)_)?model(_fp16|_quantized)?\.onnx(\.data)?|runtime/(ort[.-][a-z.-]+\.(js|wasm)|LICENSE)"
    r"|(image|text)\.mlpackage/(Manifest\.json|Data(/com\.apple\.CoreML|/weights|/model\.mlmodel|/weight\.bin)*)"
)


def export_folder(out: Path) -> AbstractContextManager[Path]:
    """`runtime.files.new_folder` for an export."""
    return new_folder(out, is_export, "export", lambda part: _is_ours(out, part))


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, by its files, and by what its weights say where a model's would look alike."""
    if any((folder / MANIFEST).exists() and (folder / f"image{suffix}").exists() for suffix in SUFFIX.values()):
        return True
    return any((folder / name).is_file() and _metadata(folder / name) == MARK for name in _WEIGHTS)


def is_card(path: Path) -> bool:
    """Whether a README.md is a model card of ours and no text of the user's."""
    text = path.read_bytes() if path.is_file() else b""
    front = text.partition(b"\n---\n")[0]
    return front.startswith(b"---\n") and b"- clipdistill" in front.split(b"\n")


def _is_ours(folder: Path, part: Path) -> bool:
    """Whether `part`, a path in an export, was written with it."""
    if part.parent.name:
        return bool(_INNER.fullmatch(part.as_posix()))
    of_page = (PAGE / part.name).exists()
    return bool(_NAMES.fullmatch(part.name)) or of_page or (part.name == CARD and is_card(folder / part))


def _metadata(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None
