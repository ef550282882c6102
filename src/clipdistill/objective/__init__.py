"""The distillation objective: any mix of published terms, exact, for batches of any size and any number of ranks.

Knows nothing of models, data or files: it takes `Embeddings` of a student and a teacher and returns an
`ObjectiveOutput`. `Term` and what it is made of are the door for terms of your own (docs/extending.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.registry import lazy_package

if TYPE_CHECKING:
    from clipdistill.objective.config import ObjectiveConfig
    from clipdistill.objective.features import Embeddings
    from clipdistill.objective.objective import Objective, ObjectiveOutput
    from clipdistill.objective.plan import CrossEntropy, Divergence, Pairing, Sigmoid
    from clipdistill.objective.term import LocalBatch, Option, Setting, Term, register_term
    from clipdistill.registry import TERMS

__all__ = [
    "TERMS", "CrossEntropy", "Divergence", "Embeddings", "LocalBatch", "Objective", "ObjectiveConfig",
    "ObjectiveOutput", "Option", "Pairing", "Setting", "Sigmoid", "Term", "register_term"
]  # fmt: skip

__getattr__ = lazy_package(
    __name__,
    {
        "clipdistill.objective.config": "ObjectiveConfig",
        "clipdistill.objective.features": "Embeddings",
        "clipdistill.objective.objective": "Objective ObjectiveOutput",
        "clipdistill.objective.plan": "CrossEntropy Divergence Pairing Sigmoid",
        "clipdistill.objective.term": "LocalBatch Option Setting Term register_term",
        "clipdistill.registry": "TERMS",
    },
)
