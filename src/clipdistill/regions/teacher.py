"""The region teacher of a training run: image embeddings from regions (and captions), text embeddings from its CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, Tokenizer
from clipdistill.objective import Embeddings
from clipdistill.regions.box_file import BoxFile
from clipdistill.regions.config import MetaTeacherConfig, RegionsConfig
from clipdistill.regions.detectors import is_detector, open_detector
from clipdistill.regions.meta_teacher import MetaTeacher, read_meta_teacher, region_teacher_folder
from clipdistill.regions.proposals import detect
from clipdistill.regions.store import RegionStore, fill_store
from clipdistill.runtime.distributed import on_main

Say = Callable[[str], None]


class RegionTeacher:
    """The teacher of the training loop (train.setup.Teacher): DCLIP's.

    The image embedding is the meta-teacher's, the text embedding its CLIP's plain sentence embedding. `logit_scale`:
    the multiplier handed to terms that compare similarities (None: the CLIP's own).
    """

    stored = None  # nothing in the loader: regions are looked up by sample

    def __init__(
        self, teacher: MetaTeacher, store: RegionStore, device: torch.device, logit_scale: float | None = None
    ) -> None:
        self.teacher, self.store, self.device = teacher.to(device), store, device
        own = float(teacher.clip.module.logit_scale.detach().float().exp())
        self.logit_scale = own if logit_scale is None else logit_scale

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def model(self) -> ClipModel:
        """The frozen CLIP: captions are prepared for it, and the student is measured beside it."""
        return self.teacher.clip

    @property
    def tokenizer(self) -> Tokenizer:
        return self.teacher.clip.tokenizer

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.teacher.clip.embed_dim,)

    @property
    def notes(self) -> list[str]:
        """What the regions are made of, and whether the caption is in the image embedding."""
        manifest = self.store.manifest
        counts = self.store.counts().float()
        found = (
            f"regions: {manifest.boxes}, {counts.mean():.1f} an image; {manifest.without_boxes} of "
            f"{len(self.store)} images have no boxes (whole image: {manifest.whole_image})"
        )
        if self.teacher.config.caption_free:
            return [found]
        return [found, "the image embeddings of this teacher contain the caption: its R@1 below is no measure of it"]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Embeddings:
        """Embeddings of this rank's rows: (B, D) each."""
        assert batch.teacher_tokens is not None
        regions = self.store.read(batch.indices.tolist()).to(self.device)
        sentence, states, mask = self.teacher.text(batch.teacher_tokens.to(self.device))
        image = self.teacher.image(regions, states, mask)
        return Embeddings(image.float(), sentence.float(), self.logit_scale)


def open_boxes(boxes: str, source: PairSource, root: Path, device: torch.device, say: Say = lambda _: None) -> BoxFile:
    """The boxes a run names: a file, or what a detector finds (kept in a folder of its own below `root`)."""
    if not is_detector(boxes):
        return BoxFile(Path(boxes).expanduser())
    detector = open_detector(boxes, device)
    identity = hashlib.sha256(f"{detector.fingerprint()} {source.fingerprint()}".encode()).hexdigest()
    folder = root / f"boxes-{identity[:16]}"
    say(f"boxes of {detector.name} for {len(source)} images, kept in {folder}")
    return detect(source, detector, folder)


def open_store(
    config: RegionsConfig,
    source: PairSource,
    clip: ClipModel,
    network: MetaTeacherConfig,
    out: Path,
    device: torch.device,
    say: Say = lambda _: None,
) -> RegionStore:
    """The regions of `source` for a run in `out`, below `regions.store`; made where they are not there."""
    root = config.store if config.store is not None else out / "regions"
    boxes = open_boxes(config.boxes, source, root, device, say)
    say(f"regions of {source.name} through {clip.name}: {root}")
    return fill_store(
        root,
        source,
        boxes,
        clip,
        network.crop_spec(clip.image),
        config.limits,
        network.whole_image,
        batch_size=config.batch_size,
        device=device,
    )


def open_region_teacher(
    names: Sequence[str],
    regions: RegionsConfig | None,
    source: PairSource,
    out: Path,
    device: torch.device,
    *,
    logit_scale: float | tuple[float, ...] | None = None,
    rank_timeout: float = 1800.0,
) -> RegionTeacher:
    """The region teacher that a run names, with the regions of its training images.

    Rank 0 makes boxes and embeddings that are not there yet; the others wait `rank_timeout` seconds for them. Raises
    InputError when no boxes are named, and for several teachers or a multiplier for each.
    """
    folder = region_teacher_folder(names[0])
    if len(names) != 1 or folder is None:
        raise InputError(f"teacher '{','.join(names)}': a region teacher stands alone")
    if regions is None:
        raise InputError(
            f"teacher '{names[0]}': a region teacher needs boxes of the training images: name a file or a detector, "
            "for example  regions.boxes=boxes.parquet"
        )
    if isinstance(logit_scale, tuple):
        raise InputError("train.teacher_logit_scale: a region teacher has one multiplier; give one number")
    teacher = read_meta_teacher(folder)

    def store() -> RegionStore:
        return open_store(regions, source, teacher.clip, teacher.config, out, device)

    on_main(store, rank_timeout)  # the others find it made
    return RegionTeacher(teacher, store(), device, logit_scale)
