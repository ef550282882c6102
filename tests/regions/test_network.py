"""The meta-teacher's network against plain loops over single images, heads and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.regions.network import MetaTeacherNetwork, attend, region_weights, similarity_pool
from clipdistill.train.region_config import MetaTeacherConfig

WIDTH, HEADS = 8, 2


def network(**settings: Any) -> MetaTeacherNetwork:
    torch.manual_seed(3)
    made = MetaTeacherNetwork(WIDTH, MetaTeacherConfig(heads=HEADS, **settings)).double()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and gains start as 0 and 1, which hides mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch(regions: int = 4, tokens: int = 5) -> dict[str, Tensor]:
    """Three images with 4, 2 and 1 regions and captions of 3, 5 and 1 tokens; padding holds rubbish."""
    torch.manual_seed(5)
    return {
        "regions": torch.randn(3, regions, WIDTH, dtype=torch.float64),
        "region_mask": torch.arange(regions)[None] < torch.tensor([4, 2, 1])[:, None],
        "areas": torch.rand(3, regions, dtype=torch.float64),
        "confidences": torch.rand(3, regions, dtype=torch.float64),
        "tokens": torch.randn(3, tokens, WIDTH, dtype=torch.float64),
        "token_mask": torch.arange(tokens)[None] < torch.tensor([3, 5, 1])[:, None],
    }


# --- one image at a time, without padding, written out ----------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    shares = [math.exp(v - top) for v in values]
    return [s / sum(shares) for s in shares]


def loop_attention(layer: torch.nn.MultiheadAttention, queries: Tensor, others: Tensor) -> Tensor:
    """Multi-head attention of queries (Q, D) over others (K, D)."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    wq, wk, wv = weight.split(WIDTH)
    bq, bk, bv = bias.split(WIDTH)
    size = WIDTH // HEADS
    rows = []
    for query in queries:
        heads = []
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            q = (wq @ query + bq)[own]
            scores = [float(q @ (wk @ other + bk)[own]) / math.sqrt(size) for other in others]
            values = [(wv @ other + bv)[own] for other in others]
            heads.append(sum(s * v for s, v in zip(softmax(scores), values)))
        rows.append(layer.out_proj.weight @ torch.cat(heads) + layer.out_proj.bias)  # type: ignore[arg-type]
    return torch.stack(rows)


def loop_norm(layer: torch.nn.LayerNorm, rows: Tensor) -> Tensor:
    result = []
    for row in rows:
        deviation = torch.sqrt(((row - row.mean()) ** 2).mean() + layer.eps)
        result.append((row - row.mean()) / deviation * layer.weight + layer.bias)
    return torch.stack(result)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def loop_pool(rows: Tensor, weights: list[float] | None = None) -> Tensor:
    mean = sum(rows) / len(rows)  # type: ignore[arg-type]
    shares = softmax([cosine(row, mean) / 2.0 for row in rows])
    if weights is not None:
        products = [s * w for s, w in zip(shares, weights)]
        shares = [p / sum(products) for p in products]
    return sum(s * row for s, row in zip(shares, rows))  # type: ignore[return-value]


def loop_weights(r: Tensor, areas: Tensor, confidences: Tensor, t: Tensor | None) -> list[float]:
    best = [1.0 if t is None else max(0.0, max(cosine(row, token) for token in t)) for row in r]
    products = [float(a * c) * b for a, c, b in zip(areas, confidences, best)]
    return [p / sum(products) for p in products]


def loop_embedding(made: MetaTeacherNetwork, given: dict[str, Tensor], i: int, **settings: Any) -> Tensor:
    """The embedding of image i alone."""
    kind, weights = settings.get("image_side", "caption"), settings.get("weights", "pool")
    kept = given["region_mask"][i]
    r, areas, confidences = given["regions"][i][kept], given["areas"][i][kept], given["confidences"][i][kept]
    t = given["tokens"][i][given["token_mask"][i]] if kind == "caption" else None
    shares = None if weights == "none" else loop_weights(r, areas, confidences, t)
    if weights == "scale":
        assert shares is not None
        r, shares = torch.stack([w * row for w, row in zip(shares, r)]), None
    if kind == "query":
        t = made.query
    others = r if t is None else t
    image = loop_norm(made.norm_image, r + loop_attention(made.image_to_text, r, others))
    if t is None:
        return loop_pool(image, shares)
    text = loop_norm(made.norm_text, t + loop_attention(made.text_to_image, t, r))
    return 0.5 * loop_pool(text) + 0.5 * loop_pool(image, shares)


@pytest.mark.parametrize("weights", ["none", "pool", "scale"])
@pytest.mark.parametrize("image_side", ["caption", "query", "regions"])
@torch.no_grad()
def test_padded_batches_equal_single_images(image_side: Any, weights: Any) -> None:
    settings = {"image_side": image_side, "weights": weights}
    made, given = network(**settings), batch()
    found = made(**given)
    for i in range(3):
        torch.testing.assert_close(found[i], loop_embedding(made, given, i, **settings), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_batch() -> None:
    made, given = network(), batch()
    wider = {
        "regions": torch.cat([given["regions"], 9 * torch.ones(3, 3, WIDTH)], 1),
        "region_mask": torch.cat([given["region_mask"], torch.zeros(3, 3, dtype=torch.bool)], 1),
        "areas": torch.cat([given["areas"], torch.ones(3, 3)], 1),
        "confidences": torch.cat([given["confidences"], torch.ones(3, 3)], 1),
        "tokens": torch.cat([given["tokens"], 9 * torch.ones(3, 2, WIDTH)], 1),
        "token_mask": torch.cat([given["token_mask"], torch.zeros(3, 2, dtype=torch.bool)], 1),
    }
    torch.testing.assert_close(made(**wider), made(**given), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_released_form_attends_to_padding() -> None:
    """Zero rows of the padding are attended to and pooled, as if they were regions and tokens."""
    made, given = network(padding="released", weights="none"), batch()
    masks = given["region_mask"], given["token_mask"]
    zeroed = {
        **given,
        "regions": given["regions"] * masks[0][..., None],
        "tokens": given["tokens"] * masks[1][..., None],
        "region_mask": torch.ones_like(masks[0]),
        "token_mask": torch.ones_like(masks[1]),
    }
    found = made(**given)
    for i in range(3):
        expected = loop_embedding(made, zeroed, i, weights="none")
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)
    masked = network(weights="none")(**given)
    assert (found[2] - masked[2]).abs().max() > 1e-3


@torch.no_grad()
def test_caption_free_forms_never_see_the_caption() -> None:
    given = batch()
    other = {**given, "tokens": torch.randn_like(given["tokens"]), "token_mask": ~given["token_mask"]}
    for side in ("query", "regions"):
        made = network(image_side=side)
        assert torch.equal(made(**given), made(**other))
        alone = {name: value for name, value in given.items() if not name.startswith("token")}
        assert torch.equal(made(**given), made(**alone))
    published = network()
    assert (published(**given) - published(**other)).abs().max() > 1e-3
    with pytest.raises(InputError, match="needs the caption's tokens"):
        published(**{name: value for name, value in given.items() if not name.startswith("token")})


def test_nothing_to_attend_to_is_zero_and_has_finite_gradients() -> None:
    made, given = network(), batch()
    given["region_mask"][1] = False
    given["token_mask"][2] = False
    regions = given["regions"].requires_grad_()
    found = made(**given)
    assert found.isfinite().all()
    found.square().sum().backward()
    assert regions.grad is not None
    assert regions.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    with torch.no_grad():
        output = attend(made.image_to_text, given["regions"], given["tokens"], given["token_mask"])
    assert output[2].abs().max() == 0
    assert similarity_pool(given["regions"].detach(), given["region_mask"])[1].abs().max() == 0


def test_region_weights_by_hand() -> None:
    regions = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, True, False]])
    areas, confidences = torch.tensor([[0.5, 0.25, 0.8, 1.0]]), torch.tensor([[0.8, 0.4, 0.9, 1.0]])
    tokens, token_mask = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-5.0, 0.0]]]), torch.tensor([[True, True, False]])
    # cosines with the nearest true token: 1, 1/sqrt(2), and a negative one, which counts as nothing
    products = [0.5 * 0.8 * 1, 0.25 * 0.4 / math.sqrt(2), 0, 0]
    found = region_weights(regions, mask, areas, confidences, tokens, token_mask)
    assert found[0].tolist() == pytest.approx([p / sum(products) for p in products])
    free = region_weights(regions, mask, areas, confidences, None, None)
    assert free[0].tolist() == pytest.approx([0.4 / 1.22, 0.1 / 1.22, 0.72 / 1.22, 0])
    opposite = region_weights(-regions.abs(), mask, areas, confidences, regions.abs(), mask)
    assert opposite[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])  # no similarity at all: equal shares


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_side": "query", "padding": "released"}, "published form"),
        ({"heads": 0}, "heads"),
        ({"image_side": "captions"}, "image_side"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTeacherConfig(**settings)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="3 heads do not divide the embedding width 8; use one of 1, 2, 4, 8"):
        MetaTeacherNetwork(8, MetaTeacherConfig(heads=3))
