"""Retrieval metrics against cases worked by hand, brute force over all tie orders, and two other libraries."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.errors import InputError
from clipdistill.evaluate import tiles, tiles_cpu
from clipdistill.evaluate.retrieval import retrieval, retrieval_ranks

KS = (1, 2, 5, 10)


def matched(images: int, captions: int, dimensions: int = 32, noise: float = 2.0, seed: int = 0) -> tuple:
    """Images (N, D), noisy copies of them as texts (N * captions, D) in shuffled order, and text_to_image."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((images, dimensions)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    text = image[owner] + noise * rng.standard_normal((len(owner), dimensions)).astype(np.float32)
    return image, text, owner


def small(data: st.DataObject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to four images and six texts in the same form, with entries from a tiny set.

    So ties (also between a positive and others), zero rows and positives with negative scores are frequent.
    """
    images = data.draw(st.integers(1, 4))
    owner = np.array([*range(images), *data.draw(st.lists(st.integers(0, images - 1), max_size=6 - images))])
    values = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
    image = np.array([data.draw(values) for _ in range(images)], dtype=np.float64)
    text = np.array([data.draw(values) for _ in owner], dtype=np.float64)
    return image, text, owner


def one_order(relevant: list[bool], positives: int) -> dict[str, float]:
    """The metrics of one query from the relevance of its items in ranked order, by the definitions."""
    result = {f"R@{k}": float(any(relevant[:k])) for k in KS}
    first = relevant.index(True) + 1
    result |= {"MRR": 1 / first, "median_rank": float(first)}
    precision = [sum(relevant[: k + 1]) / (k + 1) for k in range(len(relevant))]
    for k in (2, 10):
        result[f"mAP@{k}"] = sum(precision[r] for r in range(min(k, len(relevant))) if relevant[r]) / min(k, positives)
    return result


def brute_force(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """All metrics by listing every order of tied items."""
    image, text = (x.astype(np.float64) for x in (image, text))
    image, text = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (image, text))
    scores = np.round(image @ text.T, 12)
    positive = owner[None, :] == np.arange(len(image))[:, None]
    result: dict[str, float] = {"ties": 0}
    for direction, s, p in (("i2t", scores, positive), ("t2i", scores.T, positive.T)):
        queries: list[dict[str, float]] = []
        for row, relevant in zip(s, p, strict=True):
            groups = [np.flatnonzero(row == value) for value in sorted(set(row), reverse=True)]
            result["ties"] += any(0 < relevant[g].sum() < len(g) for g in groups)
            orders = itertools.product(*(itertools.permutations(g) for g in groups))
            listed = [one_order([bool(relevant[i]) for i in sum(o, ())], int(relevant.sum())) for o in orders]
            queries.append({name: statistics.fmean(x[name] for x in listed) for name in listed[0]})
        for name in queries[0]:
            average = statistics.median if name == "median_rank" else statistics.fmean
            result[f"{direction}_{name}"] = average(q[name] for q in queries)
    return result


def check(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> None:
    found, expected = retrieval(image, text, owner, ks=KS, map_ks=(2, 10)), brute_force(image, text, owner)
    assert set(found) == set(expected)
    for name in found:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name


def test_by_hand_with_several_positives() -> None:
    # angles in degrees; image 0 at 0 owns texts at 10, 50; image 1 at 90 owns texts at 60, 95, 20
    def at(*degrees: float) -> np.ndarray:
        angle = np.deg2rad(degrees)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    found = retrieval(at(0, 90), at(10, 50, 60, 95, 20), [0, 0, 1, 1, 1], ks=(1, 2, 3))
    # image 0 ranks the texts 10+ 20 50+ 60 95; image 1 ranks 95+ 60+ 50 20+ 10
    assert found["i2t_R@1"] == 1.0
    assert found["i2t_mAP@10"] == pytest.approx(((1 + 2 / 3) / 2 + (1 + 1 + 3 / 4) / 3) / 2)
    assert found["i2t_MRR"] == 1.0
    # texts at 10, 60, 95 find their image first; 50 and 20 are nearer the other one
    assert found["t2i_R@1"] == pytest.approx(3 / 5)
    assert found["t2i_R@2"] == 1.0
    assert found["t2i_MRR"] == pytest.approx((3 + 2 / 2) / 5)
    assert found["t2i_mAP@10"] == found["t2i_MRR"]
    assert found["t2i_median_rank"] == 1.0
    assert found["ties"] == 0


def test_i2t_takes_the_best_of_the_captions_and_map_takes_all() -> None:
    image = np.eye(3, 4)
    text = np.array([[1, 0, 0, 0.1], [0.1, 1, 0, 0], [0, 0.1, 1, 0], [0.05, 1, 0.5, 0]])
    found = retrieval(image, text, [0, 1, 2, 2], ks=(1,))
    # image 2 ranks its text 2 (0.995), then text 3 (0.446), then others: both positives lead
    assert found["i2t_R@1"] == 1.0
    assert found["i2t_mAP@10"] == 1.0
    # text 3 is nearest image 1, its own image 2 comes second
    assert found["t2i_MRR"] == pytest.approx((3 + 1 / 2) / 4)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_constant_embeddings_score_chance(value: float) -> None:
    images, captions = 12, 5
    found = retrieval(np.full((images, 8), value), np.full((images * captions, 8), value), np.arange(60) // 5)
    for k in (1, 5, 10):
        assert found[f"t2i_R@{k}"] == pytest.approx(k / images)
        # hypergeometric: no positive among k draws out of 60 with 5 positives
        assert found[f"i2t_R@{k}"] == pytest.approx(1 - math.comb(55, k) / math.comb(60, k))
    assert found["t2i_median_rank"] == pytest.approx((images + 1) / 2)
    assert found["i2t_median_rank"] == pytest.approx(61 / 6)
    assert found["ties"] == images + images * captions


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_brute_force_over_all_orders_of_ties(data: st.DataObject) -> None:
    check(*small(data))


def test_duplicated_rows_tie_wherever_they_stand() -> None:
    # the same 30 rows four times over: copies fall into different tiles and different places of a tile
    image, text, _ = matched(30, 1, dimensions=64)
    copies = np.tile(np.arange(30), 4)
    once = retrieval(image, text, np.arange(30))
    found = retrieval(image[copies], text[copies], np.arange(120))
    assert found["ties"] == 240
    # a query whose positive led still has it among four equals: R@4 is R@1 of the set without copies
    again = retrieval(image[copies], text[copies], np.arange(120), ks=(4,))
    for direction in ("i2t", "t2i"):
        assert again[f"{direction}_R@4"] == pytest.approx(1.0 * once[f"{direction}_R@1"])
        assert found[f"{direction}_R@1"] == pytest.approx(once[f"{direction}_R@1"] / 4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dense", [False, True])
def test_tile_shape_never_changes_the_result(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    image, text, owner = matched(70, 3, noise=4.0)
    text[5:9] = text[4]  # some exact ties
    if dense:  # nearly collapsed: every score within the float32 error of every other
        image, text = 1 + 1e-9 * image.astype(np.float64), 1 + 1e-9 * text.astype(np.float64)
        image[:, 0] += 1e-5 * np.arange(70)
    whole = retrieval(image, text, owner)
    assert 0.0 < whole["i2t_R@10"] < 1.0
    for shape in ((16, 24), (7, 13), (1, 210), (70, 1)):
        monkeypatch.setattr(tiles_cpu.CpuCounter, "tile_shape", shape)
        monkeypatch.setattr(tiles_cpu, "BLOCK_ROWS", min(shape[0], 5))
        monkeypatch.setattr(tiles_cpu, "BLOCK_COLUMNS", 16)
        # looking at each score, counting blocks, and each where it seems best
        for share in (1.0, 0.0, 1 / 16):
            monkeypatch.setattr(tiles_cpu, "FEW_SHARE", share)
            assert retrieval(image, text, owner) == whole


def test_the_number_of_threads_never_changes_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, owner = matched(70, 3, noise=4.0)
    text[5:9] = text[4]
    monkeypatch.setattr(tiles_cpu.CpuCounter, "tile_shape", (16, 24))
    before = torch.get_num_threads()
    found, seen, add = {}, [], tiles_cpu.CpuCounter.add_tile

    def watched(self: tiles_cpu.CpuCounter, *tile: object) -> None:
        seen.append(tile[:4])
        add(self, *tile)

    monkeypatch.setattr(tiles_cpu.CpuCounter, "add_tile", watched)
    try:
        for threads in (1, 2, 3):
            seen.clear()
            torch.set_num_threads(threads)
            found[threads] = retrieval(image, text, owner)
            assert torch.get_num_threads() == threads
            assert len(seen) == len(set(seen)) == 5 * 9
    finally:
        torch.set_num_threads(before)
    assert found[1] == found[2] == found[3]


def test_the_score_matrix_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, owner = matched(1000, 5, dimensions=16)
    sizes: list[int] = []
    product = torch.mm

    def watched(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a) * b.shape[1])
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    retrieval(image, text, owner)
    assert sum(sizes) == 1000 * 5000  # each score is computed once, for both directions
    assert max(sizes) <= 2500 * 1000


def test_both_counters_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, owner = matched(90, 4, noise=4.0)
    text[17] = text[16]
    expected = retrieval(image, text, owner)
    monkeypatch.setattr("clipdistill.evaluate.ranking.CpuCounter", tiles.GpuCounter)
    assert retrieval(image, text, owner) == expected


def test_near_ties_are_ordered_in_double_precision() -> None:
    # the second image is closer to the text by 1e-10, which float32 cannot see
    image = np.array([[1.0, 1e-5], [1.0, 0.0]])
    text = np.array([[1.0, 0.0], [1.0, 1.5e-5]])
    found = retrieval(image, text, [1, 0])
    assert found["ties"] == 0
    assert found["t2i_R@1"] == 1.0


def test_rows_need_not_be_normalised_and_types_do_not_matter() -> None:
    image, text, owner = matched(40, 2)
    expected = retrieval(image, text, owner)
    stretched = 4.0 ** np.random.default_rng(1).integers(-3, 4, (len(text), 1))
    assert retrieval(image * 8, text * stretched, owner) == expected
    assert retrieval(torch.tensor(image), torch.tensor(text), torch.tensor(owner)) == expected
    assert retrieval(torch.tensor(image).double(), text, owner.tolist()) == expected
    half = retrieval(torch.tensor(image).bfloat16(), torch.tensor(text).bfloat16(), owner)
    assert half["i2t_R@10"] == pytest.approx(expected["i2t_R@10"], abs=0.1)


def test_the_callers_precision_settings_do_not_matter() -> None:
    image, text, owner = matched(200, 2, dimensions=256, noise=6.0)
    expected = retrieval(image, text, owner)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval(image, text, owner) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_per_query_results_average_to_the_scores() -> None:
    image, text, owner = matched(50, 3, noise=3.0)
    found = retrieval(image, text, owner, per_query=True)
    queries = found.pop("per_query")
    assert set(queries) == set(found) - {"ties"}
    for name, values in queries.items():
        assert len(values) == (50 if name.startswith("i2t") else 150)
        average = np.median if "median" in name else np.mean
        assert average(values) == pytest.approx(found[name], abs=1e-15)
    ranks = retrieval_ranks(image, text, owner)
    np.testing.assert_array_equal(ranks.recall("t2i", 1), queries["t2i_R@1"])
    np.testing.assert_array_equal(ranks.text_to_image, owner)


def test_uneven_caption_counts_and_large_k() -> None:
    rng = np.random.default_rng(3)
    owner = rng.permutation(np.repeat([0, 1, 2], [1, 2, 3]))
    image, text = rng.standard_normal((3, 4)), rng.standard_normal((6, 4))
    check(image, text, owner)
    assert retrieval(image, text, owner, ks=(1000,))["i2t_R@1000"] == 1.0


def test_equals_clip_benchmark() -> None:
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    image, text, owner = (torch.tensor(x) for x in matched(120, 5, noise=4.0))
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text))
    scores = text @ image.T
    positive = owner[:, None] == torch.arange(len(image))[None]
    found = retrieval(image, text, owner)
    for k in (1, 5, 10):
        i2t = (module.batchify(module.recall_at_k, scores.T, positive.T, 64, "cpu", k=k) > 0).float().mean()
        t2i = (module.batchify(module.recall_at_k, scores, positive, 64, "cpu", k=k) > 0).float().mean()
        assert found[f"i2t_R@{k}"] == pytest.approx(i2t.item(), abs=1e-7)
        assert found[f"t2i_R@{k}"] == pytest.approx(t2i.item(), abs=1e-7)


def test_equals_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.retrieval")
    image, text, owner = (torch.tensor(x) for x in matched(20, 3, noise=4.0))
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text))
    positive = owner[None] == torch.arange(len(image))[:, None]
    found = retrieval(image, text, owner, map_ks=(300, 10))
    for direction, scores, relevant in (("i2t", image @ text.T, positive), ("t2i", text @ image.T, positive.T)):
        query = torch.arange(len(scores))[:, None].expand(scores.shape).flatten()
        # torchmetrics takes a positive with a score of 0 or less for a negative, hence scores of 0 to 1
        arguments = (scores.flatten() + 1) / 2, relevant.flatten(), query
        for k in (1, 5, 10):
            hit = metrics.RetrievalHitRate(top_k=k)(arguments[0], arguments[1], indexes=arguments[2])
            assert found[f"{direction}_R@{k}"] == pytest.approx(hit.item(), abs=1e-6)
        mrr = metrics.RetrievalMRR()(arguments[0], arguments[1], indexes=arguments[2])
        assert found[f"{direction}_MRR"] == pytest.approx(mrr.item(), abs=1e-6)
        # without a cut-off the two definitions of average precision are the same
        full = metrics.RetrievalMAP()(arguments[0], arguments[1], indexes=arguments[2])
        assert found[f"{direction}_mAP@300"] == pytest.approx(full.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_to_image": [0, 1, 2]}, "one image for each of the 4 texts"),
        ({"text_to_image": [0, 1, 2, 3]}, r"text_to_image\[3\] is 3, but the images are numbered 0 to 2"),
        ({"text_to_image": [0, -1, 2, 1]}, r"text_to_image\[1\] is -1"),
        ({"text_to_image": [0, 0, 2, 2]}, r"image 1 has no text \(1 of 3"),
        ({"text_to_image": [0.0, 1.0, 2.0, 0.0]}, "must hold integers"),
        ({"text_embeddings": np.ones((4, 5))}, "4 dimensions and text embeddings 5"),
        ({"text_embeddings": np.ones((0, 4)), "text_to_image": []}, r"text embeddings must have shape .* got \(0, 4\)"),
        ({"image_embeddings": np.ones(4)}, r"image embeddings must have shape .* got \(4,\)"),
        ({"image_embeddings": np.array([["a"]])}, "must be numbers"),
        ({"ks": (0,)}, "ks must be positive whole numbers"),
        ({"ks": (1.5,)}, "ks must be a list of whole numbers"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "image_embeddings": np.eye(3, 4),
        "text_embeddings": np.ones((4, 4)),
        "text_to_image": [0, 1, 2, 0],
    } | change
    with pytest.raises(InputError, match=message):
        retrieval(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    image, text, owner = matched(10, 2)
    image[7, 3] = bad
    with pytest.raises(InputError, match="row 7 of the image embeddings is not finite"):
        retrieval(image, text, owner)
    image, text, owner = matched(10, 2)
    text[13, 0] = bad
    with pytest.raises(InputError, match="row 13 of the text embeddings is not finite"):
        retrieval(image, text, owner)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    image, text, owner = matched(700, 5, dimensions=128, noise=5.0)
    text[100:110] = text[99]
    expected = retrieval(image, text, owner)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = retrieval(torch.tensor(image).cuda(), torch.tensor(text).cuda(), owner)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert found == expected
