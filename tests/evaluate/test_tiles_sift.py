"""The bfloat16 sieve and counts that stop early: nothing that they leave out may change a result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.evaluate import ranking, tiles_cpu, tiles_sift
from clipdistill.evaluate.ranking import PositiveCounts, count_positives
from clipdistill.evaluate.retrieval import retrieval, retrieval_ranks

from .test_retrieval import matched, small


def sift_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sifts whatever the size, the processor and the number of scores that reach a limit."""
    monkeypatch.setattr(ranking, "cpu_counter", lambda *shape: tiles_sift.SiftCounter)
    monkeypatch.setattr(tiles_cpu, "FEW_SHARE", 1.0)


@pytest.fixture
def sift(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`sift_always`; lists for each tile whether it was sifted."""
    sift_always(monkeypatch)
    sifted, one = [], tiles_sift.SiftCounter._sift

    def watched(self: tiles_sift.SiftCounter, *tile: object) -> bool:
        sifted.append(one(self, *tile))
        return sifted[-1]

    monkeypatch.setattr(tiles_sift.SiftCounter, "_sift", watched)
    return sifted


def exact(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, ...]:
    """(image_greater, image_equal, text_greater, text_equal) from the whole matrix in float64."""
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image.astype(float), text.astype(float)))
    scores = image @ text.T
    own = scores[owner, np.arange(len(text))]
    by_image, by_text = scores - own, scores[owner] - own[:, None]
    return tuple(
        count
        for d, axis in ((by_image, 0), (by_text, 1))
        for count in ((d > 1e-12).sum(axis), (abs(d) <= 1e-12).sum(axis))
    )


def uneven(owner: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of one text of each image and of `number` texts drawn at random (together once each)."""
    first = np.unique(owner, return_index=True)[1]
    return np.unique(np.concatenate([first, rng.permutation(len(owner))[:number]]))


def equal_exact(found: PositiveCounts, image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> None:
    counts = found.image_greater, found.image_equal, found.text_greater, found.text_equal
    for count, expected in zip(counts, exact(image, text, owner), strict=True):
        np.testing.assert_array_equal(count, expected)


@pytest.mark.parametrize("noise", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("shape", [(200, 600), (16, 24), (7, 600), (200, 1)])
def test_sifted_counts_are_those_of_the_whole_matrix(
    sift: list[bool], monkeypatch: pytest.MonkeyPatch, noise: float, shape: tuple[int, int]
) -> None:
    # with much noise many positives have negative scores, whose bits are ordered the other way round
    image, text, owner = matched(60, 3, noise=noise)
    text[5:9] = text[4]
    monkeypatch.setattr(tiles_sift.SiftCounter, "tile_shape", shape)
    found = count_positives(image, text, owner)
    assert sift
    assert all(sift)
    equal_exact(found, image, text, owner)


@pytest.mark.parametrize("length", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("even", [True, False])
def test_rows_of_any_length_and_type_are_sifted(sift: list[bool], dtype: type, length: float, even: bool) -> None:
    rng = np.random.default_rng(3)
    image, text, owner = matched(40, 3, noise=4.0)
    if not even:  # images in another order than given: those with most texts come first
        keep = uneven(owner, 50, rng)
        text, owner = text[keep], owner[keep]
    # what float16 cannot hold stays at a length near 1; float32 products of the others would overflow or vanish
    length = 1.0 if dtype == np.float16 else length
    image = (image * rng.uniform(0.5, 2, (len(image), 1)) * length).astype(dtype)
    text = (text * rng.uniform(0.5, 2, (len(text), 1)) * length).astype(dtype)
    found = count_positives(image, text, owner)
    assert all(sift)
    equal_exact(found, image, text, owner)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_own_texts_are_counted_once_whatever_the_sign(data: st.DataObject) -> None:
    image, text, owner = small(data)
    image, text = image.astype(np.float32), text.astype(np.float32)
    expected = count_positives(image, text, owner)
    with pytest.MonkeyPatch.context() as patch:
        sift_always(patch)
        found = count_positives(image, text, owner)
    for name in ("image_greater", "image_equal", "text_greater", "text_equal"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_scores_closer_than_bfloat16_can_tell_are_ordered(sift: list[bool]) -> None:
    # all scores within 0.001 of each other, where neighbouring bfloat16 numbers are 0.004 apart
    rng = np.random.default_rng(0)
    image, text = (1 + 0.02 * rng.standard_normal((n, 64)) for n in (40, 80))
    owner = np.arange(80) % 40
    found = count_positives(image, text, owner)
    assert all(sift)
    np.testing.assert_array_equal(found.image_greater, exact(image, text, owner)[0])
    np.testing.assert_array_equal(found.text_greater, exact(image, text, owner)[2])


def test_a_dead_encoder_scores_chance(sift: list[bool]) -> None:
    image, text, owner = matched(12, 5)
    found = retrieval(np.zeros_like(image), text, owner)
    assert all(sift)
    assert found["t2i_R@1"] == pytest.approx(1 / 12)


def test_sifting_gives_way_where_it_finds_too_much(sift: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_cpu, "FEW_SHARE", 1 / 16)
    monkeypatch.setattr(tiles_sift.SiftCounter, "tile_shape", (20, 50))
    image, text, owner = matched(60, 3, noise=50.0)
    found = count_positives(image, text, owner)
    assert sift == [False]  # tried once, not for every tile
    np.testing.assert_array_equal(found.image_greater, exact(image, text, owner)[0])


@settings(max_examples=300, deadline=None)
@given(st.floats(-1.0, 1.0), st.floats(-3e4, 3e4))
def test_bfloat16_digits_enclose_the_limit(near: float, limit: float) -> None:
    limits = torch.tensor([limit], dtype=torch.float64)
    lower, upper = (int(tiles_sift.bfloat16_digits(limits, sign)[0]) for sign in (-1, 1))
    scores = torch.tensor([limit + near * abs(limit) / 64, limit, near, 0.0, -0.0], dtype=torch.float64)
    bits = scores.bfloat16().view(torch.int16)
    for score, digits in zip(scores.tolist(), bits.tolist(), strict=True):
        assert score < limit or digits >= lower
        assert score > limit or digits <= upper


def test_sampled_product_is_the_product_at_these_places() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, 48, generator=generator) for n in (9, 14))
    i, j = torch.nonzero(torch.rand(9, 14, generator=generator) < 0.3, as_tuple=True)
    found = tiles_sift.sampled_product(rows, columns, i, j)
    torch.testing.assert_close(found, (rows @ columns.T)[i, j])
    assert tiles_sift.sampled_product(rows, columns, i[:0], j[:0]).shape == (0,)


def test_sifting_needs_size_speed_and_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_sift, "_gain", lambda *arguments: 2.0)
    assert ranking.cpu_counter(5000, 25000, 512) is tiles_sift.SiftCounter
    assert ranking.cpu_counter(1000, 5000, 512) is tiles_cpu.CpuCounter
    monkeypatch.undo()
    times = iter([2.0, 1.0])
    monkeypatch.setattr(tiles_sift, "_best", lambda function: next(times))
    assert tiles_sift._gain.__wrapped__(64, 1) == 2.0

    def missing(*arguments: object) -> None:
        raise RuntimeError("not implemented in this build")

    monkeypatch.setattr(tiles_sift, "sampled_product", missing)
    assert tiles_sift._gain.__wrapped__(64, 1) == 0.0


@pytest.mark.parametrize("sifts", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_counts_that_stop_early(monkeypatch: pytest.MonkeyPatch, sifts: bool, share: float, noise: float) -> None:
    counter = tiles_sift.SiftCounter if sifts else tiles_cpu.CpuCounter
    monkeypatch.setattr(ranking, "cpu_counter", lambda *shape: counter)
    monkeypatch.setattr(tiles_cpu, "FEW_SHARE", share)
    for kind in (tiles_cpu.CpuCounter, tiles_sift.SiftCounter):
        monkeypatch.setattr(kind, "tile_shape", (16, 24))
    rng = np.random.default_rng(1)
    image, text, owner = matched(60, 4, noise=noise)
    keep = uneven(owner, 150, rng)
    text, owner = text[keep], owner[keep]  # uneven numbers of texts
    text[7] = text[np.flatnonzero(owner == owner[7])[-1]]  # two of one image's texts alike
    whole = count_positives(image, text, owner)
    for depth in (1, 3, 10, 500):
        found = count_positives(image, text, owner, depth=depth)
        best = np.array([whole.text_greater[owner == i].min() for i in range(60)])[owner]
        late = (whole.positive_greater > 0) & (whole.text_greater >= depth)
        assert late.any() == (depth < 500) or noise < 1
        np.testing.assert_array_equal(
            found.text_greater, np.where(late, np.maximum(depth, best + 1), whole.text_greater)
        )
        np.testing.assert_array_equal(found.text_equal, np.where(late, whole.positive_equal, whole.text_equal))
        np.testing.assert_array_equal(found.image_greater, whole.image_greater)
        np.testing.assert_array_equal(found.image_equal, whole.image_equal)


def test_early_stops_leave_every_metric_as_it_is() -> None:
    image, text, owner = matched(80, 5, noise=5.0)
    found = retrieval(image, text, owner, ks=(1, 5, 50), map_ks=(3, 7), per_query=True)["per_query"]
    whole = retrieval_ranks(image, text, owner)
    for direction in ("i2t", "t2i"):
        for k in (1, 5, 50):
            np.testing.assert_array_equal(found[f"{direction}_R@{k}"], whole.recall(direction, k))
        for k in (3, 7, 10):
            np.testing.assert_array_equal(found[f"{direction}_mAP@{k}"], whole.average_precision(direction, k))
        np.testing.assert_array_equal(found[f"{direction}_MRR"], whole.reciprocal_rank(direction))
        np.testing.assert_array_equal(found[f"{direction}_median_rank"], whole.best_rank(direction))
