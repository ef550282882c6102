"""Geometry and alignment against loops, closed forms and known limits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError
from clipdistill.evaluate import geometry as geometry_module
from clipdistill.evaluate.alignment import DISCREPANCY_SCALE, alignment, discrepancy, linear_cka, neighbour_overlap
from clipdistill.evaluate.geometry import geometry


def encoded(images: int = 40, captions: int = 3, width: int = 8, noise: float = 0.5, seed: int = 0) -> EncodedPairs:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, width, generator=generator)
    owner = torch.arange(images).repeat_interleave(captions)
    text = image[owner] + noise * torch.randn(len(owner), width, generator=generator) + 0.3
    return EncodedPairs(
        image=torch.nn.functional.normalize(image, dim=1),
        text=torch.nn.functional.normalize(text, dim=1),
        text_to_image=owner,
        keys=[f"k{i}" for i in range(images)],
        captions=[str(i) for i in range(len(owner))],
        caption_indices=torch.arange(captions).repeat(images),
    )


def turned(source: EncodedPairs, width: int | None = None, seed: int = 1) -> EncodedPairs:
    """The same geometry in other coordinates: a rotation, padded with zeros to `width`."""
    d = source.image.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]
    pad = (0, (width or d) - d)
    image, text = (torch.nn.functional.pad(x @ rotation, pad) for x in (source.image, source.text))
    return EncodedPairs(image, text, source.text_to_image, source.keys, source.captions, source.caption_indices)


def test_pair_statistics_equal_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_module, "_STRIPE", 7)
    data = encoded()
    found = geometry(data)["student"]
    image, text, owner = data.image.double().numpy(), data.text.double().numpy(), data.text_to_image.numpy()
    scores = image @ text.T
    matched = owner[None] == np.arange(40)[:, None]
    assert found["positive"]["count"] == 120
    assert found["negative"]["count"] == 40 * 120 - 120
    assert found["positive"]["mean"] == pytest.approx(scores[matched].mean(), abs=1e-6)
    assert found["negative"]["std"] == pytest.approx(scores[~matched].std(), abs=1e-6)
    assert found["gap"] == pytest.approx(scores[matched].mean() - scores[~matched].mean(), abs=1e-6)
    hidden = np.where(matched, -2, scores)
    assert found["hard_negative"]["image"] == pytest.approx(hidden.max(axis=1).mean(), abs=1e-6)
    assert found["hard_negative"]["text"] == pytest.approx(hidden.max(axis=0).mean(), abs=1e-6)
    for quantile, value in found["negative"]["quantiles"].items():
        assert value == pytest.approx(np.quantile(scores[~matched], float(quantile)), abs=0.02)
    histogram = found["negative"]["histogram"]
    assert sum(histogram["counts"]) == found["negative"]["count"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    np.testing.assert_array_equal(np.histogram(scores[~matched], np.array(histogram["edges"]))[0], histogram["counts"])
    images = image @ image.T
    np.fill_diagonal(images, -2)
    assert found["image_image"]["nearest"] == pytest.approx(images.max(axis=1).mean(), abs=1e-6)
    texts = text @ text.T
    same = owner[None] == owner[:, None]
    assert found["text_text"]["mean"] == pytest.approx(texts[~same].mean(), abs=1e-6)
    assert found["text_text"]["nearest"] == pytest.approx(np.where(same, -2, texts).max(axis=1).mean(), abs=1e-6)
    assert found["same_image_texts"] == pytest.approx(texts[same & ~np.eye(120, dtype=bool)].mean(), abs=1e-6)
    difference = image.mean(axis=0) - text.mean(axis=0)
    assert found["modality_gap"]["distance"] == pytest.approx(np.linalg.norm(difference), abs=1e-6)
    json.dumps(found)


def test_texts_are_thinned_and_one_caption_has_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_module, "MOST_TEXTS", 50)
    assert geometry(encoded())["student"]["texts_compared"] == 50
    assert geometry(encoded(captions=1))["student"]["same_image_texts"] is None
    with pytest.raises(InputError, match="needs two images, got 1"):
        geometry(encoded(images=1))


def test_the_same_geometry_in_other_coordinates_is_fully_aligned() -> None:
    data = encoded()
    found = geometry(data, turned(data, width=12), k=(1, 5))
    assert found["student"]["gap"] == pytest.approx(found["teacher"]["gap"], abs=1e-6)
    aligned = found["alignment"]
    for name in ("cka", "cka_unbiased"):
        assert aligned[name]["image"] == pytest.approx(1, abs=1e-6)
        assert aligned[name]["text"] == pytest.approx(1, abs=1e-6)
    assert aligned["rank_correlation"]["image_to_text"]["mean"] == pytest.approx(1, abs=1e-3)
    for shares in aligned["neighbour_overlap"].values():
        assert shares == {"1": pytest.approx(1), "5": pytest.approx(1)}
    assert aligned["discrepancy"]["unavailable"] == "student and teacher embeddings have 8 and 12 dimensions"
    json.dumps(found)


def test_unrelated_models_are_not_aligned() -> None:
    found = alignment(encoded(images=300, seed=0, captions=1), encoded(images=300, seed=5, captions=1), k=(10,))
    assert abs(found["cka_unbiased"]["image"]) < 0.05
    assert found["cka"]["image"] > found["cka_unbiased"]["image"]
    assert abs(found["rank_correlation"]["text_to_image"]["mean"]) < 0.05
    assert found["neighbour_overlap"]["image_image"]["10"] == pytest.approx(10 / 299, abs=0.02)


def test_cka_and_rank_correlation_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 5, generator=generator), torch.randn(30, 7, generator=generator)
    centre = np.eye(30) - 1 / 30
    gram_a, gram_b = (centre @ (x.double() @ x.double().T).numpy() @ centre for x in (a, b))
    expected = (gram_a * gram_b).sum() / math.sqrt((gram_a**2).sum() * (gram_b**2).sum())
    assert linear_cka(a, b) == pytest.approx(expected)
    one, other = encoded(seed=1, captions=1), encoded(seed=1, captions=1, noise=1.5)
    rho = alignment(one, other, k=(1,))["rank_correlation"]["image_to_text"]
    rows = zip(one.image @ one.text.T, other.image @ other.text.T, strict=True)
    assert rho["mean"] == pytest.approx(np.mean([stats.spearmanr(x, y).statistic for x, y in rows]), abs=1e-6)


def test_neighbour_overlap_by_hand() -> None:
    a = torch.tensor([[9.0, 3, 2, 1], [1, 9, 3, 2]])
    b = torch.tensor([[9.0, 1, 2, 3], [3, 9, 2, 1]])
    assert neighbour_overlap(a, b, 1, exclude_self=False) == 1.0
    assert neighbour_overlap(a, b, 1, exclude_self=True) == 0.0
    assert neighbour_overlap(a, b, 2, exclude_self=True) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_discrepancy_is_the_divergence_of_the_definition() -> None:
    one, other = encoded(captions=1, seed=1), encoded(captions=1, seed=2)
    found = discrepancy((one.image, one.text), (other.image, other.text), None)
    a, b, u, v = (x.double() for x in (one.image, one.text, other.image, other.text))

    def divergence(target: torch.Tensor, logits: torch.Tensor) -> float:
        p, q = (x.log_softmax(dim=1) for x in (target, logits))
        return float((p.exp() * (p - q)).sum(dim=1).mean())

    def both_axes(target: torch.Tensor, logits: torch.Tensor) -> float:
        return (divergence(target, logits) + divergence(target.T, logits.T)) / 2

    s = DISCREPANCY_SCALE
    assert found["vrd"] == pytest.approx(both_axes(s * v @ b.T, s * u @ a.T), rel=1e-4)
    p, q = s * u @ b.T, s * v @ a.T
    assert found["xrd"] == pytest.approx((both_axes(p, q) + both_axes(q, p)) / 2, rel=1e-4)
    identical = discrepancy((one.image, one.text), (one.image, one.text), None)
    assert identical["xrd"] < found["xrd"]


def test_discrepancy_uses_trained_projections() -> None:
    one = encoded(captions=1)
    wide = turned(one, width=12)
    rotation = torch.linalg.lstsq(one.image.double(), wide.image.double()).solution.float()
    layer = torch.nn.Linear(8, 12, bias=False)
    with torch.no_grad():
        layer.weight.copy_(rotation.T)
    found = alignment(one, wide, projections=(layer, layer), k=(1,))["discrepancy"]
    same = alignment(one, one, k=(1,))["discrepancy"]
    assert found["vrd"] == pytest.approx(same["vrd"], rel=1e-3)


def test_what_cannot_be_aligned_is_named() -> None:
    with pytest.raises(InputError, match="their keys differ"):
        alignment(encoded(), encoded(images=41))
    with pytest.raises(InputError, match="alignment over 6 images cannot look at 10 neighbours"):
        alignment(encoded(images=6), encoded(images=6))
