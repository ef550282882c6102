"""Verdicts on claims in words, as a table, and as the claims.json that reports show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from clipdistill.statistics.claims import Verdict

FORMAT = 1
FILE = "claims.json"


def write_verdicts(verdicts: Sequence[Verdict], path: Path, source: str) -> None:
    """claims.json: each verdict with its evidence in words; `source` says where the claims come from."""
    rows = [verdict.to_dict() | {"verdict": verdict.outcome, "evidence": evidence(verdict)} for verdict in verdicts]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(
        json.dumps({"format": FORMAT, "source": source, "claims": rows}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    temporary.replace(path)


def evidence(verdict: Verdict) -> str:
    """'+0.2 points (-0.3 to +0.8), 5 seeds, 5,000 queries on 1,000 images, p 0.4; about 12 more seeds would decide'."""
    if verdict.parts:
        return "; ".join(f"{part.outcome}: {evidence(part)}" for part in verdict.parts)
    if verdict.effect is None:
        return verdict.reason
    return "; ".join(part for part in (", ".join(_facts(verdict)), _outlook(verdict)) if part)


def _facts(verdict: Verdict) -> list[str]:
    facts = [effect_text(verdict)]
    if verdict.seeds:
        facts.append(f"{verdict.seeds} seed{'s' if verdict.seeds > 1 else ''}")
    if verdict.queries:
        images = f" on {verdict.images:,} images" if verdict.images and verdict.images != verdict.queries else ""
        facts.append(f"{verdict.queries:,} queries{images}")
    if verdict.p is not None:
        facts.append(f"p {p_text(verdict.p)}" + (f" ({p_text(verdict.p_holm)} by Holm)" if verdict.p_holm else ""))
    return facts


def _outlook(verdict: Verdict) -> str:
    if verdict.outcome != "undecided":
        return ""
    if verdict.seeds_needed is not None:
        more = max(1, verdict.seeds_needed - verdict.seeds)
        return f"about {more} more seed{'s' if more > 1 else ''} would decide, if mean and spread stay"
    return verdict.reason


def effect_text(verdict: Verdict) -> str:
    """The effect with its interval: points for differences, per cent or times for ratios, the value itself."""
    assert verdict.effect is not None
    show = _writer(verdict)
    text = show(verdict.effect)
    if verdict.low is not None and verdict.high is not None:
        text += f" ({show(verdict.low, False)} to {show(verdict.high, False)})"
    return text


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


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """For the terminal: verdict, claim, evidence."""
    table = Table("verdict", "claim", "evidence", show_lines=True)
    colours = {"supported": "green", "contradicted": "red", "undecided": "yellow"}
    for verdict in verdicts:
        table.add_row(f"[{colours[verdict.outcome]}]{verdict.outcome}[/]", verdict.claim, evidence(verdict))
    return table


def verdicts_markdown(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table: verdict, claim, evidence, published figures where the claim has them."""
    published = any(verdict.published for verdict in verdicts)
    heads = ["verdict", "claim", "evidence", *(["published"] if published else [])]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for verdict in verdicts:
        cells = [f"**{verdict.outcome}**", f"`{verdict.claim}`", evidence(verdict)]
        if published:
            cells.append(published_text(verdict.published))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def published_text(published: dict[str, Any]) -> str:
    """'imagenet_top1: clip-kd 41.3, clip-rd 42.1'."""
    parts = []
    for name, figures in published.items():
        listed = ", ".join(f"{k} {v}" for k, v in figures.items()) if isinstance(figures, dict) else str(figures)
        parts.append(f"{name}: {listed}")
    return "; ".join(parts)
