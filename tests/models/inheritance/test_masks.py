"""Masks on a model: what is gated, the constraint, and pruning that changes no output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models import ClipModel, build_student, build_words_tokenizer, load_model, save_model
from clipdistill.models.inheritance.gates import OpenLayerNorm, gateable_copy
from clipdistill.models.inheritance.hard_concrete import HIGHEST, LOWEST, probability_open
from clipdistill.models.inheritance.masks import Constraint, Masks, prunable, reference_counts
from clipdistill.models.inheritance.parts import TransformerSizes, transformer_sizes
from clipdistill.models.inheritance.prune import prune
from clipdistill.models.mask_config import MaskConfig
from clipdistill.models.sized import SizedAttention

BOTH = ("image", "text")
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "variants": {"no_ln_pre": True, "ls_init_value": 0.3, "pool_type": "avg", "final_ln_after_pool": True},
}


def is_sized(module):
    """Whether any block of the model has a size of its own."""
    return any(isinstance(part, SizedAttention) for part in module.modules())


def tiny(custom_text: bool = False, **vision: Any) -> ClipModel:
    architecture = {
        "embed_dim": 12,
        "quick_gelu": False,
        "custom_text": custom_text,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 16, **vision},
        "text_cfg": {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 2},
    }
    model = build_student(architecture, seed=1, tokenizer=build_words_tokenizer(["a red dog and two cats"], 9))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # initial biases are zero and gains one: move both, or folding them would go unseen
        for name, parameter in model.module.named_parameters():
            if parameter.ndim == 1 and "gamma" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.module.eval()
    return model


def encode(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    tokens = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0, 0], [1, 7, 4, 3, 5, 6, 7, 8, 9]]).clamp_max(9)
    return module.encode_image(images), module.encode_text(tokens)


def settings(**changes: Any) -> MaskConfig:
    return MaskConfig(**{"sparsity": 0.5, "prune_step": 10, **changes})


def scatter(masks: Masks, seed: int = 0) -> None:
    """Spread log alpha over its range, and close one layer's heads and another's MLP wholly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in masks.towers:
            tower = masks.tower(name)
            for part, values in tower.log_alpha.items():
                values.copy_(torch.rand(values.shape, generator=generator) * (HIGHEST - LOWEST) + LOWEST)
                if part == "heads":
                    values[: tower.sizes.heads[0]] = LOWEST
                if part == "mlp":
                    values[-tower.sizes.units[-1] :] = -60.0  # the bound itself leaves 4.7 % of the units


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_change_nothing(variant: str, custom_text: bool) -> None:
    model = tiny(custom_text, **VARIANTS[variant])
    expected = encode(model.module)
    gated = gateable_copy(model, BOTH)
    masks = Masks(gated.module, settings())
    for a, b in zip(encode(gated.module), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.fill_(60.0)  # z = 1 for any noise
    with masks.acting(sampled=True):
        found = encode(gated.module)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_layer_norm_over_open_channels_only() -> None:
    norm = OpenLayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    stream = torch.randn(3, 5, 6)
    norm.gate = torch.tensor([1.0, 0.0, 0.4, 1.0, 0.0, 0.2])
    kept = [0, 2, 3, 5]
    expected = nn.functional.layer_norm(stream[..., kept], (4,), norm.weight[kept], norm.bias[kept], norm.eps)
    found = norm(stream)
    torch.testing.assert_close(found[..., kept], expected)
    assert (found[..., [1, 4]] == 0).all()
    norm.gate = None
    assert torch.equal(norm(stream), nn.functional.layer_norm(stream, (6,), norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pruned_model_equals_the_masked_one(variant: str, custom_text: bool, tmp_path: Any) -> None:
    model = gateable_copy(tiny(custom_text, **VARIANTS[variant]), BOTH)
    masks = Masks(model.module, settings())
    scatter(masks)
    with torch.no_grad(), masks.acting(sampled=False):
        expected = encode(model.module)
    with torch.no_grad():
        unmasked = encode(model.module)
    smaller = prune(model, masks)
    with torch.no_grad():
        found = encode(smaller.module)
    for a, b, c in zip(found, expected, unmasked, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert (a - c).abs().max() > 1e-2  # the masks did something
    sizes = transformer_sizes(smaller.module, "image")
    assert sizes.heads[0] == 0
    assert sizes.units[-1] == 0
    gates = masks.tower("image").at_inference()
    assert sizes.width == int(gates.width.count_nonzero()) < 32
    assert sizes.heads == tuple(int(g.count_nonzero()) for g in gates.heads)
    assert smaller.parameter_counts()["total"] < model.parameter_counts()["total"]
    # an ordinary model: written, read, named
    save_model(smaller, tmp_path / "pruned")
    again = load_model(tmp_path / "pruned")
    again.module.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(encode(again.module), found, strict=True))
    assert not any(isinstance(part, OpenLayerNorm) for part in again.module.modules())


@pytest.mark.parametrize("parts", [("width",), ("heads",), ("mlp",)])
@pytest.mark.parametrize("tower", BOTH)
def test_one_part_of_one_tower(parts: tuple[str, ...], tower: str) -> None:
    model = gateable_copy(tiny(), (tower,))
    masks = Masks(model.module, settings(parts=parts, towers=(tower,)))
    with torch.no_grad():
        for values in masks.parameters():
            values.copy_(torch.linspace(LOWEST, HIGHEST, len(values)))
    with torch.no_grad(), masks.acting(sampled=False):
        expected = encode(model.module)
    smaller = prune(model, masks)
    with torch.no_grad():
        for a, b in zip(encode(smaller.module), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    other = "text" if tower == "image" else "image"
    assert transformer_sizes(smaller.module, other) == transformer_sizes(model.module, other)
    assert smaller.parameter_counts()["total"] < model.parameter_counts()["total"]


def test_a_pruned_model_can_be_masked_and_pruned_again() -> None:
    model = gateable_copy(tiny(), BOTH)
    masks = Masks(model.module, settings())
    scatter(masks)
    second = gateable_copy(prune(model, masks), BOTH)
    masks = Masks(second.module, settings())
    scatter(masks, seed=4)
    with torch.no_grad(), masks.acting(sampled=False):
        expected = encode(second.module)
    third = prune(second, masks)
    with torch.no_grad():
        for a, b in zip(encode(third.module), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert is_sized(third.module)


def test_even_pruning_gives_a_plain_open_clip_model() -> None:
    model = gateable_copy(tiny(), BOTH)
    masks = Masks(model.module, settings(parts=("mlp",)))
    with torch.no_grad():
        for name in masks.towers:
            tower = masks.tower(name)
            values = torch.full((tower.sizes.layers, tower.sizes.units[0]), 60.0)
            values[:, ::2] = -60.0
            tower.log_alpha["mlp"].copy_(values.flatten())
    smaller = prune(model, masks)
    assert "block_sizes" not in smaller.architecture
    assert not is_sized(smaller.module)
    assert transformer_sizes(smaller.module, "image").units == (64,) * 3
    with torch.no_grad(), masks.acting(sampled=False):
        expected = encode(model.module)
    with torch.no_grad():
        for a, b in zip(encode(smaller.module), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_mask_and_gates_leave_no_trace() -> None:
    model = gateable_copy(tiny(), BOTH)
    masks = Masks(model.module, settings(initial_log_alpha=0.0))
    before = encode(model.module)
    with masks.acting(sampled=True):
        image, text = encode(model.module)
    (image.square().sum() + text.square().sum()).backward()
    for name, parameter in masks.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name
    assert all(torch.equal(a, b) for a, b in zip(encode(model.module), before, strict=True))
    names = set(model.module.state_dict())
    assert names == set(tiny().module.state_dict())


def test_noise_is_a_function_of_seed_and_step() -> None:
    one, two = (Masks(gateable_copy(tiny(), BOTH).module, settings(initial_log_alpha=0.0)) for _ in range(2))
    one.draw(3, 7)
    two.draw(3, 8)
    assert not torch.equal(one.tower("image").sampled().width, two.tower("image").sampled().width)
    two.draw(3, 7)
    for a, b in zip(one.tower("text").sampled().units, two.tower("text").sampled().units, strict=True):
        assert torch.equal(a, b)


def test_prunable_weights_are_the_matrices_of_the_blocks() -> None:
    model = tiny()
    sizes = transformer_sizes(model.module, "image")
    matrices = sum(
        p.numel() for n, p in model.module.visual.transformer.named_parameters() if p.ndim == 2 and "ln_" not in n
    )
    assert prunable(sizes) == matrices
    assert prunable(TransformerSizes(10, 4, (2, 0), (7, 3))) == 10 * (4 * 4 * 2 + 2 * 10)


def test_expected_size_is_the_sum_over_outer_products() -> None:
    masks = Masks(gateable_copy(tiny(), BOTH).module, settings())
    scatter(masks)
    tower = masks.tower("image")
    width, heads, units = (probability_open(tower.log_alpha[p].detach()) for p in ("width", "heads", "mlp"))
    by_hand = torch.outer(width, heads).sum() * 4 * 8 + 2 * torch.outer(width, units).sum()
    torch.testing.assert_close(tower.expected_size().detach(), by_hand)


def test_expected_sparsity_joint_and_per_tower() -> None:
    masks = Masks(gateable_copy(tiny(), BOTH).module, settings())
    scatter(masks)
    sizes = {name: prunable(masks.tower(name).sizes) for name in BOTH}
    left = {name: float(masks.tower(name).expected_size().detach()) for name in BOTH}
    joint = Constraint(masks, settings()).expected(masks)
    assert float(joint["joint"].detach()) == pytest.approx(1 - sum(left.values()) / sum(sizes.values()), abs=1e-6)
    own = Constraint(masks, settings(joint=False)).expected(masks)
    assert {n: float(v.detach()) for n, v in own.items()} == pytest.approx(
        {n: 1 - left[n] / sizes[n] for n in BOTH}, abs=1e-6
    )
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.fill_(60.0)
    assert float(Constraint(masks, settings()).expected(masks)["joint"].detach()) == pytest.approx(0, abs=1e-5)


def test_the_target_rises_linearly() -> None:
    masks = Masks(gateable_copy(tiny(), BOTH).module, settings())
    constraint = Constraint(masks, settings(sparsity=0.6, warmup_steps=10, start=0.2))
    assert [constraint.target(s) for s in (0, 5, 10, 99)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert Constraint(masks, settings(warmup_steps=0)).target(0) == 0.5
    apart = Constraint(masks, settings(joint=False, text_sparsity=0.25, warmup_steps=0))
    assert (apart.target(0, "image"), apart.target(0, "text")) == (0.5, 0.25)


def test_the_constraint_is_one_sided_and_its_multipliers_rise() -> None:
    masks = Masks(gateable_copy(tiny(), BOTH).module, settings())
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.fill_(1.0)
    config = settings(warmup_steps=0, initial_multiplier=3.0)
    constraint = Constraint(masks, config)
    expected = constraint.expected(masks)["joint"]
    with torch.no_grad():
        constraint.multipliers["image"].copy_(torch.tensor([2.0, 4.0]))
        constraint.multipliers["text"].copy_(torch.tensor([6.0, 10.0]))
    missing = 0.5 - float(expected)
    assert missing > 0
    assert float(constraint.penalty(masks, 0)) == pytest.approx(4 * missing + 7 * missing**2, rel=1e-5)
    constraint.add_gradients(masks, 0)
    assert all((p.grad > 0).all() for p in masks.parameters())  # going down closes masks
    torch.testing.assert_close(constraint.multipliers["image"].grad, torch.tensor([missing / 2, missing**2 / 2]))
    constraint.add_gradients(masks, 0)  # adds, so that the objective's gradient stays
    torch.testing.assert_close(constraint.multipliers["text"].grad, torch.tensor([missing, missing**2]))
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.fill_(LOWEST)
    assert float(constraint.penalty(masks, 0)) == 0


def test_sparsity_counts_from_the_reference() -> None:
    dense = tiny()
    model = gateable_copy(dense, BOTH)
    masks = Masks(model.module, settings())
    scatter(masks)
    second = gateable_copy(prune(model, masks), BOTH)
    masks = Masks(second.module, settings(sparsity=0.95))
    counts = reference_counts(dense.module, dense.architecture, BOTH)
    constraint = Constraint(masks, settings(sparsity=0.95, warmup_steps=4), counts)
    left = sum(prunable(transformer_sizes(second.module, tower)) for tower in BOTH)
    removed = 1 - left / sum(counts.values())
    assert removed > 0.5
    assert constraint.target(0) == pytest.approx(removed)
    assert constraint.target(4) == 0.95
    with pytest.raises(InputError, match="nothing to prune"):
        Constraint(masks, settings(sparsity=0.1), counts)


def test_training_the_constraint_reaches_the_target() -> None:
    """Masks and multipliers alone, by the released learning rates: the pruned size is what was asked for."""
    model = gateable_copy(tiny(), BOTH)
    config = settings(sparsity=0.6, warmup_steps=100)
    masks = Masks(model.module, config)
    constraint = Constraint(masks, config)
    optimiser = torch.optim.AdamW(
        [
            {"params": list(masks.parameters()), "lr": 0.02},
            {"params": list(constraint.parameters()), "lr": 0.02, "maximize": True},
        ],
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    values = {p: torch.randn(p.shape, generator=generator) for p in masks.parameters()}
    for step in range(900):
        optimiser.zero_grad()
        for parameter, value in values.items():  # an objective that likes some parts better than others
            parameter.grad = -value.abs() * 1e-3
        constraint.add_gradients(masks, step)
        optimiser.step()
        masks.clamp()
    assert all(float(m.min()) > 10 for m in constraint.multipliers.values())
    smaller = prune(model, masks)
    left = sum(prunable(transformer_sizes(smaller.module, tower)) for tower in BOTH)
    whole = sum(prunable(masks.tower(tower).sizes) for tower in BOTH)
    assert 1 - left / whole == pytest.approx(0.6, abs=0.06)


def test_refusals() -> None:
    timm = {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
    architecture = copy.deepcopy(tiny().architecture)
    architecture["vision_cfg"] = timm
    model = build_student(architecture, seed=0, tokenizer=build_words_tokenizer(["a"], 9))
    with pytest.raises(InputError, match="image tower of custom is no plain open_clip transformer"):
        gateable_copy(model, BOTH)
    assert is_sized(gateable_copy(model, ("text",)).module)
    with pytest.raises(InputError, match="no plain open_clip transformer"):
        reference_counts(model.module, model.architecture, BOTH)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 0},
        {"sparsity": 1.0},
        {"prune_step": 0},
        {"towers": ()},
        {"towers": ("image", "sound")},
        {"parts": ("layers",)},
        {"parts": ("mlp", "mlp")},
        {"text_sparsity": 0.3},
        {"learning_rate": -0.02},
    ],
)
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        settings(**wrong)
