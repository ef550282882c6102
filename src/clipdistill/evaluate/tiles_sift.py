"""Sifting the scores of a tile with a bfloat16 product before any exact product, on CPUs that make these fast.

Processors with bfloat16 instructions multiply twice as fast in bfloat16 as in float32, and faster with matrix units.
How far such a score can be off is bounded by how far the rounded rows are from the rows (Cauchy-Schwarz), 0.004 of
cosine: too much to rank with, but enough to tell that most texts are far below an image's own and that some are surely
above. Only what is undecided, less than a percent of the scores, gets its float32 score, in a sampled product (the dot
products of these pairs and no others), and what is then still within the rounding of float32 is scored in float64 as
everywhere. The result is the same to the last count.
"""

from __future__ import annotations

import functools
import timeit
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clipdistill.evaluate.tiles import Near, UnitRows, float32_bound
from clipdistill.evaluate.tiles_cpu import SMALLEST, CpuCounter, Limits

LEAST_GAIN = 1.4


class SiftCounter(CpuCounter):
    """Scores in float32 only what a bfloat16 product leaves undecided; a plain `CpuCounter` once that is too much."""

    tile_shape = (5000, 2000)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sifts = True
        self.fine_rows, self.row_factors = _single(self.rows)
        self.fine_columns, self.column_factors = _single(self.columns)
        # |ab - a'b'| <= |a - a'| |b| + |a'| |b - b'| for rows a, b of length 1 and their rounded a', b'
        self.half_rows, images = _rounded(self.fine_rows, self.row_factors)
        self.half_columns, texts = _rounded(self.fine_columns, self.column_factors)
        images /= self.scale
        error = images + (1 + images) * texts + 2 * self.bound
        self.coarse = Limits(*map(bfloat16_digits, self.limits_at(error), (1, -1)))
        self.fine_upper, self.fine_reach = (limit.float() for limit in self.limits_at(self.bound))

    def add_tile(self, top: int, bottom: int, left: int, right: int, pairs: torch.Tensor) -> None:
        """See `TileCounter`."""
        self.sifts = self.sifts and self._sift(top, bottom, left, right, pairs)
        if not self.sifts:  # an untrained model: the next tiles will be no better
            super().add_tile(top, bottom, left, right, pairs)

    def _sift(self, top: int, bottom: int, left: int, right: int, pairs: torch.Tensor) -> bool:
        """Count a tile; False, and nothing counted, when too many scores may reach a limit."""
        scores = self.product(self.half_rows[top:bottom], self.half_columns[left:right])
        self.hide_own(scores.view(torch.int16), top, left, SMALLEST)
        digits, rows = scores.view(torch.int16).numpy(), self.open_rows(pairs, self.coarse)
        few = self.few(digits, self.coarse, rows, left)
        if few is None:
            return False
        found = self.add_few(few, digits.shape, self.coarse, rows, left)
        # the float32 score of whatever is undecided in one direction or the other
        undecided = np.zeros(len(found.row), dtype=np.bool_)
        for k, _ in found.uncertain:
            undecided[k] = True
        number, places = np.cumsum(undecided) - 1, np.flatnonzero(undecided)
        i, j = torch.from_numpy(found.row.take(places)), torch.from_numpy(found.column.take(places))
        fine = sampled_product(self.fine_rows[top:bottom], self.fine_columns[left:right], i, j)
        i, j = i + top, j + left
        fine *= self.row_factors[i] * self.column_factors[j]
        other = self.row_of_text[j] != i  # limits below zero find what is hidden
        near: tuple[list[Near], list[Near]] = ([], [])
        for direction, (which, texts) in enumerate(found.uncertain):
            n, text = torch.from_numpy(number.take(which)), torch.from_numpy(texts)
            score = fine[n]
            reaches = torch.nonzero((score >= self.fine_reach[text]) & other[n])[:, 0]
            n, text, score = n[reaches], text[reaches], score[reaches]
            above = score > self.fine_upper[text]
            self.add(2 * direction, text, above)
            n, text = n[~above], text[~above]
            near[direction].append((i[n], j[n], text))
        self.rescore(near)
        return True


def bfloat16_digits(limits: torch.Tensor, sign: int) -> np.ndarray:
    """Bits, as int16, of bfloat16 numbers at or below (sign -1) or at or above (sign 1) the limits.

    Positive bfloat16 numbers are ordered as the integers of the same bits are, and negative ones are below them. So
    limits up to zero become the smallest int16, or zero.
    """
    bits = (limits * (1 + sign * 2.0**-22)).float().view(torch.int32) >> 16  # the factor covers rounding to float32
    if sign > 0:
        bits += 1
    return torch.where(limits > 0, bits, 0 if sign > 0 else SMALLEST).short().numpy()


def sampled_product(rows: torch.Tensor, columns: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Float32 dot products of rows[i] and columns[j], both (n, D); i ascending."""
    start = torch.searchsorted(i, torch.arange(len(rows) + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(
            start, j, torch.zeros(len(i)), (len(rows), len(columns)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(wanted, rows, columns.T, beta=0.0).values()


def sifting_pays(dimensions: int) -> bool:
    """Whether this machine multiplies clearly faster in bfloat16 (tried out)."""
    return _gain(dimensions, torch.get_num_threads()) >= LEAST_GAIN


@functools.lru_cache
def _gain(dimensions: int, threads: int) -> float:
    """Time of a float32 product over that of a bfloat16 one; 0 where sifting does not work."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, dimensions, generator=generator) for n in (512, 1024))
    halves = rows.bfloat16(), columns.bfloat16()
    product = halves[0] @ halves[1].T
    exact = halves[0].double() @ halves[1].double().T
    # sums must be kept in float32 and rounded once
    longest = float(rows.norm(dim=1).max() * columns.norm(dim=1).max())
    allowed = 2.0**-8 * exact.abs() + float32_bound(dimensions) * longest
    try:
        sampled_product(rows, columns, *torch.arange(5).expand(2, -1))
    except (RuntimeError, NotImplementedError):  # a torch built without it
        return 0.0
    if bool(((product.double() - exact).abs() > allowed).any()):
        return 0.0
    return _best(lambda: rows @ columns.T) / _best(lambda: halves[0] @ halves[1].T)


def _best(function: Callable[[], object]) -> float:
    return min(timeit.repeat(function, number=1, repeat=4))


def _single(unit: UnitRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 rows (n, D), and the factors (n,) that bring these to length `scale`.

    The rows as they were given where these serve, which saves a copy: products of very long or very short ones could
    leave the range of float32.
    """
    long = unit.inverse[unit.inverse > 0]
    moderate = bool(((long > 1e-10) & (long < 1e10)).all())
    if unit.order is None and unit.source.dtype == torch.float32 and unit.source.is_contiguous() and moderate:
        return unit.source, (unit.scale * unit.inverse).float()
    return unit.single, torch.ones(len(unit))


def _rounded(rows: torch.Tensor, factors: torch.Tensor, chunk: int = 512) -> tuple[torch.Tensor, float]:
    """The rows times their factors in bfloat16, and the largest distance of such a row from its rounded row."""
    halves, furthest = torch.empty(rows.shape, dtype=torch.bfloat16), 0.0
    for part, factor, half in zip(rows.split(chunk), factors.split(chunk), halves.split(chunk), strict=True):
        exact = part * factor[:, None]
        half.copy_(exact)
        furthest = max(furthest, float(torch.linalg.vector_norm(exact.sub_(half), dim=1).max()))
    return halves, furthest
