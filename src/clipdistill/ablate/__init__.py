"""Ablations: variants of a recipe times seeds under one budget, and what the results say.

The package can be called: `clipdistill.ablate(...)` is the function in ask.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.ablate.ask:ablate")
