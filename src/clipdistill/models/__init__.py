"""Teachers and students: loading by name, the student registry, tokenizers, model folders."""

from clipdistill.models.clip_model import ClipModel
from clipdistill.models.load import load_model, load_student
from clipdistill.models.save import save_model
from clipdistill.models.students import build_student, list_students
from clipdistill.models.tokenizers import Tokenizer, build_words_tokenizer

__all__ = [
    "ClipModel",
    "Tokenizer",
    "build_student",
    "build_words_tokenizer",
    "list_students",
    "load_model",
    "load_student",
    "save_model",
]
