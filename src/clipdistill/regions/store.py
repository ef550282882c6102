"""Embeddings of all regions of a data set through a frozen CLIP image tower, made once.

The tower is frozen and boxes are fixed, so a region's embedding is a constant of the image: DCLIP's released code
computes it again in every step. A store is a folder: `regions.json` (what it was made from) and blocks of 256 images
(safetensors, float16 embeddings), each written whole; an interrupted call is continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.config import as_dict
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.data.views import ImageSpec, View, normalise, render_pixels
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel, hash_tensors
from clipdistill.regions.box_file import BoxFile
from clipdistill.regions.boxes import Boxes
from clipdistill.regions.config import BoxLimits

FORMAT = 1
MANIFEST = "regions.json"
BLOCK = 256
_ZERO_ROW, _UNREADABLE = -1, -2  # instead of a count: nothing found, the released one zero row; no picture
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RegionBatch:
    """Regions of B images, padded to the largest number R among them.

    embeddings float32 (B, R, D), not normalised; mask bool (B, R); areas (shares of the image) and confidences (B, R).
    Padding is zero. R is at least 1.
    """

    embeddings: Tensor
    mask: Tensor
    areas: Tensor
    confidences: Tensor

    def to(self, device: torch.device) -> RegionBatch:
        return RegionBatch(*(t.to(device) for t in (self.embeddings, self.mask, self.areas, self.confidences)))


def image_tower_sha256(clip: ClipModel) -> str:
    """SHA-256 (hex) over the weights of the image tower: what region embeddings depend on."""
    digest = hashlib.sha256(json.dumps(clip.architecture.get("vision_cfg"), sort_keys=True).encode())
    hash_tensors({f"visual.{k}": v for k, v in clip.module.visual.state_dict().items()}, digest)
    return digest.hexdigest()


def fill_store(
    root: Path,
    source: PairSource,
    boxes: BoxFile,
    clip: ClipModel,
    spec: ImageSpec,
    limits: BoxLimits,
    whole_image: str,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> RegionStore:
    """The complete store of these regions below `root`: what is missing of it is computed.

    Its folder is named after everything the embeddings depend on, so that data sets, box files, models and settings
    share one root. spec: how crops are prepared; whole_image: as in MetaTeacherConfig. Raises InputError when the
    boxes are those of other images.
    """
    missing = boxes.require_some((source.key(i) for i in range(len(source))), source.name)
    described: dict[str, Any] = {
        "format": FORMAT,
        "data": source.name,
        "data_sha256": source.fingerprint(),
        "images": len(source),
        "boxes": boxes.name,
        "boxes_sha256": boxes.fingerprint(),
        "without_boxes": len(missing),
        "image_tower_sha256": image_tower_sha256(clip),
        "crops": as_dict(spec),
        "limits": as_dict(limits),
        "whole_image": whole_image,
        "width": clip.embed_dim,
        "block": BLOCK,
    }
    folder = root / f"regions-{_identity(described)}"
    _open(folder, described)
    module = clip.module.eval().to(device)
    for number, part in enumerate(_parts(len(source))):
        path = folder / f"block-{number:05d}.safetensors"
        if not path.exists():
            regions = [_regions(source, boxes, i, limits, whole_image) for i in part]
            _write(path, regions, module, spec, torch.device(device), batch_size, clip.embed_dim)
            progress(part.stop, len(source))
    return RegionStore(folder)


def _parts(count: int) -> list[range]:
    return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


_IDENTITY = ("format", "data_sha256", "boxes_sha256", "image_tower_sha256", "crops", "limits", "whole_image")


def _identity(described: dict[str, Any]) -> str:
    text = json.dumps({key: described[key] for key in _IDENTITY}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open(folder: Path, described: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if path.exists():
        stored = _read_manifest(folder)
        for key in _IDENTITY:
            if stored.get(key) != described[key]:
                raise InputError(f"{path}: '{key}' is not what the folder is named after: remove the folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{MANIFEST}.writing")
    temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
    temporary.replace(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        stored = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST}: not readable ({error})") from error
    return stored


@dataclass(frozen=True)
class _Regions:
    """One image's picture and boxes, ready to be cut; no picture where it cannot be read."""

    image: Image.Image | None
    boxes: Boxes
    zero_row: bool = False


def _regions(source: PairSource, boxes: BoxFile, index: int, limits: BoxLimits, whole_image: str) -> _Regions:
    try:
        image = source.image(index)
    except BadSample:
        return _Regions(None, Boxes.none(1, 1))  # the loader meets it again, lists and counts it
    width, height = image.size
    found = boxes.get(source.key(index), width, height) or Boxes.none(width, height)
    found = found.usable(limits)
    if whole_image == "always" or (whole_image == "missing" and not len(found)):
        whole = np.asarray([[0, 0, width, height]], dtype=np.float32)
        corners, confidence = np.concatenate([whole, found.corners]), np.concatenate([[1.0], found.confidence])
        found = Boxes.of(width, height, corners, confidence)
    return _Regions(image, found, zero_row=len(found) == 0)


def _write(
    path: Path,
    images: Sequence[_Regions],
    module: Any,
    spec: ImageSpec,
    device: torch.device,
    batch_size: int,
    width: int,
) -> None:
    """Crops of all images of a block through the tower, a batch at a time."""
    rows: list[Tensor] = []
    waiting: list[Tensor] = []

    def encode() -> None:
        with torch.no_grad():
            features = module.encode_image(torch.stack(waiting).to(device))
        rows.append(features.float().cpu())
        waiting.clear()

    for crop in _crops(images, spec):
        waiting.append(crop)
        if len(waiting) == batch_size:
            encode()
    if waiting:
        encode()
    embeddings = torch.cat(rows) if rows else torch.zeros(0, width)
    counts = torch.tensor([_count(one) for one in images])
    tensors = {
        "embeddings": embeddings.half(),
        "counts": counts,
        "areas": torch.from_numpy(np.concatenate([one.boxes.areas for one in images])),
        "confidences": torch.from_numpy(np.concatenate([one.boxes.confidence for one in images])),
    }
    temporary = path.with_name(f".{path.name}.writing")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _count(one: _Regions) -> int:
    if one.image is None:
        return _UNREADABLE
    return _ZERO_ROW if one.zero_row else len(one.boxes)


def _crops(images: Sequence[_Regions], spec: ImageSpec) -> Iterator[Tensor]:
    for one in images:
        if one.image is not None:
            for box in one.boxes.pixel_boxes():
                yield crop(one.image, box, spec)


def crop(image: Image.Image, box: tuple[int, int, int, int], spec: ImageSpec) -> Tensor:
    """The region (top, left, height, width) squashed to the model's square and normalised: float32 (3, size, size)."""
    return normalise(torch.from_numpy(render_pixels(image, View(box), spec)), spec)


class RegionStore:
    """Reads a complete store: regions of samples by their index in the data it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.width = int(self.manifest["width"])
        self._blocks: dict[int, tuple[Any, Tensor, Tensor, Tensor, Tensor]] = {}
        for number in range(len(_parts(int(self.manifest["images"])))):
            if not (folder / f"block-{number:05d}.safetensors").exists():
                raise InputError(f"{folder}: incomplete (block {number} is missing): run the same command again")

    def __len__(self) -> int:
        return int(self.manifest["images"])

    def _block(self, number: int) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        if number not in self._blocks:
            path = self.folder / f"block-{number:05d}.safetensors"
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in ("counts", "areas", "confidences")}
                    rows = file.get_slice("embeddings")
                    embeddings = rows[:]
            except SafetensorError as error:
                raise InputError(f"{path}: damaged ({error}): remove it and run the same command again") from error
            counts = tensors["counts"]
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.clamp(min=0).cumsum(0)])
            self._blocks[number] = (embeddings, counts, starts, tensors["areas"], tensors["confidences"])
        return self._blocks[number]

    def counts(self) -> Tensor:
        """Regions of every image, int64 (N,)."""
        return self._counts().clamp(min=0)

    def readable(self) -> Tensor:
        """Which images could be read, bool (N,)."""
        return self._counts() != _UNREADABLE

    def _counts(self) -> Tensor:
        return torch.cat([self._block(n)[1] for n in range(len(_parts(len(self))))])

    def read(self, indices: Sequence[int]) -> RegionBatch:
        """The regions of these samples, in their order."""
        found = []
        for index in indices:
            number, within = divmod(int(index), BLOCK)
            embeddings, counts, starts, areas, confidences = self._block(number)
            begin, end = int(starts[within]), int(starts[within + 1])
            rows = embeddings[begin:end].float()
            sizes, scores = areas[begin:end], confidences[begin:end]
            if int(counts[within]) == _ZERO_ROW:
                rows, sizes, scores = torch.zeros(1, self.width), torch.zeros(1), torch.zeros(1)
            found.append((rows, sizes, scores))
        most = max([len(rows) for rows, _, _ in found], default=0) or 1
        shape = (len(found), most)
        batch = RegionBatch(
            torch.zeros(*shape, self.width),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape),
            torch.zeros(shape),
        )
        for row, (rows, sizes, scores) in enumerate(found):
            batch.embeddings[row, : len(rows)] = rows
            batch.mask[row, : len(rows)] = True
            batch.areas[row, : len(rows)] = sizes
            batch.confidences[row, : len(rows)] = scores
        return batch
