from __future__ import annotations

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_embeddings
from tests.objective.released import Fixture, assert_equal, released

KEYS = ("a", "b", "b_syn", "logit_scale")


def embeddings(fixture: Fixture, synthetic: bool = True) -> tuple[Embeddings, Embeddings, dict[str, torch.Tensor]]:
    leaves = {key: fixture[key].clone().requires_grad_() for key in KEYS}
    extra, teacher_extra = (leaves["b_syn"], fixture["V_syn"]) if synthetic else (None, None)
    student = Embeddings(leaves["a"], leaves["b"], leaves["logit_scale"], synthetic_text=extra)
    teacher = Embeddings(
        fixture["U"],
        fixture["V"],
        fixture["dist_logit_scale"],
        blocks=[int(d) for d in fixture["teacher_dimension"]],
        synthetic_text=teacher_extra,
    )
    return student, teacher, leaves


@pytest.mark.parametrize("share", ["1.0", "0.75"])
@pytest.mark.parametrize("form", ["two weights", "one weight"])
def test_equals_mobileclip(share: str, form: str) -> None:
    fixture = released(f"mobileclip_N8_s24_t32+20_lam{share}")
    student, teacher, leaves = embeddings(fixture)
    value = float(share)
    if form == "two weights":
        objective = Objective({"task": 1 - value, "reinforced": value}, 24, 52, engine="dense")
    else:
        objective = Objective({"reinforced": 1}, 24, 52, reinforced_lambda=value, engine="dense")
    output = objective(student, teacher)
    assert_equal(output.total.detach(), fixture["loss_total"], "total")
    if form == "two weights":
        assert_equal(value * output.terms["reinforced"], fixture["loss_distill"], "distillation")
        if value < 1:
            assert_equal((1 - value) * output.terms["task"], fixture["loss_contrastive"], "contrast")
    output.total.backward()
    for key in KEYS:
        assert_equal(leaves[key].grad, fixture[f"grad_total__{key}"], key)


@pytest.mark.parametrize("share", ["1.0", "0.75"])
def test_real_caption_alone(share: str) -> None:
    fixture = released(f"mobileclip_N8_s24_t32+20_lam{share}")
    student, teacher, _ = embeddings(fixture, synthetic=False)
    output = Objective({"reinforced": 1}, 24, 52, engine="dense")(student, teacher)
    assert_equal(float(share) * output.total.detach(), fixture["loss_distill_real"], "distillation")


def test_one_teacher_is_affinity() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 7, 20.0, 2)
    reinforced = Objective({"reinforced": 1}, 5, 7, engine="dense")(student, teacher).total
    affinity = Objective({"affinity": 1}, 5, 7, engine="dense")(student, teacher).total
    assert reinforced.item() == pytest.approx(affinity.item(), rel=1e-14)


def test_one_scale_serves_all_teachers() -> None:
    fixture = released("mobileclip_N8_s24_t32+20_lam1.0")
    student, teacher, _ = embeddings(fixture)
    objective = Objective({"reinforced": 1}, 24, 52, engine="dense")
    one = Embeddings(teacher.image, teacher.text, 70.0, blocks=teacher.blocks, synthetic_text=teacher.synthetic_text)
    two = Embeddings(teacher.image, teacher.text, [70.0] * 2, blocks=teacher.blocks, synthetic_text=one.synthetic_text)
    assert objective(student, one).total.item() == objective(student, two).total.item()


def test_synthetic_caption_must_be_on_both_sides() -> None:
    fixture = released("mobileclip_N8_s24_t32+20_lam1.0")
    student, _, _ = embeddings(fixture)
    _, teacher, _ = embeddings(fixture, synthetic=False)
    with pytest.raises(InputError, match="synthetic caption"):
        Objective({"reinforced": 1}, 24, 52, engine="dense")(student, teacher)
