"""The term logit_mse by hand, in both forms, and as the limit of a divergence."""

from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Objective
from clipdistill.objective.features import Embeddings
from tests.objective.plain import kl, random_embeddings, unit


def test_two_pairs_by_hand() -> None:
    """S = 2 [[1, 0], [0, 1]], T = 3 [[0.8, 0.6], [0.6, -0.8]]: differences -0.4, -1.8, -1.8, 4.4."""
    student = Embeddings(torch.eye(2).double(), torch.eye(2).double(), torch.tensor(2.0).double())
    teacher = Embeddings(torch.eye(2).double(), torch.tensor([[0.8, 0.6], [0.6, -0.8]], dtype=torch.float64), 3.0)
    found = Objective({"logit_mse": 1}, 2, 2)(student, teacher).total.item()
    assert found == pytest.approx((0.4**2 + 1.8**2 + 1.8**2 + 4.4**2) / 4, rel=1e-12)
    # less each row's mean (-1.1, 1.3): 0.7, -0.7, -3.1, 3.1; the matrix is symmetric, so the columns are alike
    centred = Objective({"logit_mse": 1}, 2, 2, logit_mse_centred=True)(student, teacher).total.item()
    assert centred == pytest.approx((2 * 0.7**2 + 2 * 3.1**2) / 4, rel=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_values_and_gradients_of_whole_matrices(centred: bool) -> None:
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    output = Objective({"logit_mse": 1}, 4, 5, logit_mse_centred=centred)(student, teacher)
    ours = student.logit_scale * unit(student.image) @ unit(student.text).T
    theirs = 20.0 * unit(teacher.image) @ unit(teacher.text).T
    gaps = [ours - theirs, (ours - theirs).T]
    if centred:
        gaps = [gap - gap.mean(1, keepdim=True) for gap in gaps]
    expected = torch.stack([(gap**2).mean() for gap in gaps]).mean()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for part in (student.image, student.text, student.logit_scale):
        (found,), (wanted,) = (torch.autograd.grad(v, part, retain_graph=True) for v in (output.total, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_centred_it_is_the_limit_of_a_softer_and_softer_divergence() -> None:
    """tau^2 KL(T / tau || S / tau) tends to half the mean over columns of the centred squares (Kim et al.)."""
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    found = Objective({"logit_mse": 1}, 5, 5, logit_mse_centred=True)(student, teacher).total.item()
    ours = float(student.logit_scale) * unit(student.image) @ unit(student.text).T
    theirs = 20.0 * unit(teacher.image) @ unit(teacher.text).T
    tau = 1e4
    soft = sum(tau**2 * kl(t / tau, s / tau).item() / 2 for t, s in ((theirs, ours), (theirs.T, ours.T)))
    assert found / 2 == pytest.approx(soft, rel=1e-3)


def test_a_student_with_the_teachers_logits_has_nothing_to_learn_also_in_float32() -> None:
    teacher = random_embeddings(64, 16, 100.0, 2, dtype=torch.float32)
    image = teacher.image.clone().requires_grad_()
    output = Objective({"logit_mse": 1}, 16, 16)(Embeddings(image, teacher.text, torch.tensor(100.0)), teacher)
    assert output.total.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(output.total, image)
    assert float(gradient.abs().max()) < 1e-4
