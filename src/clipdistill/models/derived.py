"""Classes that are made out of others: made once, and pickled by the function that makes them and what it was given.

A model reaches a process that is spawned (torch.multiprocessing, joblib, Ray) by pickle, which knows no local class.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any


class Derived(type):
    made: tuple[Callable[..., Any], tuple[Any, ...]]
    """The function that made such a class, and what it was given."""


# one that somebody derived from it goes by its own name, as every class does
copyreg.pickle(Derived, lambda kind: vars(kind).get("made") or kind.__qualname__)


def derives(make: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for functions at the top of a module that return such a class."""

    @functools.cache
    @functools.wraps(make)
    def made(*given: Any) -> Any:
        kind = make(*given)
        if type(kind) is Derived and "made" not in vars(kind):
            kind.made = made, given
        return kind

    return made
