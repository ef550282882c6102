"""The distillation objective: any mix of published terms, exact, for batches of any size and any number of ranks.

Knows nothing of models, data or files: it takes `Embeddings` of a student and a teacher and returns an
    `ObjectiveOutput`.
"""

from __future__ import annotations

from clipdistill.objective.config import ObjectiveConfig
from clipdistill.objective.features import Embeddings
from clipdistill.objective.objective import Objective, ObjectiveOutput
from clipdistill.objective.terms import TERMS

__all__ = ["TERMS", "Embeddings", "Objective", "ObjectiveConfig", "ObjectiveOutput"]
