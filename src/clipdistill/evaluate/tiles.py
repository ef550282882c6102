"""One tile of the score matrix after another: how many of its scores lie above, or tie with, each positive pair.

The engine room of `ranking.py`. A tile is a float32 product. Each of its scores is compared with two limits, the
positive's score plus and minus the rounding bound; what lies between the two is scored again in float64.
On a GPU the comparisons run over the whole tile in float32; the CPU's way is in `tiles_cpu.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from clipdistill.errors import InputError

TIE_TOLERANCE = 1e-12
"""Two float64 cosines closer than this are tied; float64 rounding of a dot product stays far below it."""

# A block with more than this share of its pairs inside the float32 error bound is computed in float64 as a whole:
# collapsed embeddings (all scores alike) would otherwise be scored again pair by pair.
DENSE_SHARE = 1 / 128
_CHUNK = 2**18
"""Numbers converted to float64 at a time: 2 MiB. From 8 MiB on, the memory of every chunk was given back to the system
and asked for again, and scoring pairs took seven times as long."""


class UnitRows:
    """Rows of an embedding matrix at length 1: float32 (times `scale`) for products, float64 for exact scores.

    A zero row stays zero: its score with everything is 0, so a dead encoder scores chance.
    """

    def __init__(self, values: torch.Tensor, name: str, order: torch.Tensor | None = None, scale: float = 1.0) -> None:
        """values: (n, D), any floating dtype. order: (n,) the row order to use. scale: length of the float32 rows.

        Raises InputError on a non-finite row.
        """
        self.source, self.scale = values, scale
        self.order = None if order is None else order.to(values.device)
        self.inverse = torch.empty(len(values), dtype=torch.float64, device=values.device)
        for chunk in self.chunks():
            norm = torch.linalg.vector_norm(self.take(chunk), dim=1, dtype=torch.float64)
            bad = ~torch.isfinite(norm)
            if bad.any():
                row = chunk.start + int(torch.nonzero(bad)[0])
                raise InputError(
                    f"row {row if self.order is None else int(self.order[row])} of the {name} embeddings is not finite"
                    " (NaN or infinity), so it has no rank: check the encoder's precision and its input"
                )
            self.inverse[chunk] = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))

    def __len__(self) -> int:
        return len(self.source)

    def chunks(self) -> Iterator[slice]:
        """Ranges of rows that are converted at a time."""
        size = max(1, _CHUNK // self.source.shape[1])
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def take(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows `index` (in the row order of this object) as they were given."""
        return self.source[index if self.order is None else self.order[index]]

    def double(self, index: slice) -> torch.Tensor:
        """Rows `index` at length 1, float64."""
        return self.take(index).double() * self.inverse[index, None]

    @functools.cached_property
    def single(self) -> torch.Tensor:
        """All rows at length `scale`, float32."""
        rows = torch.empty(self.source.shape, dtype=torch.float32, device=self.source.device)
        for chunk in self.chunks():
            rows[chunk] = self.take(chunk).double() * (self.scale * self.inverse[chunk, None])
        return rows


def exact_scores(rows: UnitRows, columns: UnitRows, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Cosines of the pairs (rows[i], columns[j]), float64, each from its two rows alone."""
    scores = torch.empty(len(i), dtype=torch.float64, device=i.device)
    chunk_size = max(1, (_CHUNK if i.device.type == "cpu" else 128 * _CHUNK) // rows.source.shape[1])
    for start in range(0, len(i), chunk_size):
        a, b = i[start : start + chunk_size], j[start : start + chunk_size]
        product = rows.take(a).double() * columns.take(b).double()
        scores[start : start + chunk_size] = product.sum(dim=1) * rows.inverse[a] * columns.inverse[b]
    return scores


def float32_bound(dimensions: int) -> float:
    """Largest difference of a float32 product of two unit rows from their cosine, whatever the order of summation.

    D u from the sum (u = 2^-24), and 5 u for rounding the rows, their scale and the result.
    """
    return (dimensions + 5) * 2.0**-24


class TileCounter:
    """Adds the comparisons of one tile after another to `counts`, (4, M) int64: image >, image =, text >, text =.

    Images are counted against the texts of other images only: how an image's own texts stand to each other is known
    from their `threshold`, the float64 score of each pair.
    A subclass compares: see `CpuCounter` and `GpuCounter`.
    """

    tile_shape: tuple[int, int]
    """Images and texts a tile."""

    def __init__(
        self, images: torch.Tensor, order: torch.Tensor | None, texts: torch.Tensor, row_of_text: torch.Tensor
    ) -> None:
        """images (N, D) in the row order `order` (N,), None: as given; texts (M, D).

        row_of_text: (M,) row of each text's image.
        """
        self.bound = float32_bound(images.shape[1])
        # 16-bit fixed point holds scores up to 1 + bound at this scale
        self.scale = 32767 / (1 + 2 * self.bound)
        self.rows, self.columns = UnitRows(images, "image", order, self.scale), UnitRows(texts, "text")
        self.row_of_text = row_of_text
        device = images.device
        self.threshold = exact_scores(self.rows, self.columns, row_of_text, torch.arange(len(texts), device=device))
        self.depth: int | None = None
        """Counts of texts above a text may stop here, `own_above` included, if that is not zero."""
        self.own_above = torch.zeros(len(texts), dtype=torch.int64, device=device)
        self.counts = torch.zeros(4, len(texts), dtype=torch.int64, device=device)
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)

    def add_tile(self, top: int, bottom: int, left: int, right: int, pairs: torch.Tensor) -> None:
        """Compare images top..bottom with texts left..right.

        pairs: (bottom - top, G) the own texts of each image, -1 for none; images with more texts come first.
        """
        tile = self.product(self.rows.single[top:bottom], self.columns.single[left:right])
        near: tuple[list[Near], list[Near]] = ([], [])
        self.compare(tile, top, left, pairs, near)
        self.rescore(near)

    def product(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The scores of rows (H, D) and columns (W, D), (H, W), in memory that the next product uses again."""
        size = len(rows) * len(columns)
        if self.buffer.dtype != rows.dtype or self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=rows.dtype, device=rows.device)
        tile = self.buffer[:size].view(len(rows), len(columns))
        torch.mm(rows, columns.T, out=tile)
        return tile

    def hide_own(self, tile: torch.Tensor, top: int, left: int, value: float) -> None:
        """Set the scores of images with their own texts to `value`, which no comparison finds."""
        row = self.row_of_text[left : left + tile.shape[1]] - top
        column = torch.nonzero((row >= 0) & (row < tile.shape[0]))[:, 0]
        tile[row[column], column] = value

    def limits_at(self, error: float) -> tuple[torch.Tensor, torch.Tensor]:
        """For scores off by at most `error`: what is surely above each positive, and what may be; (M,), float64.

        A score above the first limit surely is, one from the second on may be. Both in the products' unit (`scale`).
        """
        return (self.threshold + error) * self.scale, (self.threshold - error) * self.scale

    def compare(self, tile: torch.Tensor, top: int, left: int, pairs: torch.Tensor, near: tuple[list, list]) -> None:
        """Count what is surely above each limit, and append (i, j, text) of what is uncertain to `near`.

        Without the images' own texts, see `hide_own`.
        """
        raise NotImplementedError

    def rescore(self, near: tuple[list[Near], list[Near]]) -> None:
        """Decide what is uncertain, for each direction, in float64."""
        for direction in (0, 1):
            if near[direction]:
                self._rescore(direction, *(torch.cat(parts) for parts in zip(*near[direction], strict=True)))

    def _rescore(self, direction: int, i: torch.Tensor, j: torch.Tensor, text: torch.Tensor) -> None:
        """Compare the scores of images i with texts j with those of the positive pairs `text`, in float64."""
        difference = exact_scores(self.rows, self.columns, i, j) - self.threshold[text]
        self.add(2 * direction, text, difference > TIE_TOLERANCE)
        self.add(2 * direction + 1, text, difference.abs() <= TIE_TOLERANCE)

    def add_dense(self, tile: torch.Tensor, left: int, own: torch.Tensor | None) -> None:
        """Compare a block of exact scores."""
        axis = 0 if own is None else 1
        texts = torch.arange(left, left + tile.shape[1], device=tile.device) if own is None else own
        threshold = self.threshold[texts]
        difference = tile[: len(texts)] - threshold[:, None] if axis else tile - threshold
        self.add(2 * axis, texts, (difference > TIE_TOLERANCE).sum(dim=axis))
        self.add(2 * axis + 1, texts, (difference.abs() <= TIE_TOLERANCE).sum(dim=axis))

    def dense_tile(self, top: int, left: int, shape: tuple[int, ...]) -> torch.Tensor:
        tile = self.rows.double(slice(top, top + shape[0])) @ self.columns.double(slice(left, left + shape[1])).T
        self.hide_own(tile, top, left, -torch.inf)
        return tile

    def add(self, line: int, texts: torch.Tensor, values: torch.Tensor) -> None:
        self.counts[line].index_add_(0, texts, values.long())


Near = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class GpuCounter(TileCounter):
    """Compares whole tiles in float32."""

    tile_shape = (4096, 16384)

    def compare(self, tile: torch.Tensor, top: int, left: int, pairs: torch.Tensor, near: tuple[list, list]) -> None:
        """See `TileCounter`."""
        self.hide_own(tile, top, left, -torch.inf)
        upper, lower = (limit.float() for limit in self.limits_at(self.bound))
        dense: torch.Tensor | None = None
        # text-to-image first (None), then image-to-text with each of the images' own texts in turn
        for texts in [None, *(column[column >= 0] for column in pairs.T)]:
            if texts is None:
                span = slice(left, left + tile.shape[1])
                above, reach = tile > upper[span], tile > lower[span]
            else:
                above, reach = (tile[: len(texts)] > limit[texts, None] for limit in (upper, lower))
            uncertain = above ^ reach
            if int(uncertain.sum()) > max(256, DENSE_SHARE * uncertain.numel()):
                dense = self.dense_tile(top, left, tile.shape) if dense is None else dense
                self.add_dense(dense, left, texts)
                continue
            i, j = torch.nonzero(uncertain, as_tuple=True)
            if texts is None:
                self.counts[0, span] += above.sum(dim=0)
                near[0].append((i + top, j + left, j + left))
            else:
                self.add(2, texts, above.sum(dim=1))
                near[1].append((i + top, j + left, texts[i]))
