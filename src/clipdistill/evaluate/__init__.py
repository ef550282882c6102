"""Retrieval, zero-shot classification, geometry, protocols and statistics of models and their scores.

The package can be called: `clipdistill.evaluate(model, data, ...)` is the function in evaluate.py. The public function
and this package share their name, and Python lets the package take it as soon as any module in it is imported.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.statistics.scores import Scores


class _CallablePackage(types.ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Scores:
        """See clipdistill.evaluate.evaluate.evaluate."""
        from clipdistill.evaluate.evaluate import evaluate

        return evaluate(*arguments, **settings)


sys.modules[__name__].__class__ = _CallablePackage
