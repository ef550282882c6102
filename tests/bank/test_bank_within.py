from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipdistill.objective import Objective
from tests.objective.plain import kl, random_bank, random_embeddings, unit


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_by_hand(engine: str) -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    bank = random_bank(6, 5, 3)
    options = {"bank_within_temperature": 0.1, "bank_within_student": 0.2}
    output = Objective({"bank_within": 1}, 5, 5, engine=engine, **options)(student, replace(teacher, bank=bank))  # type: ignore[arg-type]
    image = kl(unit(teacher.image) @ bank.image.T / 0.1, unit(student.image) @ bank.image.T / 0.2)
    text = kl(unit(teacher.text) @ bank.text.T / 0.1, unit(student.text) @ bank.text.T / 0.2)
    expected = (image + text) / 2
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for part in (student.image, student.text):
        (found,), (wanted,) = (torch.autograd.grad(v, part, retain_graph=True) for v in (output.total, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
