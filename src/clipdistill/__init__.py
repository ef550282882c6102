"""clipdistill: distil large CLIP models into small, fast ones, prove what was kept, and ship them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipdistill.version import __version__

if TYPE_CHECKING:
    from clipdistill.data.open import register_format
    from clipdistill.evaluate.evaluate import evaluate
    from clipdistill.evaluate.retrieval import retrieval
    from clipdistill.models import load_student, register_student
    from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
    from clipdistill.objective.term import register_term
    from clipdistill.train.callbacks import Callback, register_callback
    from clipdistill.train.run import Run, distill

_WHERE = {
    "Callback": "clipdistill.train.callbacks",
    "Embeddings": "clipdistill.objective",
    "Objective": "clipdistill.objective",
    "ObjectiveOutput": "clipdistill.objective",
    "Run": "clipdistill.train.run",
    "distill": "clipdistill.train.run",
    "load_student": "clipdistill.models",
    "register_callback": "clipdistill.train.callbacks",
    "register_format": "clipdistill.data.open",
    "register_student": "clipdistill.models.known",
    "register_term": "clipdistill.objective.term",
    "retrieval": "clipdistill.evaluate.retrieval",
}

__all__ = [
    "Callback",
    "Embeddings",
    "Objective",
    "ObjectiveOutput",
    "Run",
    "__version__",
    "distill",
    "evaluate",
    "load_student",
    "register_callback",
    "register_format",
    "register_student",
    "register_term",
    "retrieval",
]


def __getattr__(name: str) -> Any:
    # imported on first use: `clipdistill --help` must not wait for torch and open_clip
    if name == "evaluate":  # the package of that name, which can be called (see its docstring)
        return importlib.import_module("clipdistill.evaluate")
    if name not in _WHERE:
        raise AttributeError(f"module 'clipdistill' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
