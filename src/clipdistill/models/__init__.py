"""Teachers and students: loading by name, students, tokenizers, model folders; each imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.registry import lazy_package

if TYPE_CHECKING:
    from clipdistill.models.clip_model import ClipModel
    from clipdistill.models.known import list_students, register_student
    from clipdistill.models.load import load_model, load_student
    from clipdistill.models.save import save_model
    from clipdistill.models.students import build_student
    from clipdistill.models.tokenizers import Tokenizer, build_words_tokenizer

__all__ = [
    "ClipModel", "Tokenizer", "build_student", "build_words_tokenizer", "list_students", "load_model",
    "load_student", "register_student", "save_model"
]  # fmt: skip

__getattr__ = lazy_package(
    __name__,
    {
        "clipdistill.models.clip_model": "ClipModel",
        "clipdistill.models.known": "list_students register_student",
        "clipdistill.models.load": "load_model load_student",
        "clipdistill.models.save": "save_model",
        "clipdistill.models.students": "build_student",
        "clipdistill.models.tokenizers": "Tokenizer build_words_tokenizer",
    },
)
