"""Number formats: what rounding costs, and that nothing else is lost."""

import pytest
import torch

from clipdistill.cache.rows import COSINE_FLOOR, pack, row_bytes, unpack
from clipdistill.evaluate.retrieval import retrieval


def _stored(rows, dtype):
    values, scale = pack(rows, dtype)
    raw = values.view(torch.int16).numpy().view("uint16") if dtype == "bf16" else values.numpy()
    return unpack(raw, None if scale is None else scale.numpy(), dtype), values, scale


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("dim", [64, 512, 768])
def test_rounding_stays_far_above_the_floor_of_the_check(dtype, dim):
    rows = torch.nn.functional.normalize(torch.randn(200, dim, generator=torch.Generator().manual_seed(dim)), dim=-1)
    back, values, scale = _stored(rows, dtype)
    cosine = torch.nn.functional.cosine_similarity(rows, back)
    assert 1 - cosine.min() < (1 - COSINE_FLOOR[dtype]) / 2
    assert back.dtype == torch.float32
    per_row = sum(t.element_size() * t[0].numel() for t in (values, scale) if t is not None)
    assert per_row == row_bytes(dtype, dim)


@pytest.mark.parametrize("dim", [64, 100, 33])
def test_int8_is_off_by_at_most_half_a_scale_and_uses_the_whole_range(dim):
    rows = torch.randn(50, dim, generator=torch.Generator().manual_seed(1))
    back, values, scale = _stored(rows, "int8")
    assert scale.shape == (50, -(-dim // 64))
    for group in range(scale.shape[1]):
        part = slice(64 * group, 64 * group + 64)
        # the largest element may be cut by the rounding of the scale to fp16
        assert ((rows - back)[:, part].abs() <= scale[:, group : group + 1].float() * 0.57).all()
        assert (values[:, part].abs().amax(-1) >= 126).all()


def test_an_element_far_larger_than_the_others_costs_only_its_own_group():
    rows = (
        torch.nn.functional.normalize(torch.randn(400, 512, generator=torch.Generator().manual_seed(3)), dim=-1) * 0.6
    )
    rows[:, 133] = -0.8
    back, _, _ = _stored(rows, "int8")
    others = [i for i in range(512) if not 128 <= i < 192]
    error = (rows - back)[:, others].norm(dim=-1) / rows[:, others].norm(dim=-1)
    assert error.max() < 0.008


def test_int8_of_zeros_and_of_the_smallest_numbers_is_zeros():
    back, _, scale = _stored(torch.zeros(2, 8), "int8")
    assert (back == 0).all()
    assert (scale == 0).all()
    tiny, _, _ = _stored(torch.full((1, 8), 1e-9), "int8")
    assert (tiny == 0).all()


@pytest.mark.parametrize("outlier", [0.0, 0.8])
def test_int8_changes_r_at_1_by_less_than_a_third_of_a_point(outlier):
    generator = torch.Generator().manual_seed(0)
    changes = []
    for _ in range(3):
        image = torch.nn.functional.normalize(torch.randn(1000, 512, generator=generator), dim=-1)
        owner = torch.arange(1000).repeat_interleave(5)
        noise = (4.5 if outlier else 6.0) / 512**0.5 * torch.randn(5000, 512, generator=generator)
        text = torch.nn.functional.normalize(image[owner] + noise, dim=-1)
        # what published CLIPs have: a few coordinates that are large for every image, or for every text
        image, text = image * (1 - outlier**2) ** 0.5, text * (1 - outlier**2) ** 0.5
        image[:, [92, 133]] += 0.7 * outlier
        text[:, 133] -= outlier
        before = retrieval(image, text, owner, ks=(1,))
        after = retrieval(_stored(image, "int8")[0], _stored(text, "int8")[0], owner, ks=(1,))
        assert 0.1 < before["t2i_R@1"] < 0.95
        changes.append([after[k] - before[k] for k in ("i2t_R@1", "t2i_R@1")])
    assert torch.tensor(changes).mean(0).abs().max() < 0.003


def test_fp16_and_bf16_are_the_nearest_values():
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(_stored(rows, "fp16")[0], rows.half().float())
    assert torch.equal(_stored(rows, "bf16")[0], rows.bfloat16().float())
