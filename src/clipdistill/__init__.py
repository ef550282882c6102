"""clipdistill: distil large CLIP models into small, fast ones, prove what was kept, and ship them."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from clipdistill.registry import lazy_package
from clipdistill.version import __version__

# torch reads it when it is loaded: what Apple's GPU cannot compute, the CPU does
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

if TYPE_CHECKING:
    from clipdistill.api import cache, embed
    from clipdistill.bench.measure import bench
    from clipdistill.data.benchmarks.fetch import fetch
    from clipdistill.data.open import register_format
    from clipdistill.evaluate.evaluate import evaluate
    from clipdistill.evaluate.retrieval import retrieval
    from clipdistill.export.command import export
    from clipdistill.models import load_model, load_student, register_student
    from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
    from clipdistill.objective.term import register_term
    from clipdistill.probe.linear import probe
    from clipdistill.search.ask import search
    from clipdistill.statistics.compare import compare
    from clipdistill.statistics.scores import Scores
    from clipdistill.train.callbacks import Callback, register_callback
    from clipdistill.train.run import Run, distill
    from clipdistill.vectors.command import embed_to_file
    from clipdistill.vectors.files import read_embeddings

__all__ = [
    "Callback", "Embeddings", "Objective", "ObjectiveOutput", "Run", "Scores", "__version__", "bench", "cache",
    "compare", "distill", "embed", "embed_to_file", "evaluate", "export", "fetch", "load_model", "load_student",
    "probe", "read_embeddings", "register_callback", "register_format", "register_student", "register_term",
    "retrieval", "search",
]  # fmt: skip

_attribute = lazy_package(
    __name__,
    {
        "clipdistill.data.benchmarks.fetch": "fetch",
        "clipdistill.data.open": "register_format",
        "clipdistill.evaluate.retrieval": "retrieval",
        "clipdistill.models": "load_model load_student register_student",
        "clipdistill.objective": "Embeddings Objective ObjectiveOutput register_term",
        "clipdistill.statistics.compare": "compare",
        "clipdistill.statistics.scores": "Scores",
        "clipdistill.train.callbacks": "Callback register_callback",
        "clipdistill.train.run": "Run distill",
        "clipdistill.vectors.command": "embed_to_file",
        "clipdistill.vectors.files": "read_embeddings",
    },
)


def __getattr__(name: str) -> Any:
    if name in ("bench", "cache", "embed", "evaluate", "export", "probe", "search"):  # packages that can be called
        return importlib.import_module(f"clipdistill.{name}")
    return _attribute(name)
