"""Terms of one modality, and a step that has one only."""

from __future__ import annotations

import math

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective, ObjectiveConfig

TERMS = {"cosine_image": 1, "cosine_text": 2, "within_image": 3, "within_text": 4}


def rows(seed: int, width: int = 6, count: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_formulas():
    image, text, u, v = (torch.nn.functional.normalize(rows(seed), dim=1) for seed in range(4))
    output = Objective(TERMS, 6, 6)(Embeddings(image, text, 1.0), Embeddings(u, v, 1.0))
    expected = {}
    for name, own, teacher in (("image", image, u), ("text", text, v)):
        expected[f"cosine_{name}"] = 1 - (own * teacher).sum(1).mean()
        target, logits = (10 * teacher @ teacher.T).softmax(1), (10 * own @ teacher.T).log_softmax(1)
        expected[f"within_{name}"] = (target * (target.log() - logits)).sum(1).mean()
    assert {name: float(value) for name, value in output.terms.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}
    )


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("missing", ["text", "image"])
def test_a_step_without_a_modality_has_the_terms_of_the_other(missing, engine):
    there = "image" if missing == "text" else "text"
    objective = Objective({**TERMS, "fd": 1, "task": 1}, 6, 8, engine=engine)
    student = {"image": rows(0).requires_grad_(), "text": rows(1).requires_grad_()}
    teacher = {"image": rows(2, 8), "text": rows(3, 8)}
    whole = objective(Embeddings(**student, logit_scale=1.0), Embeddings(**teacher, logit_scale=1.0))
    part = objective(Embeddings(**{**student, missing: None}, logit_scale=1.0), Embeddings(**teacher, logit_scale=1.0))
    assert set(part.terms) == {f"cosine_{there}", f"within_{there}"}
    assert {name: float(value) for name, value in part.terms.items()} == pytest.approx(
        {name: float(whole.terms[name]) for name in part.terms}
    )
    total = sum(TERMS[name] * float(value) for name, value in part.terms.items())
    assert float(part.total.detach()) == pytest.approx(total)
    part.total.backward()
    assert student[missing].grad is None
    assert math.isfinite(float(student[there].grad.norm()))


def test_no_term_for_what_is_there_is_an_error():
    with pytest.raises(InputError, match="no term of task, fd reads the image alone"):
        Objective({"task": 1, "fd": 1}, 6, 6)(Embeddings(rows(0), None, 1.0), Embeddings(rows(1), None, 1.0))


def test_terms_say_which_modalities_they_read():
    config = ObjectiveConfig(weights={**TERMS, "fd": 1, "icl": 1, "vrd_ce": 1})
    both = ("image", "text")
    assert config.modalities == {
        "cosine_image": ("image",), "cosine_text": ("text",), "within_image": ("image",), "within_text": ("text",),
        "fd": both, "icl": both, "vrd_ce": both,
    }  # fmt: skip
