"""The distillation objective: any mix of published terms, exact, for batches of any size and any number of ranks.

Knows nothing of models, data or files: it takes `Embeddings` of a student and a teacher and returns an
`ObjectiveOutput`. `Term` and what it is made of are the door for terms of your own (docs/extending.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.objective.config import ObjectiveConfig
    from clipdistill.objective.features import Embeddings
    from clipdistill.objective.objective import Objective, ObjectiveOutput
    from clipdistill.objective.plan import CrossEntropy, Divergence, Pairing, Sigmoid
    from clipdistill.objective.term import LocalBatch, Option, Setting, Term, register_term
    from clipdistill.registry import TERMS

_WHERE = {
    **dict.fromkeys(("CrossEntropy", "Divergence", "Pairing", "Sigmoid"), "clipdistill.objective.plan"),
    **dict.fromkeys(("LocalBatch", "Option", "Setting", "Term", "register_term"), "clipdistill.objective.term"),
    **dict.fromkeys(("Objective", "ObjectiveOutput"), "clipdistill.objective.objective"),
    "Embeddings": "clipdistill.objective.features",
    "ObjectiveConfig": "clipdistill.objective.config",
    "TERMS": "clipdistill.registry",
}

__all__ = [
    "TERMS",
    "CrossEntropy",
    "Divergence",
    "Embeddings",
    "LocalBatch",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "Option",
    "Pairing",
    "Setting",
    "Sigmoid",
    "Term",
    "register_term",
]


def __getattr__(name: str) -> Any:
    # imported on first use: a recipe is checked without torch
    if name not in _WHERE:
        raise AttributeError(f"module 'clipdistill.objective' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
