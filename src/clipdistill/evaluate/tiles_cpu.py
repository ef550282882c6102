"""Comparing the scores of a tile with the limits of the positive pairs on the CPU.

Scores are compared in 16-bit fixed point: cutting off digits keeps the order, widens the uncertain band a little, and
is three times faster than float32. A trained model ranks most positives near the top, so one comparison a score, with
the lowest limit of its row or column, leaves a percent of the scores, and only these are looked at one by one. Where
more are left (an untrained model), blocks that fit the cache are compared with every limit and counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clipdistill.evaluate.tiles import DENSE_SHARE, Near, TileCounter

# blocks fit the second-level cache, and at most 255 rows and 128 x 8 columns let byte-wide counters hold a sum
BLOCK_ROWS, BLOCK_COLUMNS = 240, 1024
# up to this share of a tile, looking at scores one by one is faster than counting
FEW_SHARE = 1 / 16
LARGEST = np.iinfo(np.int16).max


class CpuCounter(TileCounter):
    """Compares a tile in 16-bit fixed point."""

    tile_shape = (2500, 1000)  # the best of ten shapes for the product (480 x 4096: a quarter slower)

    def __init__(self, *arguments: torch.Tensor) -> None:
        super().__init__(*arguments)
        # a score is surely above when its digits are above those of threshold + bound, and uncertain when they are at
        # or above those of threshold - bound
        self.upper = ((self.threshold + self.bound) * self.scale).numpy().astype(np.int16)
        self.reach = ((self.threshold - self.bound) * self.scale).numpy().astype(np.int16) - np.int16(1)
        self.digits, self.mask = np.empty(0, dtype=np.int16), np.empty(0, dtype=np.bool_)
        self.words, self.words_width = np.empty((2, 0), dtype=np.bool_), 0

    def compare(self, tile: torch.Tensor, top: int, left: int, pairs: torch.Tensor, near: tuple[list, list]) -> None:
        """See `TileCounter`."""
        scores = tile.numpy()
        if self.digits.size < scores.size:
            self.digits, self.mask = np.empty(scores.size, dtype=np.int16), np.empty(scores.size, dtype=np.bool_)
        digits = self.digits[: scores.size].reshape(scores.shape)
        np.copyto(digits, scores, casting="unsafe")  # towards zero, which keeps the order
        rows = _Rows(pairs.numpy(), self.upper, self.reach)
        if not self._few_in_columns(digits, top, left, near[0]):
            self._count(digits, top, left, None, near[0])
        if not self._few_in_rows(digits, rows, top, left, near[1]):
            self._count(digits, top, left, rows, near[1])

    # -- few scores reach a limit: each is looked at ------------------------------------------------------------------

    def _few(self, digits: np.ndarray, limits: np.ndarray) -> np.ndarray | None:
        """Flat places of the scores above the limits, ascending; None when they are many."""
        mask = self.mask[: digits.size].reshape(digits.shape)
        np.greater(digits, limits, out=mask)
        return None if np.count_nonzero(mask) > FEW_SHARE * digits.size else np.flatnonzero(mask)

    def _few_in_columns(self, digits: np.ndarray, top: int, left: int, near: list[Near]) -> bool:
        """Text to image: count what is surely above each text's positive, and list what is uncertain."""
        width = digits.shape[1]
        place = self._few(digits, self.reach[left : left + width])
        if place is None:
            return False
        row, column = np.divmod(place, width)
        above = digits.ravel()[place] > self.upper[left : left + width][column]
        self.counts.numpy()[0, left : left + width] += np.bincount(column[above], minlength=width)
        text = left + column[~above]
        near.append((torch.from_numpy(top + row[~above]), torch.from_numpy(text), torch.from_numpy(text)))
        return True

    def _few_in_rows(self, digits: np.ndarray, rows: _Rows, top: int, left: int, near: list[Near]) -> bool:
        """Image to text: the same with each image's own texts, all at once.

        The scores are sorted within their rows, so that a limit's place tells how many are above it.
        """
        place = self._few(digits, rows.lowest)
        if place is None:
            return False
        height, width = digits.shape
        bounds = np.searchsorted(place, np.arange(height + 1) * width)  # of each row's part of `place`
        value = digits.ravel()[place]
        # row and digits (from -32768 on) in one number of 32 bits
        first = ((np.arange(height) << 16) + 32768).astype(np.int32)
        keys = np.repeat(first, np.diff(bounds)) + value
        keys.sort()
        surely, possibly = (np.searchsorted(keys, first[:, None] + limit, side="right") for limit in rows.limits)
        greater, present = self.counts.numpy()[2], rows.texts >= 0  # a text has one image, so no index repeats
        greater[rows.texts[present]] += (bounds[1:, None] - surely)[present]
        # which scores are uncertain: the parts of those (row, text) are looked through once more
        row, g = np.nonzero(present & (surely > possibly))
        sizes = np.diff(bounds)[row]
        index = np.repeat(bounds[row + 1] - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
        upper, reach = (np.repeat(limit[row, g], sizes) for limit in rows.limits)
        uncertain = (value[index] > reach) & (value[index] <= upper)
        row, text = (np.repeat(each, sizes)[uncertain] for each in (row, rows.texts[row, g]))
        column = place[index[uncertain]] - row * width
        near.append((torch.from_numpy(top + row), torch.from_numpy(left + column), torch.from_numpy(text)))
        return True

    # -- many do: the block is compared with every limit --------------------------------------------------------------

    def _count(self, digits: np.ndarray, top: int, left: int, rows: _Rows | None, near: list[Near]) -> None:
        """Count by comparing block after block with all limits; rows: None for text to image."""
        for r in range(0, digits.shape[0], BLOCK_ROWS):
            lists = [None] if rows is None else rows.lists(r, r + BLOCK_ROWS)
            for c in range(0, digits.shape[1], BLOCK_COLUMNS):
                block = digits[r : r + BLOCK_ROWS, c : c + BLOCK_COLUMNS]
                self._count_block(block, top + r, left + c, lists, near)

    def _count_block(
        self, digits: np.ndarray, top: int, left: int, lists: Sequence[np.ndarray | None], near: list[Near]
    ) -> None:
        """Count a block. lists: for each comparison the texts to compare the first rows with, or None: columns."""
        counts = self.counts.numpy()
        dense: torch.Tensor | None = None
        for texts in lists:
            found = self._compare_block(digits, left, texts)
            if found is None:
                dense = self.dense_tile(top, left, digits.shape) if dense is None else dense
                self.add_dense(dense, left, None if texts is None else torch.from_numpy(texts))
                continue
            greater, i, j = found
            if texts is None:
                counts[0, left : left + digits.shape[1]] += greater
            else:
                counts[2, texts] += greater
            text = left + j if texts is None else texts[i]
            near.append((torch.from_numpy(top + i), torch.from_numpy(left + j), torch.from_numpy(text)))

    def _compare_block(
        self, digits: np.ndarray, left: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """How many scores are surely above each text's positive, and row and column of each uncertain score.

        own: the texts to compare the rows with; None to compare the columns with their own positives. None is
        returned when the uncertain scores are too many to list. Booleans are counted eight at a time: eight are one
        64-bit word of eight byte-wide counters, which can be added up 255 times before a byte overflows.
        """
        width = digits.shape[1]
        words = -(-width // 8)
        if width != self.words_width:
            # columns that only fill up a word must stay False
            self.words, self.words_width = np.zeros((2, BLOCK_ROWS * 8 * words), dtype=np.bool_), width
        height = len(digits) if own is None else len(own)
        place: slice | np.ndarray = slice(left, left + width) if own is None else own[:, None]
        above, reach = (mask[: height * 8 * words].reshape(height, 8 * words) for mask in self.words)
        np.greater(digits[:height], self.upper[place], out=above[:, :width])
        np.greater(digits[:height], self.reach[place], out=reach[:, :width])
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


class _Rows:
    """Own texts of a tile's images and their limits, (rows, G); -1 and unreachable where an image has fewer."""

    def __init__(self, texts: np.ndarray, upper: np.ndarray, reach: np.ndarray) -> None:
        self.texts = texts
        self.limits = [np.where(texts < 0, LARGEST, limit[texts]) for limit in (upper, reach)]
        self.lowest = self.limits[1].min(axis=1, keepdims=True, initial=LARGEST)

    def lists(self, top: int, bottom: int) -> list[np.ndarray]:
        """The g-th texts of those images of some rows that have so many; these are always the first ones."""
        return [column[column >= 0] for column in self.texts[top:bottom].T]
