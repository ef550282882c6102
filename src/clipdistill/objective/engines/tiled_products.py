"""Matrix products and memory of the tiled engine: tile shapes, reused buffers, exact or bfloat16 factors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.objective.engines import EngineOptions

# Tile shapes (rows, columns), measured with benchmarks/objective.py. On a CPU a tile and its exponential stay in the
# second-level cache; on a GPU a tile has to be large enough to fill the device.
TILES = {"cpu": (512, 1024), "cuda": (2048, 8192)}

# Bytes of logits kept from the pass that sums for the pass that differentiates, so that they need not be multiplied
# again. A constant, so memory stays linear in N.
KEPT = {"cpu": 256 * 2**20, "cuda": 2**30}

Range = tuple[int, int]

_WIDE_RESULTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
"""Whether torch.mm has `out_dtype`."""


@dataclass(frozen=True)
class Shape:
    """How many rows and columns a tile has at most, and how many bytes of tiles may be kept."""

    rows: int
    columns: int
    kept: int

    @staticmethod
    def choose(device: torch.device, options: EngineOptions) -> Shape:
        """The measured shape for the device, or what the options ask for."""
        rows, columns = TILES.get(device.type, TILES["cpu"])
        if options.tile_rows is not None:
            rows, columns = max(1, options.tile_rows), max(1, 4 * options.tile_rows)
        return Shape(rows, columns, KEPT.get(device.type, KEPT["cpu"]))


def ranges(length: int, step: int) -> list[Range]:
    """[0, length) in pieces of `step`."""
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class Workspace:
    """Flat buffers by name, reused from tile to tile and from component to component; a tile is always contiguous."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def flat(self, name: str, elements: int) -> Tensor:
        """An uninitialised vector; the previous one of the same name is overwritten."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < elements:
            self.buffers.pop(name, None)
            buffer = self.buffers[name] = self.like.new_empty(elements)
        return buffer[:elements]

    def tile(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised (rows, columns) matrix; the previous one of the same name is overwritten."""
        return self.flat(name, rows * columns).view(rows, columns)


class Kept:
    """Tiles remembered under a key until the space is used up."""

    def __init__(self, space: Tensor) -> None:
        self.space = space
        self.tiles: dict[tuple[str, int, int], Tensor] = {}
        self.used = 0

    def reserve(self, key: tuple[str, int, int], rows: int, columns: int) -> Tensor | None:
        """Space for one more tile, or None when there is none left."""
        start, end = self.used, self.used + rows * columns
        if end > self.space.numel():
            return None
        self.used = end
        tile = self.tiles[key] = self.space[start:end].view(rows, columns)
        return tile

    def clear(self) -> None:
        """Forget every tile; the space is used again."""
        self.tiles.clear()
        self.used = 0


class Products:
    """Products with float32 (or float64) results and sums; with `bfloat16` the factors are rounded to 8 bits first."""

    def __init__(self, device: torch.device, dtype: torch.dtype, bfloat16: bool) -> None:
        # float64 features ask for exactness; they are never rounded
        self.bfloat16 = bfloat16 and dtype == torch.float32
        # on a CPU, oneDNN rounds the factors inside the product and keeps a float32 result
        self.inside = self.bfloat16 and device.type == "cpu"
        # elsewhere the factors themselves are narrow, where torch (2.8 and later) can give float32 results for them
        self.narrow = self.bfloat16 and not self.inside and _WIDE_RESULTS

    def factor(self, matrix: Tensor) -> Tensor:
        """The matrix as it enters a product."""
        return matrix.to(torch.bfloat16) if self.narrow else matrix

    def logits(self, rows: Tensor, columns: Tensor, scale: float, offset: float, out: Tensor) -> Tensor:
        """out = scale * rows @ columns.T + offset; the factors come from `factor`."""
        if rows.dtype != out.dtype:
            out.copy_(torch.mm(rows, columns.T, out_dtype=out.dtype)).mul_(scale)
        else:
            out.addmm_(rows, columns.T, beta=0, alpha=scale)
        return out if offset == 0.0 else out.add_(offset)

    def accumulate(self, total: Tensor, gradient: Tensor, features: Tensor, scale: float) -> None:
        """total += scale * gradient @ features; `features` comes from `factor`, `gradient` from it as well."""
        if features.dtype != total.dtype:
            total.add_(torch.mm(gradient, features, out_dtype=total.dtype), alpha=scale)
        else:
            total.addmm_(gradient, features, alpha=scale)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Within it, products of float32 matrices on a CPU have the precision asked for."""
        if not self.inside:
            yield
            return
        settings = getattr(torch.backends.mkldnn, "matmul", None)
        if settings is not None and hasattr(settings, "fp32_precision"):
            before = settings.fp32_precision
            settings.fp32_precision = "bf16"
            try:
                yield
            finally:
                settings.fp32_precision = before
            return
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
