"""Boxes of one image, and what every source of boxes has in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from clipdistill.errors import InputError
from clipdistill.train.region_config import BoxLimits


@dataclass(frozen=True)
class Boxes:
    """Regions of an image of `width` x `height` pixels.

    corners: float32 (R, 4) left, top, right, bottom in pixels; confidence: float32 (R,) in [0, 1]; labels: R names, or
    none at all.
    """

    width: int
    height: int
    corners: np.ndarray
    confidence: np.ndarray
    labels: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        width: int,
        height: int,
        corners: Any,
        confidence: Any = None,
        labels: Sequence[str] = (),
        where: str = "boxes",
    ) -> Boxes:
        """Checked boxes; confidence is 1 where none is given. Raises InputError naming `where`."""
        try:
            matrix = np.asarray(corners, dtype=np.float32).reshape(-1, 4)
            values = np.ones(len(matrix)) if confidence is None else confidence
            scores = np.asarray(values, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: boxes must be lists of four numbers, with one confidence each") from error
        if len(scores) != len(matrix) or len(labels) not in (0, len(matrix)):
            raise InputError(
                f"{where}: {len(matrix)} boxes, {len(scores)} confidences and {len(labels)} labels do not fit together"
            )
        if not (np.isfinite(matrix).all() and np.isfinite(scores).all()):
            raise InputError(f"{where}: a box or a confidence is not finite")
        if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
            raise InputError(f"{where}: confidences must lie between 0 and 1, found {scores.min()} to {scores.max()}")
        return cls(int(width), int(height), matrix, scores, tuple(str(label) for label in labels))

    @classmethod
    def none(cls, width: int, height: int) -> Boxes:
        """An image in which nothing was found."""
        return cls.of(width, height, np.empty((0, 4)))

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def areas(self) -> np.ndarray:
        """Share of the image's area, float32 (R,)."""
        sides = self.corners[:, 2:] - self.corners[:, :2]
        return (sides[:, 0] * sides[:, 1] / (self.width * self.height)).astype(np.float32)

    def chosen(self, keep: Any) -> Boxes:
        """The boxes at the positions or where the mask `keep` is true, in its order."""
        positions = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep, dtype=np.int64)
        labels = tuple(self.labels[i] for i in positions) if self.labels else ()
        return Boxes(self.width, self.height, self.corners[positions], self.confidence[positions], labels)

    def scaled(self, width: int, height: int) -> Boxes:
        """The same regions in a copy of the image of another size."""
        if (width, height) == (self.width, self.height):
            return self
        factor = np.asarray([width / self.width, height / self.height] * 2, dtype=np.float32)
        return Boxes(width, height, self.corners * factor, self.confidence, self.labels)

    def usable(self, limits: BoxLimits) -> Boxes:
        """Clipped to the image, without what is smaller than a pixel and what `limits` leaves out.

        In the order given, unless `limits.most` cuts: then the most confident first (ties: in the order given).
        """
        edge = np.asarray([self.width, self.height] * 2, dtype=np.float32)
        clipped = Boxes(self.width, self.height, np.clip(self.corners, 0, edge), self.confidence, self.labels)
        sides = clipped.corners[:, 2:] - clipped.corners[:, :2]
        keep = (sides >= 1).all(axis=1) & (clipped.confidence >= limits.min_confidence)
        found = clipped.chosen(keep & (clipped.areas >= limits.min_area))
        if limits.most is not None and len(found) > limits.most:
            found = found.chosen(np.argsort(-found.confidence, kind="stable")[: limits.most])
        return found

    def pixel_boxes(self) -> list[tuple[int, int, int, int]]:
        """(top, left, height, width) in whole pixels, at least one each, rounded as Pillow's crop does."""
        result = []
        for left, top, right, bottom in self.corners.tolist():
            x, y = min(round(left), self.width - 1), min(round(top), self.height - 1)
            end_x, end_y = max(x + 1, min(round(right), self.width)), max(y + 1, min(round(bottom), self.height))
            result.append((y, x, end_y - y, end_x - x))
        return result


class Detector(Protocol):
    """What finds boxes in pictures."""

    name: str

    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything its boxes depend on."""
        ...

    def __call__(self, images: Sequence[Any]) -> list[Boxes]:
        """The boxes of RGB pictures."""
        ...
