"""Blocks of their own size: equal to open_clip's where both exist, empty ones, checks of what a file may say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.sized import SizedAttention, SizedMlp

Make = Callable[..., ClipModel]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(causal: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    ours = SizedAttention(24, 3, 8).double()
    ours.load_state_dict(theirs.state_dict())
    stream = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1) if causal else None
    expected = theirs(stream, stream, stream, need_weights=False, attn_mask=mask)[0]
    found = ours(stream, stream, stream, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), [stream, ours.in_proj_weight]),
        torch.autograd.grad((expected * weight).sum(), [stream, theirs.in_proj_weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_no_heads_and_no_units_leave_the_bias_and_still_train() -> None:
    attention, mlp = SizedAttention(6, 0, 4), SizedMlp(6, 0, nn.GELU())
    nn.init.normal_(attention.out_proj.bias)
    stream = torch.randn(2, 3, 6, requires_grad=True)
    assert torch.equal(attention(stream, stream, stream)[0], attention.out_proj.bias.expand(2, 3, 6))
    assert torch.equal(mlp(stream), mlp.c_proj.bias.expand(2, 3, 6))
    (attention(stream, stream, stream)[0] + mlp(stream)).sum().backward()
    assert all(p.grad is not None for p in [*attention.parameters(), *mlp.parameters()])


def sized(make_tiny: Make) -> dict[str, Any]:
    architecture = copy.deepcopy(make_tiny().architecture)
    architecture["block_sizes"] = {"image": {"head_width": 16, "heads": [1, 0], "mlp": [7, 0]}}
    return architecture


def test_initial_weights_are_a_function_of_the_seed(make_tiny: Make) -> None:
    architecture = check_architecture(sized(make_tiny))
    one, two = (build_module(architecture, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape == (7, 32)
    image = build_module(architecture, seed=5).encode_image(torch.randn(2, 3, 32, 32))
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(audio=b.pop("image")), "unknown key 'audio'"),
        (lambda b: b["image"].pop("mlp"), "must have exactly the keys"),
        (lambda b: b["image"].update(heads=[1]), "one number for each of 2 layers"),
        (lambda b: b["image"].update(heads=[1, -1]), "impossible number"),
        (lambda b: b["image"].update(mlp=[1, 10**9]), "impossible number"),
        (lambda b: b["image"].update(mlp=[1, True]), "impossible number"),
        (lambda b: b["image"].update(head_width=0), "head_width must be"),
        (lambda b: b.clear(), "must be a mapping"),
    ],
)
def test_hostile_descriptions_are_refused(make_tiny: Make, change: Callable[[Any], Any], message: str) -> None:
    architecture = sized(make_tiny)
    change(architecture["block_sizes"])
    with pytest.raises(InputError) as caught:
        check_architecture(architecture)
    assert message in str(caught.value)


def test_other_block_kinds_are_refused(make_tiny: Make) -> None:
    architecture = sized(make_tiny)
    architecture["vision_cfg"]["qk_norm"] = True
    with pytest.raises(InputError, match="'qk_norm' cannot be combined"):
        check_architecture(architecture)
    architecture = sized(make_tiny)
    architecture["vision_cfg"] = {"timm_model_name": "test_resnet", "image_size": 160}
    with pytest.raises(InputError, match="no open_clip transformer"):
        check_architecture(architecture)
