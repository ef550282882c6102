"""What `clipdistill regions` does, as functions: boxes, embeddings, scores and vectors of a data set's regions.

What fine-tuning changed, the action `compare`, is `before_after` in retention.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdistill.arguments import checked
from clipdistill.config import build
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError
from clipdistill.runtime.console import Shown, file_size, say
from clipdistill.runtime.machine import pick_device
from clipdistill.train.region_config import RegionsConfig

if TYPE_CHECKING:
    import torch

    from clipdistill.regions.box_file import BoxFile
    from clipdistill.regions.measure import Measured
    from clipdistill.regions.store import RegionStore

Data = str | Path | Mapping[str, Any] | PairSource


@dataclass(frozen=True)
class RegionVectors(Shown):
    """The file of vectors that `region_vectors` wrote, and how many images are in it."""

    path: Path
    images: int

    def __repr__(self) -> str:
        size = file_size(self.path.stat().st_size) if self.path.is_file() else "gone"
        return f"{self.path}: {self.images:,} images ({size}); use it as the teacher 'cache:{self.path}'"


@checked
def region_boxes(
    detector: str,
    data: Data,
    out: str | Path,
    *,
    split: str | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> BoxFile:
    """What a detector finds in every picture of `data`, kept in the folder `out`; called again, it goes on.

    detector: "grid:1+2", "torchvision:NAME", "hf:owner/name" and the like (docs/dclip.md). data: a name, or a mapping
    of the settings of `data` with its path; split: of data that has splits (None: train). device: None is a GPU where
    there is one; quiet: no lines on the error stream.

    Returns a BoxFile: boxes by image key, which the other functions take as `boxes`. Raises InputError for an unknown
    detector, and where `out` holds boxes of another detector or other data.
    """
    source = _source(data, split, "train", quiet)
    from clipdistill.regions.box_file import detect
    from clipdistill.regions.detectors import open_detector

    opened = open_detector(detector, pick_device(device))

    def told(done: int, total: int) -> None:
        _tell(quiet)(f"{done}/{total} images")

    return detect(source, opened, Path(out), progress=told)


@checked
def region_embeddings(
    teacher: str | Path,
    data: Data,
    boxes: str | Path,
    *,
    store: str | Path | None = None,
    split: str | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> RegionStore:
    """Embeddings of the regions of `data` through a region teacher's CLIP, before a run needs them.

    teacher: the run that trained a region teacher, or its folder. data: a name, or a mapping of the settings of `data`
    with its path; split: of data that has splits (None: train). boxes: a file or folder of boxes, or a detector.
    store: the folder above those of the embeddings (None: `regions` beside the teacher). device: None is a GPU where
    there is one; quiet: no lines on the error stream.

    Returns a RegionStore: len() images, counts() of their regions, read(indices). Raises InputError for a teacher that
    is none, and boxes of other images.
    """
    return _opened(teacher, data, boxes, store, split, "train", device, quiet)[2]


@checked
def region_scores(
    teacher: str | Path,
    data: Data,
    boxes: str | Path,
    *,
    pairs: int = 200,
    store: str | Path | None = None,
    split: str | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> Measured:
    """How good a region teacher is on `data`, with its own caption, without, and beside the plain CLIP (docs/dclip.md).

    teacher, data, boxes, store, device, quiet: as in `region_embeddings`; split: of data that has splits (None: val).
    pairs: images of the condition that scores every pair.

    Returns a Measured: scores by condition, in fractions. Raises InputError as `region_embeddings`.
    """
    from clipdistill.regions.measure import measure

    opened, source, regions, where = _opened(teacher, data, boxes, store, split, "val", device, quiet)
    return measure(opened, source, regions, pairs=pairs, device=where)


@checked
def region_vectors(
    teacher: str | Path,
    data: Data,
    boxes: str | Path,
    out: str | Path,
    *,
    store: str | Path | None = None,
    split: str | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> RegionVectors:
    """A caption-free region teacher's vectors of `data` in a Parquet file: `teacher="cache:OUT"` trains without boxes.

    teacher, data, boxes, store, split, device, quiet: as in `region_embeddings`. out: the file, ending in .parquet.

    Returns the RegionVectors: path, images. Raises InputError as `region_embeddings`, and for a teacher whose image
    embedding depends on the caption.
    """
    from clipdistill.regions.teacher import export

    opened, source, regions, where = _opened(teacher, data, boxes, store, split, "train", device, quiet)
    return RegionVectors(Path(out), export(opened, source, regions, Path(out), device=where))


def _tell(quiet: bool) -> Any:
    return lambda line: None if quiet else say(line, sys.stderr)


def _source(data: Data, split: str | None, default_split: str, quiet: bool) -> PairSource:
    if isinstance(data, PairSource):
        return data
    given = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    config = build(DataConfig, given | ({} if split is None else {"split": split}), "regions")
    source = open_pairs(config, default_split=default_split)
    if source.problems:
        _tell(quiet)(source.problems.sentence(source.name))
    return source


def _opened(
    teacher: str | Path,
    data: Data,
    boxes: str | Path,
    store: str | Path | None,
    split: str | None,
    default_split: str,
    device: str | torch.device | None,
    quiet: bool,
) -> tuple[Any, PairSource, RegionStore, Any]:
    """The named teacher, the data, its regions, the device."""
    from clipdistill.regions.meta_teacher import read_meta_teacher, region_teacher_folder
    from clipdistill.regions.teacher import open_store

    folder = region_teacher_folder(str(teacher))
    if folder is None:
        raise InputError(f"'{teacher}' is no region teacher: train one with --recipe dclip-teacher")
    where = pick_device(device)
    opened, source = read_meta_teacher(folder), _source(data, split, default_split, quiet)
    values = {"boxes": str(boxes), "store": str(store or folder.parent / "regions")}
    config = build(RegionsConfig, values, "regions")
    regions = open_store(config, source, opened.clip, opened.config, folder.parent, where, _tell(quiet))
    return opened.to(where), source, regions, where
