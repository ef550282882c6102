from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clipdistill.objective import Embeddings
from tests.objective.mixes import gradients, leaves, make_input, make_objective, mix_names


def on_gpu(embeddings: Embeddings) -> Embeddings:
    moved: dict[str, Any] = {}
    for name in ("image", "text", "synthetic_text", "logit_scale", "logit_bias"):
        value = getattr(embeddings, name)
        if isinstance(value, torch.Tensor):
            moved[name] = value.detach().cuda().requires_grad_(value.requires_grad)
    if embeddings.bank is not None:
        parts = ("image", "text", "counts", "place")
        moved["bank"] = replace(embeddings.bank, **{part: getattr(embeddings.bank, part).cuda() for part in parts})
    if embeddings.classes is not None:
        moved["classes"] = embeddings.classes.cuda()
    return replace(embeddings, **moved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", mix_names())
def test_gpu_equals_cpu(mix: str) -> None:
    student, teacher = make_input(mix, 33, 5, 8)
    objective = make_objective(mix, 5, 8, "dense")
    reference = objective(student, teacher).total
    expected = gradients(reference, leaves(student, objective))
    student, teacher, objective = on_gpu(student), on_gpu(teacher), objective.cuda()
    total = objective(student, teacher).total
    assert total.item() == pytest.approx(reference.item(), rel=1e-10)
    for name, gradient in gradients(total, leaves(student, objective)).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-8, atol=1e-10)
