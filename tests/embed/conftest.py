"""Fixtures shared with the tests of evaluation."""

from __future__ import annotations

from tests.evaluate.conftest import model

__all__ = ["model"]
