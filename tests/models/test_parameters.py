"""Freezing and the optimiser's groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.models.parameters import (
    decays,
    evaluation_mode,
    freeze,
    hold_frozen_statistics,
    parameter_groups,
    tower_of,
)

Make = Callable[..., ClipModel]
TIMM = {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
TIMM_VIT = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


@pytest.mark.parametrize("vision", [None, TIMM, RESNET], ids=["vit", "timm", "resnet"])
def test_no_decay_split_follows_open_clip(make_tiny: Make, vision: dict[str, object] | None) -> None:
    module = make_tiny(init_logit_bias=-10.0, **({} if vision is None else {"vision_cfg": vision})).module
    first, second = parameter_groups(module, weight_decay=0.2, learning_rate=1e-3)
    assert (first["name"], first["weight_decay"], first["lr"]) == ("decay", 0.2, 1e-3)
    assert (second["name"], second["weight_decay"], second["lr"]) == ("no decay", 0.0, 1e-3)
    names = {id(p): name for name, p in module.named_parameters()}
    decayed = {names[id(p)] for p in first["params"]}
    kept = {names[id(p)] for p in second["params"]}
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    for name, parameter in module.named_parameters():
        excluded = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        assert (name in kept) == excluded
    assert {"logit_scale", "logit_bias"} <= kept
    torch.optim.AdamW([first, second])


def test_named_examples(make_tiny: Make) -> None:
    parameters = dict(make_tiny().module.named_parameters())
    for name in ("visual.conv1.weight", "positional_embedding", "token_embedding.weight", "visual.proj"):
        assert decays(name, parameters[name])
    for name in (
        "visual.class_embedding",
        "visual.ln_pre.weight",
        "visual.transformer.resblocks.0.mlp.c_fc.bias",
        "logit_scale",
    ):
        assert not decays(name, parameters[name])


def test_frozen_parameters_are_in_no_group(make_tiny: Make) -> None:
    module = make_tiny().module
    frozen = freeze(module, ["image"])
    groups = parameter_groups(module, weight_decay=0.2, learning_rate=1.0)
    grouped = sum(p.numel() for group in groups for p in group["params"])
    assert frozen + grouped == sum(p.numel() for p in module.parameters())
    assert frozen == sum(p.numel() for p in module.visual.parameters())


def test_layer_decay_by_depth(make_tiny: Make) -> None:
    module = make_tiny().module
    groups = parameter_groups(module, weight_decay=0.2, learning_rate=1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in module.named_parameters()}
    expected = {
        "logit_scale": 1.0,
        "visual.proj": 1.0,
        "visual.ln_post.weight": 1.0,
        "visual.transformer.resblocks.1.ln_1.weight": 0.5,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.25,
        "visual.conv1.weight": 0.125,
        "visual.positional_embedding": 0.125,
        "visual.ln_pre.bias": 0.125,
        "text_projection": 1.0,
        "ln_final.weight": 1.0,
        "transformer.resblocks.1.mlp.c_proj.weight": 0.5,
        "transformer.resblocks.0.mlp.c_proj.weight": 0.25,
        "token_embedding.weight": 0.125,
        "positional_embedding": 0.125,
    }
    assert {name: rates[name] for name in expected} == expected


@pytest.mark.parametrize("vision", [TIMM, TIMM_VIT, RESNET], ids=["timm", "timm vit", "resnet"])
def test_layer_decay_rises_towards_the_output_in_every_tower(make_tiny: Make, vision: dict[str, object]) -> None:
    module = make_tiny(vision_cfg=vision).module
    groups = parameter_groups(module, weight_decay=0.2, learning_rate=1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    image = [
        rate[id(p)] for name, p in module.named_parameters() if tower_of(name) == "image" and "pos_embed" not in name
    ]
    assert min(image) < 0.5
    assert max(image) == 1.0
    assert image[0] == min(image)
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_impossible_layer_decay_is_refused(make_tiny: Make, value: float) -> None:
    with pytest.raises(InputError, match="layer_decay"):
        parameter_groups(make_tiny().module, weight_decay=0.2, learning_rate=1.0, layer_decay=value)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("text", None), ("visual.conv1", 1), ("visual.transformer.resblocks.[01].ln_1.*", 4), ("logit_scale", 1)],
)
def test_patterns(make_tiny: Make, pattern: str, count: int | None) -> None:
    module = make_tiny().module
    freeze(module, [pattern])
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    expected = [name for name, _ in module.named_parameters() if tower_of(name) == "text"]
    assert (len(frozen) == count) if count is not None else (frozen == expected)


def test_wrong_patterns_are_refused(make_tiny: Make) -> None:
    with pytest.raises(InputError, match="did you mean 'image'"):
        freeze(make_tiny().module, ["imag"])
    with pytest.raises(InputError, match=r"did you mean 'visual\.transformer"):
        freeze(make_tiny().module, ["visual.transformers.resblocks"])
    with pytest.raises(InputError, match="nothing to train"):
        freeze(make_tiny().module, ["image", "text", "logit_scale"])
    assert freeze(make_tiny().module, []) == 0


def test_frozen_batch_norm_statistics_stand_still(make_tiny: Make) -> None:
    module = make_tiny(vision_cfg=TIMM).module
    freeze(module, ["visual.trunk"])
    hold_frozen_statistics(module.train())
    before = {name: tensor.clone() for name, tensor in module.visual.named_buffers()}
    module.encode_image(torch.rand(4, 3, 160, 160))
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.visual.named_buffers())
    trainable = make_tiny(vision_cfg=TIMM).module
    hold_frozen_statistics(trainable.train())
    trainable.encode_image(torch.rand(4, 3, 160, 160))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainable.visual.named_buffers())


def test_evaluation_mode_puts_every_part_back_as_it_was():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    module.train()[1].eval()  # held, as a frozen tower's statistics are
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module] == [True, False, True]
    with pytest.raises(KeyError), evaluation_mode(module):
        raise KeyError
    assert [part.training for part in module] == [True, False, True]
