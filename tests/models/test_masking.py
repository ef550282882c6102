"""Masked image input: which tokens stay, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.models.masking import KeepRandomTokens, masked_image_tokens

Make = Callable[..., ClipModel]
TIMM_VIT = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
TIMM_RESNET = {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}


def test_class_token_and_the_stated_number_of_patches_stay_in_order() -> None:
    tokens = torch.arange(1 + 196).float().reshape(1, -1, 1).expand(3, -1, 2)
    kept = KeepRandomTokens(0.75)(tokens)
    assert kept.shape == (3, 1 + 49, 2)
    assert torch.equal(kept[:, 0], tokens[:, 0])
    assert bool((kept[:, 1:, 0].diff(dim=1) > 0).all())
    assert not torch.equal(kept[0], kept[1])  # each image has its own patches
    assert KeepRandomTokens(0.9)(torch.zeros(1, 1 + 100, 1)).shape[1] == 1 + 10
    assert KeepRandomTokens(0.999)(torch.zeros(1, 1 + 10, 1)).shape[1] == 1 + 1


def test_every_patch_is_equally_likely() -> None:
    tokens = torch.arange(1 + 16).float().reshape(1, -1, 1).expand(4000, -1, 1)
    generator = torch.Generator().manual_seed(0)
    counts = KeepRandomTokens(0.75, 1, generator)(tokens)[:, 1:].flatten().long().bincount(minlength=17)[1:]
    assert int(counts.sum()) == 4000 * 4
    assert float((counts / 1000 - 1).abs().max()) < 0.15  # standard deviation 0.03


@pytest.mark.parametrize("vision", [None, TIMM_VIT], ids=["open_clip", "timm"])
@pytest.mark.parametrize("training", [True, False])
def test_context_masks_and_restores(make_tiny: Make, vision: dict[str, object] | None, training: bool) -> None:
    model = make_tiny(**({} if vision is None else {"vision_cfg": vision}))
    module = model.module.train(training)
    images = torch.rand(2, 3, model.image.size, model.image.size)
    whole, names = module.encode_image(images), list(module.state_dict())
    with masked_image_tokens(module, 0.5, generator=torch.Generator().manual_seed(1)):
        first = module.encode_image(images)
        assert list(module.state_dict()) == names
    with masked_image_tokens(module, 0.5, generator=torch.Generator().manual_seed(1)):
        again = module.encode_image(images)
    with masked_image_tokens(module, 0.5, generator=torch.Generator().manual_seed(2)):
        other = module.encode_image(images)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, whole)
    assert torch.equal(module.encode_image(images), whole)
    with masked_image_tokens(module, 0.0):
        assert torch.equal(module.encode_image(images), whole)


def test_positions_are_added_before_the_drop(make_tiny: Make) -> None:
    # with one patch kept, the embedding must be that of the class token and one patch at its own position
    module = make_tiny().module.eval()
    images = torch.rand(1, 3, 32, 32)
    visual = module.visual
    with torch.no_grad(), masked_image_tokens(module, 0.99, generator=torch.Generator().manual_seed(3)):
        masked = module.encode_image(images)
    with torch.no_grad():
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], dim=1) + visual.positional_embedding
        candidates = []
        for patch in range(1, 17):
            x = visual.transformer(visual.ln_pre(tokens[:, [0, patch]]))
            candidates.append(visual.ln_post(x)[:, 0] @ visual.proj)
    assert sum(torch.allclose(masked, candidate, atol=1e-6) for candidate in candidates) == 1


def test_restored_after_an_error(make_tiny: Make) -> None:
    module = make_tiny().module
    usual = module.visual.patch_dropout
    with pytest.raises(RuntimeError, match="inside"), masked_image_tokens(module):
        raise RuntimeError("inside")
    assert module.visual.patch_dropout is usual


def test_gradients_flow_through_kept_patches(make_tiny: Make) -> None:
    module = make_tiny().module
    with masked_image_tokens(module):
        module.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert module.visual.conv1.weight.grad is not None
    assert float(module.visual.positional_embedding.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "vision",
    [TIMM_RESNET, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}],
    ids=["timm", "open_clip"],
)
def test_convolutional_towers_are_refused(make_tiny: Make, vision: dict[str, object]) -> None:
    module = make_tiny(vision_cfg=vision).module
    with (
        pytest.raises(InputError, match=r"need a vision transformer, and this image tower is a (Modified)?ResNet"),
        masked_image_tokens(module),
    ):
        pass


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0])
def test_impossible_ratios_are_refused(make_tiny: Make, ratio: float) -> None:
    module = make_tiny().module
    with pytest.raises(InputError, match="mask_ratio must be"), masked_image_tokens(module, ratio):
        pass
