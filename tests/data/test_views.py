"""Views: open_clip's evaluation transform to the bit, the same region for every model, stored and rendered again."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipdistill.config import build
from clipdistill.data.images import decode
from clipdistill.data.sampler import sample_generator
from clipdistill.data.views import (
    _OPERATIONS,
    EVALUATION_VIEW,
    OPENAI_MEAN,
    OPENAI_STD,
    ImageSpec,
    View,
    ViewPolicy,
    apply_operations,
    normalise,
    render,
    render_pixels,
    sample_view,
)
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import encoded, picture

RICH = ViewPolicy(kind="crop", scale=(0.2, 1.0), flip=0.5, color_jitter=0.4, randaugment_ops=2)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 100])
def test_evaluation_view_equals_open_clip_to_the_bit(mode: str, interpolation: str, size: int) -> None:
    spec = ImageSpec(size=size, interpolation=interpolation, resize_mode=mode)
    theirs = open_clip.image_transform(
        size, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode=mode, interpolation=interpolation
    )
    for width, height in [(40, 30), (30, 41), (100, 100), (333, 250), (251, 500), (7, 90), (32, 32), (2, 64)]:
        image = picture(width, width, height)
        assert torch.equal(render(image, EVALUATION_VIEW, spec), theirs(image)), (width, height)


def test_evaluation_view_on_photographs() -> None:
    theirs = open_clip.image_transform(224, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    for path in sorted((shared_folder("data/coco_mini") / "val_a").glob("*.jpg"))[:5]:
        image = decode(path.read_bytes())
        assert torch.equal(render(image, EVALUATION_VIEW, ImageSpec()), theirs(image))


def test_fast_pixels_differ_by_rounding_only() -> None:
    for mode in ("shortest", "squash", "longest"):
        spec = ImageSpec(size=64, resize_mode=mode)
        image = picture(1, 301, 200)
        exact = render_pixels(image, EVALUATION_VIEW, spec).astype(int)
        fast = render_pixels(image, EVALUATION_VIEW, spec, exact=False).astype(int)
        assert np.abs(exact - fast).max() <= 2
        view = View(box=(10, 21, 150, 200))
        exact, fast = (render_pixels(image, view, spec, exact=e).astype(int) for e in (True, False))
        assert np.abs(exact - fast).max() <= 2


def test_row_10_a_strip_is_rendered_without_gigabytes() -> None:
    strip = picture(0, 1, 4000).resize((1, 400_000))
    assert render(strip, EVALUATION_VIEW, ImageSpec(size=224)).shape == (3, 224, 224)
    assert render(strip, EVALUATION_VIEW, ImageSpec(size=224, resize_mode="longest")).shape == (3, 224, 224)


def test_normalise_equals_torchvision_for_every_value() -> None:
    from torchvision.transforms import Normalize, ToTensor

    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    spec = ImageSpec(size=16)
    assert torch.equal(normalise(torch.from_numpy(values), spec), Normalize(spec.mean, spec.std)(ToTensor()(values)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32))
def test_drawn_boxes_lie_inside_the_image(width: int, height: int, seed: int) -> None:
    view = sample_view(RICH, width, height, np.random.default_rng(seed))
    assert view.box is not None
    top, left, h, w = view.box
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1


def test_drawn_boxes_follow_the_policy() -> None:
    policy = ViewPolicy(kind="crop", scale=(0.3, 0.6), flip=0.25)
    views = [sample_view(policy, 400, 400, sample_generator(0, 0, i)) for i in range(2000)]
    areas = np.array([v.box[2] * v.box[3] / 160_000 for v in views])
    assert 0.29 < areas.min() < 0.31
    assert 0.59 < areas.max() < 0.61
    assert abs(areas.mean() - 0.45) < 0.01
    ratios = np.array([v.box[3] / v.box[2] for v in views])
    assert 0.74 < ratios.min() < 0.78
    assert 1.28 < ratios.max() < 1.35
    assert abs(np.mean([v.flip for v in views]) - 0.25) < 0.03


def test_views_survive_json() -> None:
    for i in range(50):
        view = sample_view(RICH, 320, 240, sample_generator(1, 2, i))
        assert View.from_json(json.loads(json.dumps(view.to_json()))) == view
    assert View.from_json(EVALUATION_VIEW.to_json()) == EVALUATION_VIEW


@pytest.mark.parametrize(
    "damaged", [None, [], [[1, 2], False, []], [[0, 0, 0, 5], False, []], [None, 0, [["x"]]], "abc"]
)
def test_damaged_views_are_refused(damaged: object) -> None:
    with pytest.raises(InputError, match="is not a stored view"):
        View.from_json(damaged)


def test_a_view_of_another_image_is_refused() -> None:
    with pytest.raises(InputError, match="lies outside the image of 30 x 40"):
        render(picture(0, 40, 30), View(box=(0, 0, 31, 40)), ImageSpec(size=16))


def test_row_26_teacher_and_student_see_the_same_region() -> None:
    image = Image.new("RGB", (400, 300), "black")
    image.paste("white", (0, 0, 200, 300))
    view = View(box=(50, 100, 200, 240), flip=True)
    for size in (32, 96):
        spec = ImageSpec(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        columns = render(image, view, spec)[0, size // 2]
        # 100 of the box's 240 columns are white; mirrored, they end up on the right
        edge = size - size * 100 / 240
        assert columns[: int(edge) - 2].max() < -0.9
        assert columns[int(edge) + 2 :].min() > 0.9


def test_crop_is_cut_before_it_is_resized() -> None:
    image = picture(3, 90, 60)
    spec = ImageSpec(size=33)
    expected = np.asarray(image.crop((20, 10, 60, 50)).resize((33, 33), Image.Resampling.BICUBIC))
    assert np.array_equal(render_pixels(image, View(box=(10, 20, 40, 40)), spec), expected)


def test_reduced_decoding_shows_the_same_region() -> None:
    data = encoded(picture(6, 640, 480), quality=95)
    spec = ImageSpec(size=64)
    full, reduced = decode(data), decode(data, at_least=100)
    assert reduced.size == (160, 120)
    for view in (EVALUATION_VIEW, View(box=(101, 202, 300, 333), flip=True)):
        for exact in (True, False):
            difference = render_pixels(full, view, spec).astype(int) - render_pixels(reduced, view, spec, exact=exact)
            assert np.abs(difference).mean() < 3


def test_every_operation_keeps_size_and_mode_and_acts() -> None:
    image = picture(8, 64, 48)
    strong = {"posterize": 2, "solarize": 100.0, "hue": 0.2, "translate_x": 0.2, "translate_y": 0.2, "shear_x": 0.2}
    for name in _OPERATIONS:
        result = apply_operations(image, [(name, strong.get(name, 0.3 if name.startswith("shear") else 15.0))])
        assert result.size == image.size
        assert result.mode == "RGB"
        assert not np.array_equal(np.asarray(result), np.asarray(image)), name
    with pytest.raises(InputError, match="unknown image operation 'brightnes' \\(did you mean 'brightness'"):
        apply_operations(image, [("brightnes", 1.0)])


def test_geometric_operations_scale_with_the_picture() -> None:
    base = picture(9, 100, 100)
    large = base.resize((200, 200), Image.Resampling.BICUBIC)
    for operation in [("translate_x", 0.2), ("translate_y", -0.2), ("shear_x", 0.2), ("rotate", 20.0)]:
        small_result = apply_operations(base, [operation])
        large_result = apply_operations(large, [operation]).resize((100, 100), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(small_result).astype(int) - np.asarray(large_result))
        assert np.median(difference) <= 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": [0.9, 0.1]}, "scale must be two fractions"),
        ({"ratio": [0, 1]}, "ratio must be two numbers"),
        ({"flips": 0.5}, "unknown key 'flips' \\(did you mean 'flip'"),
        ({"flip": 2}, "flip"),
    ],
)
def test_wrong_policies_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(ViewPolicy, values)


def test_wrong_image_specification_is_refused() -> None:
    with pytest.raises(InputError, match="std must be above 0"):
        build(ImageSpec, {"std": [0.1, 0.0, 0.1]})
