"""The published terms, one file each."""

from __future__ import annotations

from clipdistill.errors import InputError, nearest
from clipdistill.objective.term import Term
from clipdistill.objective.terms import (
    afd,
    affinity,
    cosine,
    crd,
    cross_kd,
    fd,
    gd,
    icl,
    reinforced,
    sigmoid,
    task,
    vrd_ce,
    vrd_kl,
    xrd,
)

_FILES = (task, crd, fd, icl, vrd_kl, vrd_ce, xrd, gd, afd, cross_kd, affinity, cosine, sigmoid, reinforced)

TERMS: dict[str, Term] = {file.TERM.name: file.TERM for file in _FILES}


def find_term(name: str) -> Term:
    """The term called `name`; an unknown name is an InputError that suggests the nearest."""
    if name not in TERMS:
        raise InputError(f"unknown objective term '{name}'{nearest(name, TERMS)}")
    return TERMS[name]
