"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import SUFFIX
from clipdistill.runtime.files import new_folder

_MARKS = (
    *((MANIFEST, f"image{suffix}") for suffix in SUFFIX.values()),
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("config.json", "preprocessor_config.json", "model.safetensors"),
)


def export_folder(out: Path) -> AbstractContextManager[Path]:
    """`runtime.files.new_folder` for an export."""
    return new_folder(out, is_export, "export")


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, by its files."""
    return any(all((folder / name).exists() for name in names) for names in _MARKS)
