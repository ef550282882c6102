"""The compiled element-wise work of the tiled engine: its arithmetic (uncompiled, fast), the compiler, its absence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from clipdistill.objective.engines import EngineOptions, tiled_fused
from tests.objective.test_tiled import LARGE, LARGE_SCALES, converted, largest_error, run, with_scales
from tests.objective.tiled_cases import CLIP_RD, make_features, plan_of, random_plan, reference, relative


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test starts without compiled functions and with the hope that compiling works."""
    before = dict(tiled_fused._compiled), tiled_fused._broken
    tiled_fused._compiled.clear()
    tiled_fused._broken = False
    yield
    tiled_fused._compiled.clear()
    tiled_fused._compiled.update(before[0])
    tiled_fused._broken = before[1]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile returns the function as it is; filled with the names of the functions given to it."""
    given: list[str] = []

    def compile_(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        given.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    return given


@pytest.mark.parametrize("seed", range(20))
def test_random_mixes(seed: int, interpreted: list[str]) -> None:
    assert largest_error(make_features(19, seed=seed), random_plan(seed), tile_rows=4, compile=True) < 1e-12


def test_clip_rd_compiles_a_function_per_pair_and_pass(interpreted: list[str]) -> None:
    for n in (19, 30):
        assert largest_error(make_features(n), plan_of(CLIP_RD), tile_rows=4, compile=True) < 1e-12
    assert interpreted == ["sums", "gradients"] * 3


def test_float32_is_as_exact_as_the_eager_path(interpreted: list[str]) -> None:
    features = make_features(300, dtype=torch.float32)
    exact = converted(features, torch.float64)
    plan = plan_of(CLIP_RD)
    total, terms = run(features, plan, compile=True)
    expected, expected_terms = reference(exact, plan)
    assert relative(total, expected) < 1e-6
    for name, value in expected_terms.items():
        assert relative(terms[name], value) < 1e-6
    assert largest_error(features, plan, exact, compile=True) < 1e-5


def test_rows_with_shifts_of_their_own_and_sigmoids_stay_eager(interpreted: list[str]) -> None:
    features = with_scales(make_features(20, dtype=torch.float32), dict.fromkeys(LARGE_SCALES, 1000.0))
    assert largest_error(features, plan_of(LARGE), converted(features, torch.float64), compile=True) < 3e-4
    assert interpreted == ["sums"]  # tried before the underflow was noticed


def test_without_a_compiler_the_engine_goes_on_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def fail(*arguments: Any) -> None:
            tried.append(function)
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        assert largest_error(make_features(12), plan_of(CLIP_RD), compile=True) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest_error(make_features(12), plan_of(CLIP_RD), compile=True) < 1e-12
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("device", "option", "variable", "expected"),
    [
        ("cpu", None, None, False),
        ("cuda", None, None, True),
        ("cpu", None, "1", True),
        ("cuda", None, "0", False),
        ("cpu", True, "0", True),
        ("cuda", False, "1", False),
    ],
)
def test_who_decides(
    device: str, option: bool | None, variable: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tiled_fused.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(tiled_fused.VARIABLE, variable)
    assert tiled_fused.wanted(torch.device(device), EngineOptions(compile=option)) == expected


@pytest.mark.slow
def test_really_compiled() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (70, 33):
            assert largest_error(make_features(n), plan_of(CLIP_RD), tile_rows=16, compile=True) < 1e-12
    if any("torch.compile" in str(warning.message) for warning in caught):
        pytest.skip("no working compiler on this machine")
    assert len(tiled_fused._compiled) == 6
