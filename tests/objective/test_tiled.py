"""The tiled engine against a naive reference: values, gradients, memory, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipdistill.objective.engines import EngineOptions, tiled_products
from clipdistill.objective.engines.dense import dense
from clipdistill.objective.engines.tiled import tiled
from clipdistill.objective.engines.tiled_walk import Walk
from clipdistill.objective.features import Features
from clipdistill.objective.gather import World
from clipdistill.objective.plan import CrossEntropy, Divergence, Plan, Primitive, Sigmoid
from tests.objective.tiled_cases import (
    CLIP_RD,
    SCALES,
    gradients,
    leaves,
    make_features,
    plan_of,
    random_plan,
    reference,
    relative,
)

SIZES = (1, 2, 9, 13, 30)
TILE_ROWS = (None, 4, 3, 1)


def run(features: Features, plan: Plan, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms of the tiled engine in one process."""
    n = len(next(iter(features.matrices.values())))
    result = tiled(features, plan, World((n,)), EngineOptions(**options))
    return result.total, result.terms


def largest_error(features: Features, plan: Plan, expected_of: Features | None = None, **options: Any) -> float:
    """Largest relative deviation of value, terms and gradients from the naive reference.

    Gradients that vanish are compared with a tenth of the largest one, or 0.1.
    """
    total, terms = run(features, plan, **options)
    exact = expected_of or features
    expected, expected_terms = reference(exact, plan)
    errors = [relative(total, expected, 1.0)]
    errors += [relative(terms[name], value, 1.0) for name, value in expected_terms.items()]
    found, wanted = gradients(features, total), gradients(exact, expected)
    size = max(0.1 * max(float(g.abs().max()) for g in wanted.values()), 0.1)
    errors += [relative(found[name], wanted[name], size) for name in wanted]
    assert list(terms) == list(plan.primitives)
    return max(errors)


def converted(features: Features, dtype: torch.dtype) -> Features:
    """The same numbers as leaves of another type."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return Features(
        {name: leaf(matrix) for name, matrix in features.matrices.items()},
        {name: leaf(scale) for name, scale in features.scales.items()},
    )


def with_scales(features: Features, changes: Mapping[str, float]) -> Features:
    """The features with some scales set to other values."""
    scales = dict(features.scales)
    for name, value in changes.items():
        scales[name] = torch.full_like(scales[name], value).requires_grad_(scales[name].requires_grad)
    return Features(features.matrices, scales)


@pytest.mark.parametrize("seed", range(60))
def test_random_mixes_equal_the_definitions(seed: int) -> None:
    n, rows = SIZES[seed % len(SIZES)], TILE_ROWS[seed % len(TILE_ROWS)]
    assert largest_error(make_features(n, seed=seed), random_plan(seed), tile_rows=rows) < 1e-12


@pytest.mark.parametrize("kept", [0, 2000, 10**9])
@pytest.mark.parametrize("n", [7, 16, 33])
def test_clip_rd_with_nothing_some_and_all_tiles_kept(n: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled_products.KEPT, "cpu", kept)
    assert largest_error(make_features(n), plan_of(CLIP_RD), tile_rows=5) < 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_every_order_of_the_passes_gives_the_same_in_float32(seed: int) -> None:
    features = make_features(50, seed=seed, dtype=torch.float32)
    assert largest_error(features, random_plan(seed), converted(features, torch.float64), tile_rows=8) < 1e-5


def test_clip_rd_float32_is_as_exact_as_promised() -> None:
    features = make_features(600, dtype=torch.float32, dims=dict.fromkeys(("student", "teacher", "projected"), 64))
    exact = converted(features, torch.float64)
    plan = plan_of(CLIP_RD)
    total, terms = run(features, plan)
    expected, expected_terms = reference(exact, plan)
    assert relative(total, expected) < 1e-6
    for name, value in expected_terms.items():
        assert relative(terms[name], value) < 1e-6
    found, wanted = gradients(features, total), gradients(exact, expected)
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_dense_engine(dtype: torch.dtype) -> None:
    features = make_features(40, dtype=dtype)
    plan = plan_of(CLIP_RD)
    total, terms = run(features, plan, tile_rows=16)
    other = dense(features, plan, World((40,)), EngineOptions())
    value, slope = (1e-6, 1e-5) if dtype == torch.float32 else (1e-12, 1e-12)
    assert relative(total, other.total) < value
    for name, expected in other.terms.items():
        assert relative(terms[name], expected) < value
    found, wanted = gradients(features, total), gradients(features, other.total)
    size = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert relative(found[name], gradient, 0.01 * size) < slope


# -- extremes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_walks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with one flag per component that was walked: whether it needed shifts of its own per row and column."""
    seen: list[bool] = []
    original = Walk.run

    def watched(self: Walk) -> Any:
        result = original(self)
        seen.append(self.exact)
        return result

    monkeypatch.setattr(Walk, "run", watched)
    return seen


LARGE: dict[str, tuple[Primitive, ...]] = {
    "both": tuple(Divergence("teacher", "student", axis, 0.5) for axis in ("rows", "columns")),
    "rows": (Divergence("teacher_0", "image_text", "rows", 1.0), CrossEntropy("image_text", "rows", 0.3)),
    "columns": (CrossEntropy("text_image", "columns", 1.0),),
    "pairs": (Sigmoid("text", 1.0), Sigmoid("text", 0.5, ("image",)), CrossEntropy("text", "rows", 1.0)),
}
LARGE_SCALES = dict.fromkeys(("student", "teacher", "teacher_0", "cross", "text"), 1.0)


@pytest.mark.parametrize(("scale", "needed"), [(40.0, False), (1000.0, True), (-1000.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_beyond_the_range_of_exp(
    scale: float, needed: bool, dtype: torch.dtype, exact_walks: list[bool]
) -> None:
    features = with_scales(make_features(30, dtype=dtype), dict.fromkeys(LARGE_SCALES, scale))
    # float64 has room for |z| = 1000 around a constant shift, unless rows are longer than 1
    exact = converted(features, torch.float64)
    error = largest_error(features, plan_of(LARGE), exact, tile_rows=8)
    assert error < (3e-4 if dtype == torch.float32 else 1e-11)
    assert any(exact_walks) == (needed and dtype == torch.float32) or dtype == torch.float64


@pytest.mark.parametrize("kept", [0, 10**9])
def test_long_rows_need_shifts_of_their_own_in_float64_as_well(
    kept: int, exact_walks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiled_products.KEPT, "cpu", kept)
    features = make_features(20)
    lengths = torch.linspace(1, 60, 20, dtype=torch.float64)[:, None]
    longer = {n: (m.detach() * lengths).requires_grad_(m.requires_grad) for n, m in features.matrices.items()}
    assert largest_error(replace(features, matrices=longer), plan_of(LARGE), tile_rows=8) < 1e-11
    assert all(exact_walks)


def test_the_teachers_scale_of_100_needs_no_extra_pass(exact_walks: list[bool]) -> None:
    features = with_scales(make_features(30, dtype=torch.float32), {"teacher": 100.0, "student": 100.0})
    assert largest_error(features, plan_of(CLIP_RD), converted(features, torch.float64), tile_rows=8) < 2e-5
    assert not any(exact_walks)


def alike(features: Features) -> Features:
    """All rows equal to the first."""
    rows = {
        name: matrix.detach()[:1].expand(len(matrix), -1).clone().requires_grad_(matrix.requires_grad)
        for name, matrix in features.matrices.items()
    }
    return replace(features, matrices=rows)


def test_a_row_far_from_everything_is_noticed(exact_walks: list[bool]) -> None:
    features = with_scales(alike(make_features(30, dtype=torch.float32, noise=0.0)), {"teacher": 100.0, "student": 100})
    with torch.no_grad():
        for name in ("student_image", "teacher_image"):
            features.matrices[name][3] *= -1
    assert largest_error(features, plan_of(CLIP_RD), converted(features, torch.float64), tile_rows=8) < 1e-4
    assert any(exact_walks)


def test_constant_embeddings() -> None:
    assert largest_error(alike(make_features(12)), plan_of(CLIP_RD), tile_rows=5) < 1e-12


def test_duplicated_rows() -> None:
    features = make_features(12)
    twice = {
        name: m.detach()[torch.arange(12) // 2].clone().requires_grad_(m.requires_grad)
        for name, m in features.matrices.items()
    }
    assert largest_error(replace(features, matrices=twice), plan_of(CLIP_RD), tile_rows=5) < 1e-12


def test_scale_of_zero_has_a_gradient() -> None:
    features = with_scales(make_features(9), {"student": 0.0, "cross": 0.0})
    assert largest_error(features, plan_of(CLIP_RD), tile_rows=4) < 1e-12


def test_not_a_number_reaches_the_loss() -> None:
    features = make_features(9, dtype=torch.float32)
    with torch.no_grad():
        features.matrices["projected_text"][2, 1] = float("nan")
    total, terms = run(features, plan_of(CLIP_RD), tile_rows=4)
    assert total.isnan()
    assert terms["task"].isfinite()


def test_an_empty_batch_is_worth_nothing() -> None:
    features = make_features(0)
    total, _ = run(features, plan_of(CLIP_RD))
    total.backward()
    assert total == 0
    assert features.matrices["student_image"].grad.shape == (0, 6)


# -- autograd ---------------------------------------------------------------------------------------------------------


def test_one_tensor_under_two_names_gets_both_gradients() -> None:
    features = make_features(10, dims={"student": 5, "projected": 5, "teacher": 5})
    matrices = dict(features.matrices)
    matrices["projected_image"], matrices["projected_text"] = matrices["student_image"], matrices["student_text"]
    assert largest_error(Features(matrices, features.scales), plan_of(CLIP_RD), tile_rows=4) < 1e-12


def test_called_several_times_before_backward() -> None:
    plan = plan_of(CLIP_RD)
    several = [make_features(n, seed=n) for n in (6, 11)]
    shared = several[0].scales
    several = [replace(features, scales=shared) for features in several]
    sum(run(features, plan, tile_rows=4)[0] for features in several).backward()
    for features in several:
        wanted = gradients(features, reference(features, plan)[0])
        for name, matrix in features.matrices.items():
            if matrix.grad is not None:
                assert relative(matrix.grad, wanted[name]) < 1e-12
    expected = torch.autograd.grad(sum(reference(features, plan)[0] for features in several), shared["student"])[0]
    assert relative(shared["student"].grad, expected) < 1e-12


def test_backward_scales_with_the_incoming_gradient_and_can_be_repeated() -> None:
    features, plan = make_features(10), plan_of(CLIP_RD)
    total, _ = run(features, plan, tile_rows=4)
    once, thrice = gradients(features, total), gradients(features, 3 * total)
    for name, gradient in once.items():
        assert relative(thrice[name], 3 * gradient) < 1e-14


def test_only_what_is_asked_for_is_differentiated() -> None:
    features, plan = make_features(10), plan_of(CLIP_RD)
    for name, leaf in leaves(features).items():
        leaf.requires_grad_(name in ("projected_text", "scale image"))
    wanted = gradients(features, reference(features, plan)[0])
    found = gradients(features, run(features, plan, tile_rows=4)[0])
    assert set(found) == {"projected_text", "scale image"}
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 1e-12


def test_value_without_gradient() -> None:
    features, plan = make_features(10), plan_of(CLIP_RD)
    with torch.no_grad():
        total, _ = run(features, plan, tile_rows=4)
    assert not total.requires_grad
    assert relative(total, reference(features, plan)[0]) < 1e-13


def test_autocast_does_not_round_the_products() -> None:
    features, plan = make_features(40, dtype=torch.float32), plan_of(CLIP_RD)
    plain = run(features, plan)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = run(features, plan)[0]
    assert total == plain
    assert total.dtype == torch.float32


# -- precision and memory ---------------------------------------------------------------------------------------------


class Rounded(tiled_products.Products):
    """Products as a CPU with bfloat16 matrix units makes them: rounded factors, float32 products and sums."""

    def logits(self, rows: Tensor, columns: Tensor, scale: float, offset: float, out: Tensor) -> Tensor:
        return super().logits(rows.bfloat16().float(), columns.bfloat16().float(), scale, offset, out)

    def accumulate(self, total: Tensor, gradient: Tensor, features: Tensor, scale: float) -> None:
        super().accumulate(total, gradient.bfloat16().float(), features.bfloat16().float(), scale)


@pytest.mark.parametrize("rounded", [True, False])
def test_bfloat16_products_stay_within_the_stated_error(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = dict.fromkeys(("student", "teacher", "projected"), 256)
    features = with_scales(make_features(700, dtype=torch.float32, dims=dims, noise=0.5), {"teacher": 100.0})
    plan = plan_of(CLIP_RD)
    exact, exact_terms = run(features, plan)
    # what a CPU without such units makes of the setting says nothing, so the rounding is also done by hand
    if rounded:
        monkeypatch.setattr("clipdistill.objective.engines.tiled.Products", Rounded)
    before = torch.get_float32_matmul_precision()
    total, terms = run(features, plan, products="bfloat16")
    assert torch.get_float32_matmul_precision() == before
    assert relative(total, exact) < 1e-4
    for name, value in exact_terms.items():
        assert relative(terms[name], value) < 2e-3, name
    found, wanted = gradients(features, total), gradients(features, exact)
    for name in ("student_image", "student_text", "projected_image", "projected_text"):
        difference = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert difference < 1e-2, name
        assert difference > 1e-4 or not rounded


def test_bfloat16_products_leave_float64_exact() -> None:
    assert largest_error(make_features(30), plan_of(CLIP_RD), products="bfloat16") < 1e-12


@pytest.mark.skipif(not tiled_products._WIDE_RESULTS, reason="torch.mm has no out_dtype before torch 2.8")
def test_bfloat16_products_on_a_gpu_ask_for_float32_results() -> None:
    # no device needed: the meta device checks types and shapes of the calls a GPU would get
    products = tiled_products.Products(torch.device("cuda"), torch.float32, bfloat16=True)
    rows, columns = (products.factor(torch.empty(count, 8, device="meta")) for count in (4, 6))
    out = torch.empty(4, 6, device="meta")
    assert rows.dtype == torch.bfloat16
    assert products.logits(rows, columns, 2.0, 1.0, out).dtype == torch.float32
    total = torch.empty(4, 8, device="meta")
    products.accumulate(total, products.factor(out), columns, 0.5)
    products.accumulate(torch.empty(6, 8, device="meta"), products.factor(out).T, rows, 0.5)


def test_products_stay_exact_where_results_cannot_be_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_products, "_WIDE_RESULTS", False)
    products = tiled_products.Products(torch.device("cuda"), torch.float32, bfloat16=True)
    assert products.factor(torch.empty(4, 8, device="meta")).dtype == torch.float32


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made, and products of matrices by their multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        if func.overloadpacket.__name__ in ("addmm_", "mm"):
            a, b = (args[1], args[2]) if func.overloadpacket.__name__ == "addmm_" else args[:2]
            if min(a.shape[0], a.shape[1], b.shape[1]) > 1:
                self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return result


CLIP_KD = {name: CLIP_RD[name] for name in ("task", "crd", "icl")}
SIGLIP: dict[str, tuple[Primitive, ...]] = {"sigmoid": (Sigmoid("student_sigmoid", 1.0, ("teacher_sigmoid",)),)}


@pytest.mark.parametrize(
    ("primitives", "products"),
    [
        (CLIP_RD, 18),
        # task and crd: 2 matrices twice and 2 gradient products; icl, one axis only, is walked once: 2 more and 2
        (CLIP_KD, 10),
        ({"task": CLIP_RD["task"]}, 4),
        (SIGLIP, 4),
    ],
)
def test_memory_is_linear_and_products_are_few(
    primitives: dict[str, tuple[Primitive, ...]], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiled_products.KEPT, "cpu", 256 * 1024)
    n, width, rows = 1024, 8, 32
    features = make_features(n, dtype=torch.float32, dims=dict.fromkeys(("student", "teacher", "projected"), width))
    plan = plan_of(primitives)
    with Largest() as largest:
        run(features, plan, tile_rows=rows)[0].backward()
    assert largest.elements <= max(256 * 1024 // 4, 2 * rows * n)
    assert largest.elements < n * n / 8
    # some tiles are kept, which spares a few percent of the products
    unit = n * n * width
    assert 0.9 * products * unit < largest.work <= products * unit


def test_forward_alone_computes_each_product_once() -> None:
    n, width = 256, 8
    features = make_features(n, dtype=torch.float32, dims=dict.fromkeys(("student", "teacher", "projected"), width))
    with torch.no_grad(), Largest() as largest:
        run(features, plan_of(CLIP_RD), tile_rows=16)
    assert largest.work == 6 * n * n * width


def test_all_scales_are_covered() -> None:
    # the helper's scales and the pairings must not drift apart, or a test above would silently skip a scale
    assert {name for p in plan_of(CLIP_RD).pairings.values() for name in (p.scale,)} <= set(SCALES)
