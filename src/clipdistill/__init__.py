"""clipdistill: distil large CLIP models into small, fast ones, prove what was kept, and ship them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from clipdistill.registry import lazy_package
from clipdistill.version import __version__

# torch reads it when it is loaded: what Apple's GPU cannot compute, the CPU does
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
# onnxruntime, NNCF and OpenVINO report their use to their makers unless told not to
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # both go on without it

if TYPE_CHECKING:
    from clipdistill.ablate.ask import ablate
    from clipdistill.api import cache, distill, embed
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
    from clipdistill.regions.ask import region_boxes, region_embeddings, region_scores, region_vectors
    from clipdistill.regions.retention import before_after
    from clipdistill.report.report import report
    from clipdistill.search.ask import search
    from clipdistill.serve.ask import serve
    from clipdistill.statistics.claims_command import claims
    from clipdistill.statistics.compare import compare
    from clipdistill.statistics.scores import Scores
    from clipdistill.train.callbacks import Callback, register_callback
    from clipdistill.train.dry_run import dry_run
    from clipdistill.train.replay import replay
    from clipdistill.train.run import Run
    from clipdistill.vectors.command import embed_to_file
    from clipdistill.vectors.files import read_embeddings

__all__ = [
    "Callback", "Embeddings", "Objective", "ObjectiveOutput", "Run", "Scores", "__version__", "ablate", "before_after",
    "bench", "cache", "claims", "compare", "distill", "dry_run", "embed", "embed_to_file", "evaluate", "export",
    "fetch", "load_model", "load_student", "probe", "read_embeddings", "region_boxes", "region_embeddings",
    "region_scores", "region_vectors", "register_callback", "register_format", "register_student", "register_term",
    "replay", "report", "retrieval", "search", "serve",
]  # fmt: skip

_PACKAGES = ("ablate", "bench", "cache", "embed", "evaluate", "export", "probe", "report", "search", "serve")
"""These can be called, and then are the functions of their names."""

_attribute = lazy_package(
    __name__,
    {
        "clipdistill.api": "distill",
        "clipdistill.data.benchmarks.fetch": "fetch",
        "clipdistill.data.open": "register_format",
        "clipdistill.evaluate.retrieval": "retrieval",
        "clipdistill.models": "load_model load_student register_student",
        "clipdistill.objective": "Embeddings Objective ObjectiveOutput register_term",
        "clipdistill.regions.ask": "region_boxes region_embeddings region_scores region_vectors",
        "clipdistill.regions.retention": "before_after",
        "clipdistill.statistics.claims_command": "claims",
        "clipdistill.statistics.compare": "compare",
        "clipdistill.statistics.scores": "Scores",
        "clipdistill.train.callbacks": "Callback register_callback",
        "clipdistill.train.dry_run": "dry_run",
        "clipdistill.train.replay": "replay",
        "clipdistill.train.run": "Run",
        "clipdistill.vectors.command": "embed_to_file",
        "clipdistill.vectors.files": "read_embeddings",
    },
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"clipdistill.{name}")
    return _attribute(name)
