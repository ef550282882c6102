"""Number formats: what rounding costs, and that nothing else is lost."""

import pytest
import torch

from clipdistill.cache.rows import COSINE_FLOOR, pack, row_bytes, unpack


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


def test_int8_is_off_by_at_most_half_a_scale_and_uses_the_whole_range():
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(1))
    back, values, scale = _stored(rows, "int8")
    assert ((rows - back).abs() <= scale[:, None] * 0.5001).all()
    assert (values.abs().amax(-1) == 127).all()


def test_int8_of_a_row_of_zeros_is_zeros():
    back, _, scale = _stored(torch.zeros(2, 8), "int8")
    assert (back == 0).all()
    assert (scale == 0).all()


def test_fp16_and_bf16_are_the_nearest_values():
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(_stored(rows, "fp16")[0], rows.half().float())
    assert torch.equal(_stored(rows, "bf16")[0], rows.bfloat16().float())
