"""clipdistill: distil large CLIP models into small, fast ones, prove what was kept, and ship them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipdistill.version import __version__

if TYPE_CHECKING:
    from clipdistill.api import cache, embed
    from clipdistill.bench.measure import bench
    from clipdistill.data.open import register_format
    from clipdistill.evaluate.evaluate import evaluate
    from clipdistill.evaluate.retrieval import retrieval
    from clipdistill.export.command import export
    from clipdistill.models import load_model, load_student, register_student
    from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
    from clipdistill.objective.term import register_term
    from clipdistill.search.ask import search
    from clipdistill.statistics.compare import compare
    from clipdistill.statistics.scores import Scores
    from clipdistill.train.callbacks import Callback, register_callback
    from clipdistill.train.run import Run, distill

_WHERE = {
    "Callback": "clipdistill.train.callbacks",
    "Embeddings": "clipdistill.objective",
    "Objective": "clipdistill.objective",
    "ObjectiveOutput": "clipdistill.objective",
    "Run": "clipdistill.train.run",
    "Scores": "clipdistill.statistics.scores",
    "compare": "clipdistill.statistics.compare",
    "distill": "clipdistill.train.run",
    "load_model": "clipdistill.models",
    "load_student": "clipdistill.models",
    "register_callback": "clipdistill.train.callbacks",
    "register_format": "clipdistill.data.open",
    "register_student": "clipdistill.models.known",
    "register_term": "clipdistill.objective.term",
    "retrieval": "clipdistill.evaluate.retrieval",
}
_PACKAGES = ("bench", "cache", "embed", "evaluate", "export", "search")
"""Packages that can be called (registry.callable_package)."""

__all__ = [
    "Callback",
    "Embeddings",
    "Objective",
    "ObjectiveOutput",
    "Run",
    "Scores",
    "__version__",
    "bench",
    "cache",
    "compare",
    "distill",
    "embed",
    "evaluate",
    "export",
    "load_model",
    "load_student",
    "register_callback",
    "register_format",
    "register_student",
    "register_term",
    "retrieval",
    "search",
]


def __getattr__(name: str) -> Any:
    # imported on first use: `clipdistill --help` must not wait for torch and open_clip
    if name in _PACKAGES:
        return importlib.import_module(f"clipdistill.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'clipdistill' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
