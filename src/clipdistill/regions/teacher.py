"""The region teacher in use: as the teacher of a run, or as a table of vectors that trains without boxes or crops.

Image embeddings come from regions (and captions), text embeddings from its CLIP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.models.clip_model import hash_tensors
from clipdistill.objective import Embeddings
from clipdistill.regions.box_file import BoxFile, detect
from clipdistill.regions.detectors import is_detector, open_detector
from clipdistill.regions.meta_teacher import MetaTeacher, read_meta_teacher, region_teacher_folder
from clipdistill.regions.store import RegionStore, fill_store
from clipdistill.runtime.distributed import on_main
from clipdistill.runtime.files import new_file, require_place
from clipdistill.train.config import RunConfig
from clipdistill.train.region_config import MetaTeacherConfig, RegionsConfig

Say = Callable[[str], None]
_EXPORTED = 128
"""Images a forward pass of `export`."""


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
        clip = teacher.clip
        own = float(clip.module.logit_scale.detach().float().exp())
        self.logit_scale = own if logit_scale is None else logit_scale
        self.name, self.blocks = teacher.name, (clip.embed_dim,)
        # captions are prepared for it, and the student is measured beside it
        self.model, self.tokenizer = clip, clip.tokenizer

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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of network, CLIP, multiplier and regions (whose folder is named by content)."""
        digest = hashlib.sha256(f"{self.logit_scale} {self.store.folder.name} {self.model.fingerprint()}".encode())
        hash_tensors(self.teacher.network.state_dict(), digest)
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Embeddings:
        """Embeddings of this rank's rows: (B, D) each."""
        assert batch.teacher_tokens is not None
        regions = self.store.read(batch.indices.tolist()).to(self.device)
        sentence, states, mask = self.teacher.text(batch.teacher_tokens)
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
    config: RunConfig, source: PairSource, device: torch.device, logit_scale: float | tuple[float, ...] | None = None
) -> RegionTeacher:
    """The region teacher that a run names, with the regions of its training images.

    Rank 0 makes boxes and embeddings that are not there yet; the others wait `train.rank_timeout` seconds for them.
    Raises InputError when no boxes are named, and for several teachers or a multiplier for each.
    """
    names, regions = config.teachers, config.regions
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
        return open_store(regions, source, teacher.clip, teacher.config, config.out, device)

    on_main(store, config.train.rank_timeout)  # the others find it made
    return RegionTeacher(teacher, store(), device, logit_scale)


@torch.no_grad()
def export(
    teacher: MetaTeacher, source: PairSource, store: RegionStore, path: Path, *, device: torch.device | str = "cpu"
) -> int:
    """Write image and caption embeddings of `source` to a Parquet file for `cache:PATH`; returns the number of images.

    Raises InputError for a teacher whose image embedding depends on the caption: it has no embedding of an image.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not teacher.config.caption_free:
        raise InputError(
            "regions export: this teacher's image embedding depends on the caption, so an image has none of its own: "
            "name the teacher in the run, or train dclip-teacher-caption-free"
        )
    if path.suffix not in (".parquet", ".pq"):
        raise InputError(f"regions export: --out must end in .parquet, got '{path}'")
    device = torch.device(device)
    readable = torch.nonzero(store.readable()).flatten().tolist()
    width = teacher.clip.embed_dim
    vector = pa.list_(pa.float32(), width)
    scale = float(teacher.clip.module.logit_scale.detach().float().exp())
    schema = pa.schema(
        [("key", pa.string()), ("image", vector), ("text", pa.list_(vector))], metadata={"logit_scale": repr(scale)}
    )
    require_place(path, "embeddings")
    if path.is_file() and not _is_exported(path):
        raise InputError(f"{path}: exists and holds no exported embeddings, so it stays: choose another place")
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for begin in range(0, len(readable), _EXPORTED):
            indices = readable[begin : begin + _EXPORTED]
            images = F.normalize(teacher.image(store.read(indices).to(device)), dim=-1).cpu()
            rows = []
            for index, image in zip(indices, images, strict=True):
                sentences = teacher.text(source.captions(index))[0]
                text = F.normalize(sentences, dim=-1).cpu()
                rows.append({"key": source.key(index), "image": image.tolist(), "text": text.tolist()})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return len(readable)


def _is_exported(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return b"logit_scale" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False
