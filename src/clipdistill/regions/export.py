"""A caption-free region teacher as a table of vectors, which trains a student without boxes, crops or the network."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError
from clipdistill.regions.meta_teacher import MetaTeacher, caption_tokens
from clipdistill.regions.store import RegionStore
from clipdistill.runtime.files import make_folder, new_file

_BATCH = 128


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
    make_folder(path.parent, "export")
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for begin in range(0, len(readable), _BATCH):
            indices = readable[begin : begin + _BATCH]
            images = F.normalize(teacher.image(store.read(indices).to(device)), dim=-1).cpu()
            rows = []
            for index, image in zip(indices, images, strict=True):
                sentences = teacher.text(caption_tokens(teacher, source.captions(index), device))[0]
                text = F.normalize(sentences, dim=-1).cpu()
                rows.append({"key": source.key(index), "image": image.tolist(), "text": text.tolist()})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return len(readable)
