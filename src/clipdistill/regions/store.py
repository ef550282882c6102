"""Embeddings of all regions of a data set through a frozen CLIP image tower, made once.

The tower is frozen and boxes are fixed, so a region's embedding is a constant of the image: DCLIP's released code
computes it again in every step. A store is a folder of blocks (cache.blocks): `regions.json` says what it was made
from, `block-00000` and so on hold 256 images each, float16 embeddings; an interrupted call is continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from clipdistill.cache.blocks import Block, BlockFolder
from clipdistill.config import Config, as_dict, build
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.data.views import ImageSpec, View, normalise, render_pixels
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel, hash_tensors
from clipdistill.regions.box_file import BoxFile
from clipdistill.regions.boxes import Boxes
from clipdistill.runtime.console import Shown
from clipdistill.runtime.files import ABANDONED, remove_leftovers
from clipdistill.train.region_config import BoxLimits

FORMAT = 1
MANIFEST = "regions.json"
BLOCK = 256
_ZERO_ROW, _UNREADABLE = -1, -2  # instead of a count: nothing found, the released one zero row; no picture
_IDENTITY = ("format", "data_sha256", "boxes_sha256", "image_tower_sha256", "crops", "limits", "whole_image")
Progress = Callable[[int, int], None]


class RegionManifest(Config):
    """What a store was made from. without_boxes: images that the boxes do not know; block: images a block."""

    format: int = FORMAT
    data: str
    data_sha256: str
    images: int = pydantic.Field(ge=1)
    boxes: str
    boxes_sha256: str
    without_boxes: int = pydantic.Field(ge=0)
    image_tower_sha256: str
    crops: ImageSpec
    limits: BoxLimits
    whole_image: str
    width: int = pydantic.Field(ge=1)
    block: int = pydantic.Field(ge=1)

    @property
    def identity(self) -> str:
        """Sixteen digits of a digest of everything the embeddings depend on."""
        values = as_dict(self)
        text = json.dumps({key: values[key] for key in _IDENTITY}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def parts(self) -> list[range]:
        """The images of each block."""
        return [range(start, min(start + self.block, self.images)) for start in range(0, self.images, self.block)]


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
    manifest = RegionManifest(
        data=source.name,
        data_sha256=source.fingerprint(),
        images=len(source),
        boxes=boxes.name,
        boxes_sha256=boxes.fingerprint(),
        without_boxes=len(missing),
        image_tower_sha256=image_tower_sha256(clip),
        crops=spec,
        limits=limits,
        whole_image=whole_image,
        width=clip.embed_dim,
        block=BLOCK,
    )
    blocks = _blocks(root / f"regions-{manifest.identity}")
    if blocks.manifest.exists():
        stored = _read_manifest(blocks)
        if (stored.identity, stored.images) != (manifest.identity, manifest.images):
            raise InputError(f"{blocks.manifest}: not what the folder is named after: remove the folder")
        manifest = stored
    else:
        blocks.describe(as_dict(manifest))
    remove_leftovers(blocks.folder, older_than=ABANDONED)
    clip.module.eval().to(device)
    encoder = Encoder(clip, device=device)
    for number, part in enumerate(manifest.parts()):
        if not blocks.path(_name(number)).exists():
            regions = [_regions(source, boxes, i, limits, whole_image) for i in part]
            tensors = _tensors(regions, encoder, spec, batch_size)
            blocks.write(_name(number), tensors, _metadata(manifest, part))
            progress(part.stop, len(source))
    return RegionStore(blocks.folder)


def _blocks(folder: Path) -> BlockFolder:
    return BlockFolder(
        folder, what="region store", remedy="remove it and run the same command again", manifest=MANIFEST
    )


def _name(number: int) -> str:
    return f"block-{number:05d}"


def _metadata(manifest: RegionManifest, part: range) -> dict[str, str]:
    return {"store": manifest.identity, "images": f"{part.start}-{part.stop}"}


def _read_manifest(blocks: BlockFolder) -> RegionManifest:
    values = blocks.description()
    if values.get("format") != FORMAT:
        raise InputError(
            f"{blocks.manifest}: format {values.get('format')!r}, this version reads {FORMAT}: {blocks.remedy}"
        )
    return build(RegionManifest, values, str(blocks.manifest))


_Regions = tuple[Image.Image | None, Boxes]
"""One image's picture and boxes, ready to be cut; no picture where it cannot be read."""


def _regions(source: PairSource, boxes: BoxFile, index: int, limits: BoxLimits, whole_image: str) -> _Regions:
    try:
        image = source.image(index)
    except BadSample:
        return None, Boxes.none(1, 1)  # the loader meets it again, lists and counts it
    width, height = image.size
    found = boxes.get(source.key(index), width, height) or Boxes.none(width, height)
    found = found.usable(limits)
    if whole_image == "always" or (whole_image == "missing" and not len(found)):
        whole = np.asarray([[0, 0, width, height]], dtype=np.float32)
        corners, confidence = np.concatenate([whole, found.corners]), np.concatenate([[1.0], found.confidence])
        found = Boxes.of(width, height, corners, confidence)
    return image, found


def _tensors(images: Sequence[_Regions], encoder: Encoder, spec: ImageSpec, batch_size: int) -> dict[str, Tensor]:
    """Crops of all images of a block through the tower, a batch at a time."""
    cut = [(image, box) for image, boxes in images if image is not None for box in boxes.pixel_boxes()]
    rows = [torch.zeros(0, encoder.model.embed_dim)]
    for start in range(0, len(cut), batch_size):
        crops = [crop(image, box, spec) for image, box in cut[start : start + batch_size]]
        rows.append(encoder.encode_images(torch.stack(crops), "regions", unit=False).cpu())
    counts = [_UNREADABLE if image is None else len(boxes) or _ZERO_ROW for image, boxes in images]
    embeddings = torch.cat(rows).half()
    if not bool(embeddings.isfinite().all()):
        raise InputError(
            "the image tower gives NaN or infinite embeddings for regions (stored as fp16): nothing to keep"
        )
    return {
        "embeddings": embeddings,
        "counts": torch.tensor(counts),
        "areas": torch.from_numpy(np.concatenate([boxes.areas for _, boxes in images])),
        "confidences": torch.from_numpy(np.concatenate([boxes.confidence for _, boxes in images])),
    }


def crop(image: Image.Image, box: tuple[int, int, int, int], spec: ImageSpec) -> Tensor:
    """The region (top, left, height, width) squashed to the model's square and normalised: float32 (3, size, size)."""
    return normalise(torch.from_numpy(render_pixels(image, View(box), spec)), spec)


class RegionStore(Shown):
    """Reads a complete store: regions of samples by their index in the data it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._blocks = folder, _blocks(folder)
        self.manifest = _read_manifest(self._blocks)
        self._starts: dict[int, np.ndarray] = {}
        there = self._blocks.names()
        for number in range(-(-len(self) // self.manifest.block)):
            if _name(number) not in there:
                raise InputError(f"{folder}: incomplete (block {number} is missing): run the same command again")
        self._parts = self.manifest.parts()

    def __len__(self) -> int:
        return self.manifest.images

    def __repr__(self) -> str:
        counts = self.counts()
        return f"{self.folder}: {int(counts.sum()):,} regions of {len(self):,} images, {counts.float().mean():.1f} each"

    def _block(self, number: int) -> dict[str, np.ndarray]:
        """The tensors of a block, read whole and compared with its checksum the first time."""
        return self._blocks.read(_name(number), check=lambda block: self._check(block, number)).arrays

    def _check(self, block: Block, number: int) -> None:
        if "crc32" in block.metadata:  # missing in blocks of version 0.1
            block.require(_metadata(self.manifest, self._parts[number]), "region store")
            block.verify()
        arrays, dtypes = block.arrays, {"embeddings": "F16", "counts": "I64", "areas": "F32", "confidences": "F32"}
        if {name: block.dtype(name) for name in arrays} != dtypes:
            raise InputError(f"{block.path}: damaged block (its tensors are not {', '.join(dtypes)}): {block.remedy}")
        counts = arrays["counts"]
        found = {name: arrays[name].shape for name in dtypes}
        starts = np.concatenate([[0], np.cumsum(np.clip(counts, 0, 1 << 40))])
        rows = int(starts[-1])
        wanted = {"embeddings": (rows, self.manifest.width), "counts": (len(self._parts[number]),)}
        if found != {**wanted, "areas": (rows,), "confidences": (rows,)} or counts.min() < _UNREADABLE:
            raise InputError(f"{block.path}: damaged block (its shapes {found} do not fit together): {block.remedy}")
        if not all(np.isfinite(arrays[name]).all() for name in ("embeddings", "areas", "confidences")):
            raise InputError(f"{block.path}: damaged block (a number is not finite): {block.remedy}")
        self._starts[number] = starts

    def counts(self) -> Tensor:
        """Regions of every image, int64 (N,)."""
        return self._counts().clamp(min=0)

    def readable(self) -> Tensor:
        """Which images could be read, bool (N,)."""
        return self._counts() != _UNREADABLE

    def _counts(self) -> Tensor:
        return torch.from_numpy(np.concatenate([self._block(n)["counts"] for n in range(len(self._parts))]))

    def read(self, indices: Sequence[int]) -> RegionBatch:
        """The regions of these samples, in their order."""
        found = []
        for index in indices:
            if not 0 <= index < len(self):
                raise InputError(f"{self.folder}: number {index} is not one of its {len(self):,} images")
            number, within = divmod(int(index), self.manifest.block)
            arrays = self._block(number)
            own = slice(*self._starts[number][within : within + 2].tolist())
            rows: list[np.ndarray] = [
                arrays[name][own].astype(np.float32) for name in ("embeddings", "areas", "confidences")
            ]
            if arrays["counts"][within] == _ZERO_ROW:
                rows = [np.zeros((1, self.manifest.width)), np.zeros(1), np.zeros(1)]
            found.append(rows)
        lengths = torch.tensor([len(rows[0]) for rows in found], dtype=torch.int64)
        most = max([1, *lengths.tolist()])

        def padded(column: int, *shape: int) -> Tensor:
            result = torch.zeros(len(found), most, *shape)
            for row, values in zip(result, found, strict=True):
                row[: len(values[column])] = torch.from_numpy(values[column])
            return result

        mask = torch.arange(most) < lengths[:, None]
        return RegionBatch(padded(0, self.manifest.width), mask, padded(1), padded(2))
