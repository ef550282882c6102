"""Comparing the scores of a tile with the limits of the positive pairs on the CPU.

Scores are compared in 16-bit fixed point: cutting off digits keeps the order, widens the uncertain band a little, and
is three times faster than float32. A trained model ranks most positives near the top, so one comparison a score, with
the lower of its column's limit and the lowest of its row, leaves a percent of the scores, and only these are looked at
one by one. Where more are left (an untrained model), blocks that fit the cache are compared with every limit and
counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipdistill.evaluate.tiles import DENSE_SHARE, Near, TileCounter

# blocks fit the second-level cache, and at most 255 rows and 128 x 8 columns let byte-wide counters hold a sum
BLOCK_ROWS, BLOCK_COLUMNS = 240, 1024
# up to this share of a tile, looking at scores one by one is faster than counting
FEW_SHARE = 1 / 16
STRIPE = 2**19
"""Scores looked at in a row: their digits and their mask stay in the second-level cache."""
LARGEST, SMALLEST = np.iinfo(np.int16).max, np.iinfo(np.int16).min


class CpuCounter(TileCounter):
    """Compares a tile in 16-bit fixed point."""

    tile_shape = (2500, 1000)  # the best of ten shapes for the product (480 x 4096: a quarter slower)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # a score is surely above when its digits are above those of threshold + bound, and uncertain when they are at
        # or above those of threshold - bound
        self.limits = Limits(*(limit.numpy().astype(np.int16) for limit in self.limits_at(self.bound)))
        self.digits = np.empty(0, dtype=np.int16)
        self.lower, self.mask = np.empty((0, 0), dtype=np.int16), np.empty((0, 0), dtype=np.bool_)
        self.open: OpenRows | None = None
        self.words, self.words_width = np.empty((2, 0), dtype=np.bool_), 0

    def compare(self, tile: torch.Tensor, top: int, left: int, pairs: torch.Tensor, near: tuple[list, list]) -> None:
        """See `TileCounter`."""
        scores = tile.numpy()
        if self.digits.size < scores.size:
            self.digits = np.empty(scores.size, dtype=np.int16)
        digits = self.digits[: scores.size].reshape(scores.shape)
        np.copyto(digits, scores, casting="unsafe")  # towards zero, which keeps the order
        self.hide_own(torch.from_numpy(digits), top, left, SMALLEST)
        rows = self.open_rows(pairs, self.limits)
        few = self.few(digits, self.limits, rows, left)
        if few is None:
            self._count(digits, top, left, None, near[0])
            self._count(digits, top, left, rows, near[1])
        else:
            found = self.add_few(few, digits.shape, self.limits, rows, left)
            for direction, (k, text) in enumerate(found.uncertain):
                near[direction].append(_near(top + found.row[k], left + found.column[k], text))

    def open_rows(self, pairs: torch.Tensor, limits: Limits) -> OpenRows:
        """The own texts of a tile's images, without those whose counts are as large as anybody wants to know."""
        if self.open is None or self.open.pairs is not pairs or self.open.limits is not limits:
            self.open = OpenRows(pairs, limits)
        if self.depth is not None:
            own_above, greater = self.own_above.numpy(), self.counts.numpy()[2]
            while True:  # the first texts of the rows have the lowest limits, so the largest counts
                text = self.open.texts[0]
                own = own_above[text]
                closed = np.flatnonzero((own > 0) & (own + greater[text] >= self.depth) & (text >= 0))
                if not len(closed):
                    break
                self.open.close(closed)
        return self.open

    # -- few scores reach a limit: each is looked at ------------------------------------------------------------------

    def few(
        self, digits: np.ndarray, limits: Limits, rows: OpenRows, left: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Scores that reach the limit of their column or the lowest of their row: flat places, ascending, and digits.

        None where they are many.
        """
        height, width = digits.shape
        step = max(1, STRIPE // width)
        if self.mask.shape != (step, width):
            self.lower, self.mask = (np.empty((step, width), dtype=dtype) for dtype in (np.int16, np.bool_))
        places, values = [], []
        room = FEW_SHARE * digits.size
        for r in range(0, height, step):
            stripe = digits[r : r + step]
            lower, mask = self.lower[: len(stripe)], self.mask[: len(stripe)]
            # one search for both directions: looking through the mask takes longer than making it
            np.minimum(limits.reach[left : left + width], rows.lowest[r : r + step], out=lower)
            np.greater_equal(stripe, lower, out=mask)
            place = np.flatnonzero(mask)
            room -= len(place)
            if room < 0:
                return None
            values.append(stripe.ravel().take(place))
            places.append(place + r * width)
        return np.concatenate(places), np.concatenate(values)

    def add_few(
        self, few: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], limits: Limits, rows: OpenRows, left: int
    ) -> Found:
        """Look at what `few` found: count what is surely above a positive, and return what is uncertain."""
        (height, width), (place, value) = shape, few
        row = np.repeat(np.arange(height), np.diff(np.searchsorted(place, np.arange(height + 1) * width)))
        column = place - row * width
        counts = self.counts.numpy()

        # text to image
        span = slice(left, left + width)
        k = np.flatnonzero(value >= limits.reach[span].take(column))
        j = column.take(k)
        above = value.take(k) > limits.upper[span].take(j)
        counts[0, span] += np.bincount(_chosen(j, above), minlength=width)
        uncertain = np.flatnonzero(~above)
        columns = k.take(uncertain), left + j.take(uncertain)

        # image to text, from the lowest limit of each image to its highest: what reaches one goes on to the next, so
        # that after the first few are left
        own = [(place[:0], place[:0])]
        k, i = np.arange(len(place)), row
        for text, upper, reach in zip(rows.texts, rows.upper, rows.reach, strict=True):
            reaches = np.flatnonzero(value >= reach.take(i))
            if not len(reaches):
                break
            value, i, k = value.take(reaches), i.take(reaches), k.take(reaches)
            above = value > upper.take(i)
            present = text >= 0  # a text has one image, so no index repeats
            counts[2, text[present]] += np.bincount(_chosen(i, above), minlength=height)[present]
            uncertain = np.flatnonzero(~above)
            own.append((k.take(uncertain), text.take(i.take(uncertain))))
        own_k, own_text = map(np.concatenate, zip(*own, strict=True))
        return Found(row, column, (columns, (own_k, own_text)))

    # -- many do: the block is compared with every limit --------------------------------------------------------------

    def _count(self, digits: np.ndarray, top: int, left: int, rows: OpenRows | None, near: list[Near]) -> None:
        """Count by comparing block after block with all limits; rows: None for text to image."""
        for r in range(0, digits.shape[0], BLOCK_ROWS):
            own = [None] if rows is None else rows.lists(r, r + BLOCK_ROWS)
            for c in range(0, digits.shape[1], BLOCK_COLUMNS):
                block = digits[r : r + BLOCK_ROWS, c : c + BLOCK_COLUMNS]
                self._count_block(block, top + r, left + c, own, near)

    def _count_block(
        self,
        digits: np.ndarray,
        top: int,
        left: int,
        own: Sequence[tuple[np.ndarray, np.ndarray] | None],
        near: list[Near],
    ) -> None:
        """Count a block. own: for each comparison the rows and the texts to compare them with, or None: columns."""
        counts = self.counts.numpy()
        dense: torch.Tensor | None = None
        for pair in own:
            rows, texts = (None, None) if pair is None else pair
            part = digits if rows is None or len(rows) == len(digits) else digits[rows]
            found = self._compare_block(part, left, texts)
            if found is None:
                dense = self.dense_tile(top, left, digits.shape) if dense is None else dense
                if rows is None or texts is None:
                    self.add_dense(dense, left, None)
                else:
                    self.add_dense(dense[torch.from_numpy(rows)], left, torch.from_numpy(texts))
                continue
            greater, i, j = found
            if texts is None:
                counts[0, left : left + digits.shape[1]] += greater
            else:
                counts[2, texts] += greater
            text = left + j if texts is None else texts[i]
            i = i if rows is None else rows[i]
            near.append(_near(top + i, left + j, text))

    def _compare_block(
        self, digits: np.ndarray, left: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """How many scores are surely above each text's positive, and row and column of each uncertain score.

        own: (rows,) the texts to compare the rows with; None to compare the columns with their own positives. None is
        returned when the uncertain scores are too many to list. Booleans are counted eight at a time: eight are one
        64-bit word of eight byte-wide counters, which can be added up 255 times before a byte overflows.
        """
        width = digits.shape[1]
        words = -(-width // 8)
        if width != self.words_width:
            # columns that only fill up a word must stay False
            self.words, self.words_width = np.zeros((2, BLOCK_ROWS * 8 * words), dtype=np.bool_), width
        height = len(digits)
        place: slice | np.ndarray = slice(left, left + width) if own is None else own[:, None]
        above, reach = (mask[: height * 8 * words].reshape(height, 8 * words) for mask in self.words)
        np.greater(digits, self.limits.upper[place], out=above[:, :width])
        np.greater_equal(digits, self.limits.reach[place], out=reach[:, :width])
        above_words, uncertain = above.view(np.uint64), reach.view(np.uint64)
        uncertain ^= above_words
        # most rows hold no uncertain score, and looking through words for it is slower than the comparison itself
        rows = np.flatnonzero(np.bitwise_or.reduce(uncertain, axis=1))
        k, column = np.nonzero(reach[rows])
        if len(k) > max(256, DENSE_SHARE * height * width):
            return None
        if own is None:
            greater = np.add.reduce(above_words, axis=0).view(np.uint8)[:width]
        else:
            greater = np.add.reduce(above_words, axis=1)[:, None].view(np.uint8).sum(axis=1)
        return greater.astype(np.int64), rows[k], column


@dataclass(frozen=True)
class Found:
    """Scores of a tile that reach a limit: their rows and columns, in ascending order of the rows, (n,).

    uncertain: for both directions, which of them (indices into row and column) are not surely above which text.
    """

    row: np.ndarray
    column: np.ndarray
    uncertain: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Limits:
    """Digits above which a score is surely above each text's positive, and from which on it may be: (M,), int16."""

    upper: np.ndarray
    reach: np.ndarray


class OpenRows:
    """Own texts of a tile's images and their limits, (G, rows), ascending; -1 and unreachable where there are fewer."""

    def __init__(self, pairs: torch.Tensor, limits: Limits) -> None:
        """pairs: (rows, G) the own texts of each image, the lowest score first."""
        self.pairs, self.limits = pairs, limits
        self.texts = pairs.numpy().T.copy()
        self.upper, self.reach = (
            np.where(self.texts < 0, LARGEST, limit[self.texts]) for limit in (limits.upper, limits.reach)
        )

    @property
    def lowest(self) -> np.ndarray:
        """The lowest limit of each row, (rows, 1)."""
        return self.reach[0][:, None]

    def close(self, rows: np.ndarray) -> None:
        """Leave out the first text of these rows."""
        for values, none in ((self.texts, -1), (self.upper, LARGEST), (self.reach, LARGEST)):
            values[:-1, rows] = values[1:, rows]
            values[-1, rows] = none

    def lists(self, top: int, bottom: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For g = 0, 1, ...: which of some rows have a g-th text, and these texts."""
        texts = self.texts[:, top:bottom]
        present = (np.flatnonzero(text >= 0) for text in texts)
        return [(rows, texts[g, rows]) for g, rows in enumerate(present) if len(rows)]


def _chosen(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """values[mask], faster."""
    return values.take(np.flatnonzero(mask))


def _near(i: np.ndarray, j: np.ndarray, text: np.ndarray) -> Near:
    return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(text)
