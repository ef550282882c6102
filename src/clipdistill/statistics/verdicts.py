"""Verdicts on claims in words, as a table, and as the claims.json that reports show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.runtime.console import Coloured, Shown, TextTable
from clipdistill.runtime.files import require_place, write_json
from clipdistill.statistics.judge import Verdict

FORMAT = 1
FILE = "claims.json"
QUERIES_ALONE = "on the test queries alone: it holds for these models, not for the ways they were trained"
"""What is said wherever a verdict rests on one training seed, or on models that were not trained here."""


class Verdicts(Shown, list[Verdict]):
    """Verdicts on claims, in the order of the claims; shows itself as a table with the evidence."""

    def __repr__(self) -> str:
        return super().__repr__() if self else "no verdicts"

    def tables(self) -> list[TextTable]:
        return [verdict_table(self)]


def require_verdicts_place(path: Path) -> None:
    """See that verdicts can be written as `path`, before anything is judged. Raises InputError."""
    require_place(path, "verdicts", (b'"claims"',))


def write_verdicts(verdicts: Sequence[Verdict], path: Path, source: str) -> None:
    """`verdict_document` as a file."""
    require_verdicts_place(path)
    write_json(path, verdict_document(verdicts, source), checked=True)


def verdict_document(verdicts: Sequence[Verdict], source: str) -> dict[str, Any]:
    """claims.json: each verdict with its evidence in words; `source` says where the claims come from."""
    rows = [verdict.to_dict() | {"verdict": verdict.outcome, "evidence": evidence(verdict)} for verdict in verdicts]
    return {"format": FORMAT, "source": source, "claims": rows}


def evidence(verdict: Verdict) -> str:
    """'+0.2 points (-0.3 to +0.8), 5 seeds, 5,000 queries on 1,000 images, p 0.4; about 12 more seeds would decide'."""
    if verdict.parts:
        return "; ".join(f"{part.outcome}: {evidence(part)}" for part in verdict.parts)
    if verdict.effect is None:
        return verdict.reason
    alone = QUERIES_ALONE if verdict.basis == "queries alone" and verdict.p is not None else ""
    left_out = f"{verdict.left_out} unusable results left out" if verdict.left_out else ""
    return "; ".join(part for part in (", ".join(_facts(verdict)), alone, left_out, _outlook(verdict)) if part)


def better_text(verdict: Verdict, left: str = "better", right: str = "worse") -> str:
    """'better', 'worse' or 'undecided' for a cell, with what it rests on where that is not training seeds."""
    if verdict.outcome == "undecided":
        return "undecided"
    word = left if verdict.better == "better" else right
    return f"{word} on the test queries alone" if verdict.basis == "queries alone" else word


def basis_text(verdicts: Sequence[Verdict]) -> str:
    """What the intervals and p of these verdicts rest on, in sentences for a legend."""
    known = [verdict for verdict in verdicts if verdict.p is not None]
    queries = "the sampling of test queries (bootstrap, clustered by image)"
    said = {
        "paired seeds and queries": f"Intervals hold the spread over seeds (Student's t, paired by seed) and {queries} "
        "together.",
        "unpaired seeds and queries": "For sides that share fewer than two seeds, intervals hold the spread over the "
        f"seeds of each (Student's t, not paired) and {queries} together.",
        "queries alone": f"For sides of one training seed, intervals hold {queries} only, and the verdict rests "
        f"{QUERIES_ALONE}.",
    }
    found = {verdict.basis for verdict in known}
    parts = [sentence for basis, sentence in said.items() if basis in found]
    family = max((verdict.family for verdict in known), default=0)
    if family > 1:
        parts.append(f"Verdicts go by the interval; p (Holm) is adjusted over the {family} comparisons shown together.")
    return " ".join(parts)


def _facts(verdict: Verdict) -> list[str]:
    facts = [effect_text(verdict)]
    if verdict.seeds_right is not None:
        facts.append(f"{verdict.seeds} and {verdict.seeds_right} seeds, not paired")
    elif verdict.seeds:
        facts.append(f"{verdict.seeds} seed{'s' if verdict.seeds > 1 else ''}")
    if verdict.queries:
        images = f" on {verdict.images:,} images" if verdict.images and verdict.images != verdict.queries else ""
        facts.append(f"{verdict.queries:,} queries{images}")
    if verdict.p is not None:
        holm = f" ({p_text(verdict.p_holm)} by Holm over {verdict.family})" if verdict.p_holm is not None else ""
        facts.append(f"p {p_text(verdict.p)}{holm if verdict.family > 1 else ''}")
    return facts


def _outlook(verdict: Verdict) -> str:
    if verdict.outcome != "undecided":
        return ""
    if verdict.seeds_needed is not None:
        more = more_seeds(verdict)
        return f"about {more} more seed{'s' if more > 1 else ''} would decide, if mean and spread stay"
    return verdict.reason


def more_seeds(verdict: Verdict) -> int:
    """Seeds of each side that would decide, beyond those there are."""
    return max(1, (verdict.seeds_needed or 0) - min(verdict.seeds, verdict.seeds_right or verdict.seeds))


def effect_text(verdict: Verdict) -> str:
    """The effect with its interval: points for differences, per cent or times for ratios, the value itself."""
    assert verdict.effect is not None
    show = _writer(verdict)
    text = show(verdict.effect)
    if verdict.low is not None and verdict.high is not None and math.isfinite(verdict.high - verdict.low):
        text += f" ({show(verdict.low, False)} to {show(verdict.high, False)})"
    return text


def bounds_text(verdict: Verdict, scale: float = 100.0) -> str:
    """'-0.33 to +0.50' in points; '' without an interval."""
    if verdict.low is None or verdict.high is None or not math.isfinite(verdict.high - verdict.low):
        return ""
    return f"{scale * verdict.low:+.2f} to {scale * verdict.high:+.2f}"


def _writer(verdict: Verdict) -> Any:
    """How a number of this claim is written."""
    claim = verdict.claim
    plain = "median_rank" in claim or "per_second" in claim
    if " keeps >= " in claim:
        return lambda v, unit=True: f"{100 * v:.1f}{' %' if unit else ''}"
    if " x " in claim:
        return lambda v, unit=True: f"{v:.3g}{' times' if unit else ''}"
    if " > " in claim:
        if plain:
            return lambda v, unit=True: f"{v:+.3g}"
        return lambda v, unit=True: f"{100 * v:+.2f}{' points' if unit else ''}"
    return lambda v, unit=True: f"{v:.4g}" if plain else f"{100 * v:.1f}{' %' if unit else ''}"


def p_text(p: float) -> str:
    """'0.03', '<0.001'."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def verdict_table(verdicts: Sequence[Verdict]) -> TextTable:
    """Verdict, claim, evidence; published figures where the claims have them."""
    published = any(verdict.published for verdict in verdicts)
    heads = ["verdict", "claim", "evidence", *(["published"] if published else [])]
    table = TextTable(heads, text=range(len(heads)))
    colours = {"supported": "green", "contradicted": "red", "undecided": "yellow"}
    for verdict in verdicts:
        cells = [Coloured(verdict.outcome, colours[verdict.outcome]), verdict.claim, evidence(verdict)]
        table.rows.append([*cells, *([published_text(verdict.published)] if published else [])])
    return table


def verdicts_markdown(verdicts: Sequence[Verdict]) -> str:
    """The table in Markdown, claims as code."""
    table = verdict_table(verdicts)
    table.rows = [[row[0], f"`{row[1]}`", *row[2:]] for row in table.rows]
    return table.markdown() + "\n"


def published_text(published: dict[str, Any]) -> str:
    """'imagenet_top1: clip-kd 41.3, clip-rd 42.1'."""
    parts = []
    for name, figures in published.items():
        listed = ", ".join(f"{k} {v}" for k, v in figures.items()) if isinstance(figures, dict) else str(figures)
        parts.append(f"{name}: {listed}")
    return "; ".join(parts)
