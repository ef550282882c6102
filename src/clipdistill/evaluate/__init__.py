"""Retrieval, zero-shot classification, geometry, protocols and statistics of models and their scores."""

from clipdistill.evaluate.retrieval import retrieval

__all__ = ["retrieval"]
