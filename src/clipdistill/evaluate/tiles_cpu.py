"""Comparing the scores of a tile with the limits of the positive pairs on the CPU.

Scores are compared in 16-bit fixed point: cutting off digits keeps the order, widens the uncertain band a little, and
is three times faster than float32. A trained model ranks most positives near the top, so one comparison a score, with
the lowest limit of its row or column, leaves a percent of the scores, and only these are looked at one by one. Where
more are left (an untrained model), blocks that fit the cache are compared with every limit and counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clipdistill.evaluate.tiles import DENSE_SHARE, Near, TileCounter

# blocks fit the second-level cache, and at most 255 rows and 128 x 8 columns let byte-wide counters hold a sum
BLOCK_ROWS, BLOCK_COLUMNS = 240, 1024
# up to this share of a tile, looking at scores one by one is faster than counting
FEW_SHARE = 1 / 16
STRIPE = 2**18
"""Scores looked at in a row: their digits and their mask stay in the second-level cache."""
LARGEST = np.iinfo(np.int16).max


class CpuCounter(TileCounter):
    """Compares a tile in 16-bit fixed point."""

    tile_shape = (2500, 1000)  # the best of ten shapes for the product (480 x 4096: a quarter slower)

    def __init__(self, *arguments: torch.Tensor) -> None:
        super().__init__(*arguments)
        # a score is surely above when its digits are above those of threshold + bound, and uncertain when they are at
        # or above those of threshold - bound
        self.limits = Limits(*(limit.numpy().astype(np.int16) for limit in self.limits_at(self.bound)))
        self.digits, self.mask = np.empty(0, dtype=np.int16), np.empty((0, 0), dtype=np.bool_)
        self.words, self.words_width = np.empty((2, 0), dtype=np.bool_), 0

    def compare(self, tile: torch.Tensor, top: int, left: int, pairs: torch.Tensor, near: tuple[list, list]) -> None:
        """See `TileCounter`."""
        scores = tile.numpy()
        if self.digits.size < scores.size:
            self.digits = np.empty(scores.size, dtype=np.int16)
        digits = self.digits[: scores.size].reshape(scores.shape)
        np.copyto(digits, scores, casting="unsafe")  # towards zero, which keeps the order
        rows = self.open_rows(pairs, self.limits)
        columns, place = self.few(digits, self.limits, rows, left)
        if columns is None:
            self._count(digits, top, left, None, near[0])
        else:
            self.add_to_columns(digits, columns, self.limits, top, left, near[0])
        if place is None:
            self._count(digits, top, left, rows, near[1])
        else:
            self.add_to_rows(digits, place, rows, top, left, near[1])

    def open_rows(self, pairs: torch.Tensor, limits: Limits) -> Rows:
        """The own texts of a tile's images, without those whose counts are as large as anybody wants to know."""
        texts = pairs.numpy()
        if self.depth is not None:
            closed = (self.counts.numpy()[2][texts] >= self.depth) & self.late.numpy()[texts] & (texts >= 0)
            if closed.any():  # always the first ones, whose limits are the lowest
                filled = np.concatenate([texts, np.full_like(texts, -1)], axis=1)
                index = np.arange(texts.shape[1]) + closed.sum(axis=1, keepdims=True)
                texts = np.take_along_axis(filled, index, axis=1)
        return Rows(texts, limits)

    # -- few scores reach a limit: each is looked at ------------------------------------------------------------------

    def few(
        self, digits: np.ndarray, limits: Limits, rows: Rows, left: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Flat places, ascending, of the scores that reach the limit of their column, and the lowest of their row.

        None where they are many.
        """
        height, width = digits.shape
        step = max(1, STRIPE // width)
        if self.mask.shape != (step, width):
            self.mask = np.empty((step, width), dtype=np.bool_)
        places: list[list[np.ndarray] | None] = [[], []]
        room = [FEW_SHARE * digits.size] * 2
        for r in range(0, height, step):
            stripe = digits[r : r + step]
            mask = self.mask[: len(stripe)]
            for direction, limit in enumerate((limits.reach[left : left + width], rows.lowest[r : r + step])):
                found = places[direction]
                if found is None:
                    continue
                np.greater_equal(stripe, limit, out=mask)
                place = np.flatnonzero(mask)
                place += r * width
                found.append(place)
                room[direction] -= len(place)
                if room[direction] < 0:
                    places[direction] = None
        columns, own = (None if parts is None else np.concatenate(parts) for parts in places)
        return columns, own

    def add_to_columns(
        self, digits: np.ndarray, place: np.ndarray, limits: Limits, top: int, left: int, near: list[Near]
    ) -> None:
        """Text to image: count what is surely above each text's positive, and list what is uncertain."""
        width = digits.shape[1]
        row, column = np.divmod(place, width)
        above = digits.ravel()[place] > limits.upper[left : left + width][column]
        self.counts.numpy()[0, left : left + width] += np.bincount(column[above], minlength=width)
        text = left + column[~above]
        near.append((torch.from_numpy(top + row[~above]), torch.from_numpy(text), torch.from_numpy(text)))

    def add_to_rows(
        self, digits: np.ndarray, place: np.ndarray, rows: Rows, top: int, left: int, near: list[Near]
    ) -> None:
        """Image to text: the same with each image's own texts, from the lowest limit of each image to its highest.

        What reaches one limit goes on to the next, so that after the first few are left.
        """
        height, width = digits.shape
        row = np.repeat(np.arange(height), np.diff(np.searchsorted(place, np.arange(height + 1) * width)))
        value = digits.ravel()[place]
        greater = self.counts.numpy()[2]
        for text, upper, reach in zip(rows.texts.T, rows.upper.T, rows.reach.T, strict=True):
            reaches = np.flatnonzero(value >= reach[row])
            if not len(reaches):
                break
            place, value, row = place[reaches], value[reaches], row[reaches]
            above = value > upper[row]
            present = text >= 0  # a text has one image, so no index repeats
            greater[text[present]] += np.bincount(row[above], minlength=height)[present]
            k = np.flatnonzero(~above)
            i, j = row[k], place[k] - row[k] * width
            near.append((torch.from_numpy(top + i), torch.from_numpy(left + j), torch.from_numpy(text[i])))

    # -- many do: the block is compared with every limit --------------------------------------------------------------

    def _count(self, digits: np.ndarray, top: int, left: int, rows: Rows | None, near: list[Near]) -> None:
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
            near.append((torch.from_numpy(top + i), torch.from_numpy(left + j), torch.from_numpy(text)))

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
class Limits:
    """Digits above which a score is surely above each text's positive, and from which on it may be: (M,), int16."""

    upper: np.ndarray
    reach: np.ndarray


class Rows:
    """Own texts of a tile's images and their limits, (rows, G), ascending; -1 and unreachable where there are fewer."""

    def __init__(self, texts: np.ndarray, limits: Limits) -> None:
        self.texts = texts
        self.upper, self.reach = (np.where(texts < 0, LARGEST, limit[texts]) for limit in (limits.upper, limits.reach))
        self.lowest = self.reach[:, :1]

    def lists(self, top: int, bottom: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For g = 0, 1, ...: which of some rows have a g-th text, and these texts."""
        texts = self.texts[top:bottom]
        present = (np.flatnonzero(column >= 0) for column in texts.T)
        return [(rows, texts[rows, g]) for g, rows in enumerate(present) if len(rows)]
