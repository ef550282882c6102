"""Teachers and students: loading by name, students, tokenizers, model folders; each imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.models.clip_model import ClipModel
    from clipdistill.models.known import list_students, register_student
    from clipdistill.models.load import load_model, load_student
    from clipdistill.models.save import save_model
    from clipdistill.models.students import build_student
    from clipdistill.models.tokenizers import Tokenizer, build_words_tokenizer

_WHERE = {
    "ClipModel": "clip_model",
    "Tokenizer": "tokenizers",
    "build_student": "students",
    "build_words_tokenizer": "tokenizers",
    "list_students": "known",
    "load_model": "load",
    "load_student": "load",
    "register_student": "known",
    "save_model": "save",
}
__all__ = [
    "ClipModel",
    "Tokenizer",
    "build_student",
    "build_words_tokenizer",
    "list_students",
    "load_model",
    "load_student",
    "register_student",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'clipdistill.models' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"clipdistill.models.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
