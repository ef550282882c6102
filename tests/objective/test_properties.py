"""What must hold for any input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.objective import Embeddings, Objective
from tests.objective.mixes import EVERYTHING, batch_terms, make_input, make_objective
from tests.objective.plain import random_embeddings

ENGINES = st.sampled_from(["dense", "tiled"])
MATRICES = ("image", "text", "synthetic_text")
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None, derandomize=True)


def changed(embeddings: Embeddings, change: object) -> Embeddings:
    assert callable(change)
    return replace(
        embeddings,
        **{name: change(getattr(embeddings, name)) for name in MATRICES if getattr(embeddings, name) is not None},
    )


@few
@given(rows=st.integers(1, 9), seed=SEEDS, engine=ENGINES, mix=st.sampled_from([EVERYTHING, "mobileclip"]))
def test_order_of_the_batch_does_not_matter(rows: int, seed: int, engine: str, mix: str) -> None:
    student, teacher = make_input(mix, rows, 5, 8)
    objective = make_objective(mix, 5, 8, engine)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = objective(changed(student, lambda m: m[order]), changed(teacher, lambda m: m[order]))
    assert moved.total.item() == pytest.approx(objective(student, teacher).total.item(), rel=1e-10)


@few
@given(seed=SEEDS, engine=ENGINES, size=st.floats(1e-3, 1e3))
def test_length_of_a_row_does_not_matter(seed: int, engine: str, size: float) -> None:
    """Equal sizes, so that no biased projection stands in between."""
    student, teacher = make_input(EVERYTHING, 6, 8, 8)
    objective = make_objective(EVERYTHING, 8, 8, engine)
    factors = size * (0.5 + torch.rand(6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    longer = objective(changed(student, lambda m: m * factors), changed(teacher, lambda m: m * factors))
    assert longer.total.item() == pytest.approx(objective(student, teacher).total.item(), rel=1e-9)


@few
@given(seed=SEEDS, engine=ENGINES)
def test_a_rotation_of_both_spaces_does_not_matter(seed: int, engine: str) -> None:
    weights = {name: 1.0 for name in batch_terms() if name != "afd"}  # afd's fusion layers are tied to the axes
    student, teacher = make_input(EVERYTHING, 6, 8, 8)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    objective = Objective(weights, 8, 8, engine=engine)
    turned = objective(changed(student, lambda m: m @ turn), changed(teacher, lambda m: m @ turn))
    for name, value in objective(student, teacher).terms.items():
        assert turned.terms[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12)


@few
@given(
    weights=st.dictionaries(st.sampled_from(sorted(batch_terms())), st.floats(0.01, 100), min_size=1), engine=ENGINES
)
def test_total_is_the_weighted_sum(weights: dict[str, float], engine: str) -> None:
    student, teacher = make_input(EVERYTHING, 5, 6, 6)
    output = Objective(weights, 6, 6, engine=engine)(student, teacher)
    assert list(output.terms) == list(weights)
    expected = sum(weight * output.terms[name].item() for name, weight in weights.items())
    assert output.total.item() == pytest.approx(expected, rel=1e-10)


@few
@given(rows=st.integers(1, 8), seed=SEEDS, scale=st.floats(0.1, 100), engine=ENGINES)
def test_divergences_are_never_negative(rows: int, seed: int, scale: float, engine: str) -> None:
    student, teacher = random_embeddings(rows, 4, scale, seed), random_embeddings(rows, 4, 100.0, seed + 1)
    objective = Objective({"crd": 1, "vrd_kl": 1, "xrd": 1, "cross_kd": 1}, 4, 4, engine=engine)
    objective.set_scales(cross=scale, image=scale, text=scale / 2)
    for name, value in objective(student, teacher).terms.items():
        assert value.item() >= -1e-12, name


@few
@given(engine=ENGINES, gap=st.floats(60, 100))
def test_extreme_scales_stay_finite(engine: str, gap: float) -> None:
    """exp(100) squared overflows float32: only differences may be exponentiated."""
    student, teacher = make_input(EVERYTHING, 7, 8, 8, torch.float32)
    weights = dict.fromkeys(batch_terms(), 1.0)
    objective = Objective(weights, 8, 8, engine=engine)
    objective.set_scales(image=gap, text=gap, cross=gap, fusion=gap)
    output = objective(replace(student, logit_scale=gap), replace(teacher, logit_scale=100.0))
    output.total.backward()
    assert bool(torch.isfinite(output.total))
    assert student.image.grad is not None
    assert bool(torch.isfinite(student.image.grad).all())
