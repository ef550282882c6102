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
    options = {"bank_cross_temperature": 0.1, "bank_cross_student": 0.2}
    output = Objective({"bank_cross": 1}, 5, 5, engine=engine, **options)(student, replace(teacher, bank=bank))  # type: ignore[arg-type]
    image = kl(unit(teacher.image) @ bank.text.T / 0.1, unit(student.image) @ bank.text.T / 0.2)
    text = kl(unit(teacher.text) @ bank.image.T / 0.1, unit(student.text) @ bank.image.T / 0.2)
    expected = (image + text) / 2
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for part in (student.image, student.text):
        (found,), (wanted,) = (torch.autograd.grad(v, part, retain_graph=True) for v in (output.total, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_only_the_own_captions_and_picture_as_the_target() -> None:
    """The widths differ: the projection learns too."""
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    bank = random_bank(6, 5, 3)
    torch.manual_seed(0)
    objective = Objective({"bank_cross": 1}, 4, 5, bank_cross_positives=1.0, bank_cross_temperature=0.5).double()
    output = objective(student, replace(teacher, bank=bank))
    assert objective.image_projection is not None
    assert objective.text_projection is not None
    image, text = (
        unit(layer(part))
        for layer, part in ((objective.image_projection, student.image), (objective.text_projection, student.text))
    )
    to_text, to_image = (
        (2 * rows @ columns.T).log_softmax(1) for rows, columns in ((image, bank.text), (text, bank.image))
    )
    expected = -to_image[torch.arange(6), bank.place].sum()
    for i, place in enumerate(bank.place.tolist()):
        first = int(bank.counts[:place].sum())
        own = slice(first, first + int(bank.counts[place]))
        share = (2 * unit(teacher.image)[i] @ bank.text[own].T).softmax(0)
        expected = expected + (share * (share.log() - to_text[i, own])).sum()
    expected = expected / 12
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    weight = objective.text_projection.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (output.total, expected))
    )
