"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.models.exported import MANIFEST

_MARKS = (
    (MANIFEST, "image.onnx"),
    (MANIFEST, "image.xml"),
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("config.json", "preprocessor_config.json", "model.safetensors"),
)
"""Files by which an earlier export is recognised, so that nothing else is ever replaced."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error.

    An earlier export under that name is replaced; anything else there is an InputError, before any work is done.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_export(out))):
        raise InputError(f"{out}: exists and is no export, so it is not replaced: choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():  # safetensors and mkdtemp make them private; an export is to be read by others
            file.chmod(0o644)
        if out.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
            out.rename(aside / "old")
            temporary.rename(out)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _MARKS)


def write_json(path: Path, values: Any) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
