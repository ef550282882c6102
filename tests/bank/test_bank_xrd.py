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
    objective = Objective({"bank_xrd": 1}, 5, 5, engine=engine, bank_xrd_temperature=0.1)  # type: ignore[arg-type]
    output = objective(student, replace(teacher, bank=bank))
    owner = torch.repeat_interleave(torch.arange(len(bank.counts)), bank.counts)
    captions = unit(torch.stack([bank.text[owner == picture].mean(0) for picture in range(len(bank.counts))]))
    one = unit(student.image) @ captions.T / 0.1
    other = unit(student.text) @ bank.image.T / 0.1
    expected = (kl(other, one) + kl(one, other)) / 2
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for part in (student.image, student.text):
        (found,), (wanted,) = (torch.autograd.grad(v, part, retain_graph=True) for v in (output.total, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
