"""The mask distribution: formulas by hand and by sampling, the inference rule."""

from __future__ import annotations

import math

import torch

from clipdistill.models.inheritance.hard_concrete import (
    HIGHEST,
    LOWEST,
    draw_noise,
    inference_mask,
    probability_open,
    sample,
)


def by_hand(u: float, log_alpha: float) -> float:
    value = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, value * 1.2 - 0.1))


def test_samples_by_hand() -> None:
    for log_alpha in (-3.0, 0.0, 2.5):
        for u in (0.01, 0.3, 0.5, 0.97):
            found = sample(torch.tensor(log_alpha, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
            assert abs(float(found) - by_hand(u, log_alpha)) < 1e-12


def test_probability_equals_the_share_of_open_samples() -> None:
    noise = draw_noise(200_000, torch.Generator().manual_seed(0)).double()
    for log_alpha in (-4.0, -1.6, 0.0, 1.5):
        value = torch.tensor(log_alpha, dtype=torch.float64)
        share = (sample(value, noise) > 0).double().mean()
        expected = probability_open(value)
        x = 0.1 / 1.2
        formula = 1 - 1 / (1 + math.exp(-(2 / 3 * math.log(x / (1 - x)) - log_alpha)))
        assert abs(float(expected) - formula) < 1e-12
        assert abs(float(share - expected)) < 4 * math.sqrt(0.25 / len(noise))


def test_samples_reach_both_ends_and_have_a_gradient_between() -> None:
    log_alpha = torch.zeros(1000, requires_grad=True)
    values = sample(log_alpha, draw_noise(1000, torch.Generator().manual_seed(1)))
    assert (values == 0).any()
    assert (values == 1).any()
    values.sum().backward()
    inside = (values > 0) & (values < 1)
    assert (log_alpha.grad[inside] > 0).all()
    assert (log_alpha.grad[~inside] == 0).all()


def test_noise_stays_inside_and_is_a_function_of_its_generator() -> None:
    one, two = (draw_noise(10_000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.min() >= 1e-6
    assert one.max() <= 1 - 1e-6
    assert sample(torch.full((10_000,), LOWEST), one).isfinite().all()


def test_inference_mask_closes_the_expected_number_of_the_smallest() -> None:
    log_alpha = torch.tensor([HIGHEST, -2.0, 3.0, LOWEST, 0.5, LOWEST])
    mask = inference_mask(log_alpha)
    zeros = float((1 - probability_open(log_alpha)).sum())
    assert int((mask == 0).sum()) == round(zeros) == 3
    assert (mask == 0).nonzero().flatten().tolist() == [1, 3, 5]
    expected = torch.sigmoid(0.8 * log_alpha / (2 / 3))
    assert torch.equal(mask[[0, 2, 4]], expected[[0, 2, 4]])


def test_inference_mask_keeps_what_it_is_told_to() -> None:
    closed = torch.full((5,), LOWEST)
    assert (inference_mask(closed) == 0).all()
    assert inference_mask(closed, keep=1).count_nonzero() == 1
    assert inference_mask(closed, keep=1)[0] > 0  # of equal entries the later ones go
    assert inference_mask(torch.empty(0)).shape == (0,)
