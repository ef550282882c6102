"""Geometry of the embeddings: geometry.json of a run (clipdistill.evaluate.geometry) as rows and curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipdistill.report.data import ReportedRun, number, read_optional
from clipdistill.report.tables import Entry, ScoreTable

MEASURES: dict[str, tuple[str, ...]] = {
    "Matched pairs": ("positive", "mean"),
    "Unmatched pairs": ("negative", "mean"),
    "Gap": ("gap",),
    "Hardest unmatched (image)": ("hard_negative", "image"),
    "Hardest unmatched (text)": ("hard_negative", "text"),
    "Modality gap": ("modality_gap", "distance"),
}
"""Column title -> where its number stands in one model's entry."""

ALIGNMENT: dict[str, tuple[str, ...]] = {
    "CKA images": ("cka", "image"),
    "CKA texts": ("cka", "text"),
    "Neighbours shared, image→text": ("neighbour_overlap", "image_to_text", "10"),
    "Neighbours shared, text→image": ("neighbour_overlap", "text_to_image", "10"),
    "VRD discrepancy": ("discrepancy", "vrd"),
    "XRD discrepancy": ("discrepancy", "xrd"),
}
"""The same for the student's alignment with its teacher."""


@dataclass
class Geometry:
    """One entry's geometry: numbers by column title, histograms (edges, densities) of matched and unmatched pairs."""

    entry: Entry
    values: dict[str, float]
    histograms: dict[str, tuple[list[float], list[float]]]


def read_geometry(runs: Sequence[ReportedRun], table: ScoreTable, notices: list[str]) -> list[Geometry]:
    """The geometry of every entry whose run folder holds a geometry.json (of several seeds the first one's)."""
    found: dict[int, Geometry] = {}
    for path, run, stored in read_optional(runs, "geometry.json", notices):
        if not isinstance(stored.get("student"), dict):
            notices.append(f"{path}: not as clipdistill writes it (no object under 'student'); it is left out here.")
            continue
        for entry in table.entries:
            facts = stored.get(entry.role)
            if id(entry) not in found and run in entry.runs and isinstance(facts, dict):
                extra = stored.get("alignment") if entry.role == "student" else None
                found[id(entry)] = _shape(entry, facts, extra if isinstance(extra, dict) else {})
    return [found[id(entry)] for entry in table.entries if id(entry) in found]


def _shape(entry: Entry, facts: dict[str, Any], alignment: dict[str, Any]) -> Geometry:
    values = {title: _at(facts, place) for title, place in MEASURES.items()}
    values |= {title: _at(alignment, place) for title, place in ALIGNMENT.items()}
    histograms = {}
    for name, title in (("positive", "Cosines of matched pairs"), ("negative", "Cosines of unmatched pairs")):
        distribution = facts.get(name)
        histogram = distribution.get("histogram") if isinstance(distribution, dict) else None
        if isinstance(histogram, dict):
            density = _density(histogram.get("edges"), histogram.get("counts"))
            if density is not None:
                histograms[title] = density
    return Geometry(entry, {k: v for k, v in values.items() if v is not None}, histograms)


def _at(facts: Any, place: Sequence[str]) -> float | None:
    for name in place:
        facts = facts.get(name) if isinstance(facts, dict) else None
    return number(facts)


def _density(edges: Any, counts: Any) -> tuple[list[float], list[float]] | None:
    """(edges, densities) that integrate to one; None when the histogram is not well formed."""
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return None
    if any(number(v) is None for v in [*edges, *counts]):
        return None
    total = sum(counts)
    widths = [b - a for a, b in itertools.pairwise(edges)]
    if total <= 0 or min(widths, default=0) <= 0:
        return None
    return [float(e) for e in edges], [c / total / w for c, w in zip(counts, widths)]
