"""Active curation by hand, against a plain loop, and as draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipdistill.curation.select import Worths, select


def test_worths_by_hand() -> None:
    """Pair 1 among pair 0 and itself: log(e^0 + e^2) - 2 by its row, log(e^1 + e^2) - 2 by its column, halved."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    worths = Worths(logits)
    assert worths().abs().max() < 1e-6
    worths.add(torch.tensor([0]))
    rows, columns = math.log(1 + math.e**2) - 2, math.log(math.e + math.e**2) - 2
    assert float(worths()[1]) == pytest.approx((rows + columns) / 2, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_worths_against_a_plain_loop(seed: int) -> None:
    torch.manual_seed(seed)
    logits, chosen = 5 * torch.randn(9, 9), torch.randperm(9)[:4]
    worths = Worths(logits)
    for part in chosen.split(3):
        worths.add(part)
    for i, value in enumerate(worths().tolist()):
        if i in chosen.tolist():
            continue  # what is drawn is not asked again
        among = [*chosen.tolist(), i]
        row = math.log(sum(math.exp(logits[i, j]) for j in among))
        column = math.log(sum(math.exp(logits[j, i]) for j in among))
        assert value == pytest.approx((row + column) / 2 - float(logits[i, i]), abs=1e-4)


@pytest.mark.parametrize(("total", "count"), [(8, 8), (20, 4), (64, 32), (5, 1), (100, 33)])
def test_a_draw_has_its_size_and_no_pair_twice(total: int, count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, total, total)
    drawn = select(logits[0], logits[1], count, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == len(drawn) == count
    assert drawn.tolist() == sorted(drawn.tolist())
    assert torch.equal(drawn, select(logits[0], logits[1], count, np.random.default_rng(0)))


def test_what_the_student_confuses_and_the_teacher_knows_is_drawn() -> None:
    """Pairs 0 to 9: hard for the student alone; 10 to 19: hard for both (unlearnable); 20 to 39: easy for both."""
    easy = 20 * torch.eye(40)
    student, teacher = easy.clone(), easy.clone()
    student[:20, :20] = 0
    teacher[10:20, 10:20] = 0
    counts = np.zeros(40)
    for seed in range(200):
        counts[select(student, teacher, 20, np.random.default_rng(seed)).numpy()] += 1
    assert counts[:10].mean() > 1.3 * counts[10:20].mean()
    assert counts[:10].mean() > 1.3 * counts[20:].mean()
    assert abs(counts[10:20].mean() / counts[20:].mean() - 1) < 0.15


def test_equal_models_draw_evenly() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(16, 16)
    counts = np.zeros(16)
    for seed in range(800):
        counts[select(logits, logits, 4, np.random.default_rng(seed)).numpy()] += 1
    assert abs(counts / 200 - 1).max() < 0.25
