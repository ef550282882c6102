"""Fingerprints, parameter counts and the checks of architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import open_clip
import pytest
import torch

from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.models import clip_model as clip_model_module
from clipdistill.models.architecture import build_module, check_architecture, shapes
from tests.models.conftest import tiny_architecture

Make = Callable[..., ClipModel]


def test_fingerprint_changes_with_each_part_and_with_nothing_else(make_tiny: Make) -> None:
    model = make_tiny()
    original = model.fingerprint()
    assert make_tiny().fingerprint() == original
    assert dataclasses.replace(model, name="another name").fingerprint() == original
    assert len(original) == 64

    image = ImageSpec(**{**model.image.model_dump(), "interpolation": "bilinear"})
    assert dataclasses.replace(model, image=image).fingerprint() != original
    assert dataclasses.replace(model, tokenizer=model.tokenizer.with_context_length(20)).fingerprint() != original
    assert make_tiny(quick_gelu=True).fingerprint() != original
    assert make_tiny(seed=1).fingerprint() != original

    with torch.no_grad():
        model.module.visual.proj[0, 0] += 1e-6
    changed = model.fingerprint()
    assert changed != original
    model.module.half()
    assert model.fingerprint() not in (changed, original)


def test_fingerprint_does_not_depend_on_chunks_mode_or_gradients(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny()
    original = model.fingerprint()
    model.module.eval().requires_grad_(False)
    monkeypatch.setattr(clip_model_module, "_CHUNK", 7)
    assert model.fingerprint() == original
    model.module.to(memory_format=torch.channels_last)
    assert model.fingerprint() == original


def test_parameter_counts_by_hand(make_tiny: Make) -> None:
    model = make_tiny()
    words = model.tokenizer.vocab_size
    width, context, embedding = 32, 12, 24
    block = 12 * width**2 + 13 * width
    image = 3 * 8 * 8 * width + width + 17 * width + 4 * width + 2 * block + width * embedding
    text = words * width + context * width + 2 * block + 2 * width + width * embedding
    assert model.parameter_counts() == {
        "image": image,
        "text_transformer": 2 * block,
        "text_total": text,
        "total": image + text + 1,
    }


def test_embeddings_are_raw(make_tiny: Make) -> None:
    module = make_tiny().module
    norms = module.encode_image(torch.rand(3, 3, 32, 32)).norm(dim=1)
    assert not torch.allclose(norms, torch.ones(3), atol=1e-3)


def test_coca_gives_raw_embeddings_like_the_others() -> None:
    values = open_clip.get_model_config("coca_ViT-B-32")
    values["vision_cfg"] |= {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "attn_pooler_heads": 2}
    values["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 50}
    values["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    values["embed_dim"] = 64
    module = build_module(check_architecture(values), seed=0).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        raw, normalised = module.encode_image(images), module.encode_image(images, normalize=True)
    assert not torch.allclose(raw, normalised)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), normalised)


def test_shapes_need_no_memory() -> None:
    sizes = shapes(check_architecture(open_clip.get_model_config("ViT-bigG-14")))
    assert sizes["visual.proj"] == (1664, 1280)


def test_every_native_architecture_of_open_clip_passes_the_checks() -> None:
    for name in open_clip.list_models():
        checked = check_architecture(open_clip.get_model_config(name), name)
        assert isinstance(checked["quick_gelu"], bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dims": 3}, "unknown key 'embed_dims' .did you mean 'embed_dim'"),
        ({"embed_dim": 0}, "'embed_dim' must be a number from 1"),
        ({"embed_dim": True}, "'embed_dim' must be a number from 1"),
        ({"vision_cfg": {"widht": 3}}, "vision_cfg: unknown key 'widht' .did you mean 'width'"),
        ({"vision_cfg": {"layers": [1, 2, 3, 1000]}}, "'layers' must be"),
        ({"text_cfg": {"width": 30, "heads": 7}}, "cannot be built"),
        ({"text_cfg": "x"}, "must be a mapping"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_module(check_architecture(tiny_architecture(**changes)), device="meta")
