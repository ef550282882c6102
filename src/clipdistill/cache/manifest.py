"""manifest.json: what a store holds and what it was made from. See docs/cache.md for the format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from clipdistill.cache.blocks import CACHE_REMEDY, MANIFEST, BlockFolder
from clipdistill.cache.names import Dtype
from clipdistill.config import LARGEST_SCALE, Config, as_dict, build
from clipdistill.data.views import ImageSpec, ViewPolicy
from clipdistill.errors import InputError
from clipdistill.runtime.files import digest_of

FORMAT = 1
KIND = "clipdistill cache"


class TeacherEntry(Config):
    """One teacher: everything its numbers depend on.

    weights: sha256 over the architecture and all weights; tokenizer: sha256 of teacher-N/tokenizer.json;
    precision: of the forward pass; logit_scale: the multiplier itself. engines: what runs a tower where it is not
    torch; agreement: of a tower, its least cosine with torch in float32 on a first batch, where it was compared.
    """

    name: str
    weights: str
    transform: ImageSpec
    tokenizer: str
    precision: str
    dim: int = pydantic.Field(gt=0)
    logit_scale: float = pydantic.Field(gt=0, le=LARGEST_SCALE)
    parameters: dict[str, int] = pydantic.Field(default_factory=dict)
    engines: dict[str, str] = pydantic.Field(default_factory=dict)
    agreement: dict[str, float] = pydantic.Field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What makes it another teacher: not its name, and not what ran it, which was compared with torch."""
        values = {**as_dict(self), "name": None, "parameters": None}
        return {name: value for name, value in values.items() if name not in ("engines", "agreement")}


class DataEntry(Config):
    """The pairs: `fingerprint` is PairSource.fingerprint(), a sha256 over keys and captions in order; pictures: over
    some of the pictures that the store was begun with (None: not known)."""

    name: str
    path: str
    fingerprint: str
    samples: int = pydantic.Field(ge=1)
    captions: int = pydantic.Field(ge=0)
    pictures: str | None = None


class SyntheticEntry(Config):
    """Added captions: `fingerprint` is a sha256 over (key, captions) in the order of the data."""

    fingerprint: str
    captions: int = pydantic.Field(ge=1)


class Manifest(Config):
    """The whole description. Rows are cut into blocks of `block` rows, separately in each segment.

    segments: number of rows after each growth (rising; the last is the number of samples). samples: file name of the
    table of samples. versions: of the libraries whose change can change the numbers.
    """

    kind: str = KIND
    format: int = FORMAT
    dtype: Dtype
    views: int = pydantic.Field(default=0, ge=0)
    view_policy: ViewPolicy | None = None
    view_seed: int = 0
    captions: str = "all"
    block: int = pydantic.Field(ge=1)
    segments: tuple[int, ...]
    samples: str
    data: DataEntry
    synthetic: SyntheticEntry | None = None
    teachers: tuple[TeacherEntry, ...]
    versions: dict[str, str] = pydantic.Field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout(self.block, self.segments)

    def fingerprint(self) -> str:
        """sha256 over everything that the stored numbers depend on; names and places do not count."""
        values = as_dict(self)
        for name in ("kind", "format", "block", "segments", "samples"):
            del values[name]
        values["data"] = self.data.fingerprint
        values["teachers"] = [
            teacher.identity() | ({"engines": dict(teacher.engines)} if teacher.engines else {})
            for teacher in self.teachers
        ]
        return digest_of(values)

    def pair_bytes(self) -> float:
        """Bytes of embeddings and views per image, averaged."""
        from clipdistill.cache.sizes import sample_bytes

        data, extra = self.data, 0 if self.synthetic is None else self.synthetic.captions
        stored = data.captions if self.captions == "all" else data.samples
        dims = [teacher.dim for teacher in self.teachers]
        return sample_bytes(dims, self.dtype, self.views, (stored + extra) / data.samples)


class Layout:
    """Which block a row lies in."""

    def __init__(self, block: int, segments: Sequence[int]) -> None:
        self.block = block
        starts: list[int] = []
        begin = 0
        for end in segments:
            starts.extend(range(begin, end, block))
            begin = end
        self.starts = np.asarray(starts, dtype=np.int64)
        self.rows = begin
        self.stops = np.append(self.starts[1:], begin)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.rows == other.rows and np.array_equal(self.starts, other.starts)

    __hash__ = None  # type: ignore[assignment]

    def bounds(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        return int(self.starts[block]), int(self.stops[block])

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The block of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    @cached_property
    def largest(self) -> int:
        """Rows of the fullest block."""
        return int((self.stops - self.starts).max(initial=0))


def blocks_of(folder: Path) -> BlockFolder:
    """The files of a cache."""
    return BlockFolder(folder, what="cache", remedy=CACHE_REMEDY)


def read_manifest(folder: Path, kind: str = KIND) -> Manifest:
    """The manifest of the cache in `folder`; raises InputError when there is none or it cannot be used."""
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: no {MANIFEST}, so this is not a cache: make one with `clipdistill cache`")
    values = blocks_of(folder).description()
    if values.get("kind") != kind:
        raise InputError(f"{path}: not the manifest of a '{kind}' (it says {values.get('kind')!r})")
    if values.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {values.get('format')!r}, this version reads {FORMAT}: use the version that wrote it"
        )
    manifest = build(Manifest, values, str(path))
    ends = list(manifest.segments)
    if not ends or ends != sorted(set(ends)) or ends[0] < 1 or ends[-1] != manifest.data.samples:
        raise InputError(f"{path}: segments {ends} do not rise to the number of samples, {manifest.data.samples}")
    if Path(manifest.samples).name != manifest.samples or manifest.samples in ("", ".", ".."):
        raise InputError(f"{path}: samples: '{manifest.samples}' is not the name of a file in this folder")
    if not manifest.teachers:
        raise InputError(f"{path}: teachers: the list is empty")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    blocks_of(folder).describe(as_dict(manifest))
